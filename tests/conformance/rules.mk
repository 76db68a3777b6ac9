# net_conformance loads any net plugin, so it links none of ours; the saboteur is a plugin that it has to fail.
CONFORMANCE_OBJ := $(call obj,$(call src,tests/conformance))
CONFORMANCE     := $(BUILDDIR)/bin/net_conformance
SABOTEUR_OBJ    := $(call obj,tests/conformance/sabotage/saboteur.cc)
SABOTEUR        := $(BUILDDIR)/lib/saboteur.so
$(CONFORMANCE): $(CONFORMANCE_OBJ)
	$(call say,Linking,$@)mkdir -p $(@D)
	$(Q)$(link) $(CONFORMANCE_OBJ) $(LDLIBS)
# Its threads may only begin when it has been closed already.
$(SABOTEUR): $(SABOTEUR_OBJ)
	$(call say,Linking,$@)mkdir -p $(@D)
	$(Q)$(link) -shared -Wl,-soname,$(@F) -Wl,-z,nodelete $(SABOTEUR_OBJ) $(LDLIBS)
-include $(CONFORMANCE_OBJ:.o=.d) $(SABOTEUR_OBJ:.o=.d)
tests: $(if $(HAVE_NET),$(CONFORMANCE) $(SABOTEUR))
