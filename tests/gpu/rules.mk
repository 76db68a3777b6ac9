TEST_gpu_SRC += src/net/proxy.cc
# example_test.cc runs it.
$(BUILDDIR)/bin/test_gpu: | $(if $(HAVE_CUBLAS),$(BUILDDIR)/bin/megatron_layer)
