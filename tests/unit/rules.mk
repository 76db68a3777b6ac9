# The pure parts of moe_perf.
TEST_unit_SRC += $(addprefix perf/moe/,npy.cc numeric.cc options.cc perf_error.cc routing_source.cc reference.cc \
                   checker.cc host_device.cc group.cc)
