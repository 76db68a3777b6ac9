# The fake libibverbs.so.1; NCCL_MOE_NET_IBVERBS_LIB or LD_LIBRARY_PATH=$(BUILDDIR)/fakeverbs selects it.
FAKEVERBS_OBJ := $(call obj,$(call src,tests/fakeverbs))
FAKEVERBS     := $(BUILDDIR)/fakeverbs/libibverbs.so.1
$(FAKEVERBS): $(FAKEVERBS_OBJ) tests/fakeverbs/fakeverbs.map
	$(call say,Linking,$@)mkdir -p $(@D)
	$(Q)$(link) -shared -Wl,-soname,$(@F) -Wl,--version-script=tests/fakeverbs/fakeverbs.map -Wl,-z,defs $(FAKEVERBS_OBJ) $(LDLIBS)
-include $(FAKEVERBS_OBJ:.o=.d)
tests: $(if $(HAVE_NET),$(FAKEVERBS))
.PHONY: test-fake
test-fake: $(BUILDDIR)/bin/net_conformance $(FAKEVERBS) plugin
	tests/fakeverbs/run $(BUILDDIR)
