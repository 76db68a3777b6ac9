TEST_gpu_SRC += src/net/proxy.cc
# example_test.cc runs them.
$(BUILDDIR)/bin/test_gpu: | $(if $(HAVE_CUBLAS),$(BUILDDIR)/bin/megatron_layer $(BUILDDIR)/bin/decode_step)
