# net_conformance: loads any net plugin, so it links none of ours.
CONFORMANCE_OBJ := $(call obj,$(call src,tests/conformance))
CONFORMANCE     := $(BUILDDIR)/bin/net_conformance
$(CONFORMANCE): $(CONFORMANCE_OBJ)
	$(call say,Linking,$@)mkdir -p $(@D)
	$(Q)$(link) $(CONFORMANCE_OBJ) $(LDLIBS)
-include $(CONFORMANCE_OBJ:.o=.d)
tests: $(if $(HAVE_NET),$(CONFORMANCE))
