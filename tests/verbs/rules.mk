# The proxy's engine is the same on both transports, and so is its test.
TEST_verbs_SRC := tests/net/proxy_engine_test.cc
