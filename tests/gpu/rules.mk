TEST_gpu_SRC += src/net/proxy.cc
