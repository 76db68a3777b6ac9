# The parts of net_perf.
TEST_net_SRC += $(filter-out perf/net/net_perf.cc,$(wildcard perf/net/*.cc))
