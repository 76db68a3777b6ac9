# make test-rdma: the probe and net_conformance over the kernel's own RDMA, in a virtual machine.
PROBE_OBJ := $(call obj,tests/vm/probe.cc)
PROBE     := $(BUILDDIR)/bin/verbs_probe
$(PROBE): $(PROBE_OBJ)
	$(call say,Linking,$@)mkdir -p $(@D)
	$(Q)$(link) $(PROBE_OBJ) -libverbs $(LDLIBS)
-include $(PROBE_OBJ:.o=.d)
tests: $(if $(HAVE_NET),$(PROBE))
.PHONY: test-rdma
RDMA_NEEDS = $(CONFORMANCE) $(FAKEVERBS) $(PROBE) plugin perf
test-rdma: $(RDMA_NEEDS)
	tests/vm/test-rdma $(abspath $(BUILDDIR))
