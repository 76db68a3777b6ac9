# Builds, tests and installs the library.  `make help` lists the targets and the variables.

BUILDDIR   ?= build
PREFIX     ?= /usr/local
DESTDIR    ?=
DEBUG      ?= 0
WERROR     ?= 0
SANITIZE   ?=
V          ?= 0
DELAYS     ?= 0
MPI        ?= 0
MPI_HOME   ?= /usr/lib/x86_64-linux-gnu/openmpi
PKG_CONFIG ?= pkg-config
CLANGXX    ?= $(firstword $(shell command -v clang++-14 clang++ 2>/dev/null) clang++)
CUDA_HOME  ?= $(firstword $(wildcard /usr/local/cuda /usr/lib/cuda))
NVCC       ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null))
NCCL_HOME  ?=
NVCC_GENCODE ?= -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 \
                -gencode=arch=compute_100,code=sm_100 -gencode=arch=compute_100,code=compute_100
FUZZ_SECONDS ?= 10

MAJOR := $(shell sed -n 's/^.define NCCL_MOE_MAJOR \([0-9]*\)/\1/p' include/nccl_moe.h)
MINOR := $(shell sed -n 's/^.define NCCL_MOE_MINOR \([0-9]*\)/\1/p' include/nccl_moe.h)
PATCH := $(shell sed -n 's/^.define NCCL_MOE_PATCH \([0-9]*\)/\1/p' include/nccl_moe.h)
VERSION := $(MAJOR).$(MINOR).$(PATCH)

# ------------------------------------------------------------------------------------------------ what is there ----
# The CUDA part is built where nvcc, cuda_runtime.h and nccl.h are found, the network part where hwloc and the verbs
# headers are.
CUDA_INC   := $(if $(CUDA_HOME),$(CUDA_HOME)/include)
NCCL_INC   := $(if $(NCCL_HOME),$(NCCL_HOME)/include)
CUDA_CPP   := $(if $(NCCL_INC),-isystem $(NCCL_INC)) $(if $(CUDA_INC),-isystem $(CUDA_INC))
hasHeaders  = $(shell printf '\#include <%s>\n' $(1) | $(CXX) -E -x c++ $(2) - >/dev/null 2>&1 && echo 1)
HAVE_CUDA  := $(if $(NVCC),$(call hasHeaders,cuda_runtime.h nccl.h,$(CUDA_CPP)))
CUDA_LIBDIR := $(if $(HAVE_CUDA),$(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib)))
NCCL_LIB   := $(if $(NCCL_HOME),-L$(NCCL_HOME)/lib) -lnccl
# Examples for GPUs need libraries that nothing else is linked with.
HAVE_CUBLAS := $(and $(HAVE_CUDA),$(call hasHeaders,cublas_v2.h,$(CUDA_CPP)),$(shell echo 'int main() {}' | \
                 $(CXX) -x c++ - -o /dev/null -L$(CUDA_LIBDIR) $(NCCL_LIB) -lcublas 2>/dev/null && echo 1))
HAVE_NET   := $(and $(shell $(PKG_CONFIG) --exists hwloc 2>/dev/null && echo 1),$(call hasHeaders,infiniband/verbs.h))

# -------------------------------------------------------------------------------------------------------- flags ----
BASE_CPP   := -Iinclude -Isrc $(if $(filter 1,$(HAVE_CUDA)),$(CUDA_CPP),-DNCCL_MOE_NO_CUDA)
OPT        := $(if $(filter 1,$(DEBUG)),-O0,$(if $(SANITIZE),-O1,-O3))
CXXSTD     := -std=c++17 -fPIC -fvisibility=hidden -pthread -ffp-contract=off -Wall -Wextra
# A sanitizer's report needs functions and lines alone, and compiles a fifth sooner so.
override CXXFLAGS += $(CXXSTD) $(OPT) $(if $(SANITIZE),-g1,-g)
override CFLAGS   += -std=c99 -pedantic -Wall -Wextra -g
override LDFLAGS  += -pthread
override LDLIBS   += -ldl -lrt
NVFLAGS    := -std=c++17 $(NVCC_GENCODE) $(if $(filter 1,$(DEBUG)),-O0 -g,-O3) $(if $(filter 1,$(DELAYS)),-DMOE_DELAYS) \
              -lineinfo -Xptxas -v --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wno-unused-parameter
ifneq ($(SANITIZE),)
  # Of a loaded library's thread-local storage that happens to lie 16 bytes behind a page, gcc 12's leak checker takes what
  # stands before it for a header, and crashes; with this model the storage lies elsewhere.
  override CXXFLAGS += -fsanitize=$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer -ftls-model=initial-exec
endif
ifeq ($(WERROR),1)
  WERROR_C  := -Werror
  WERROR_NV := --Werror all-warnings -Xcompiler -Werror
endif
ifeq ($(HAVE_CUDA),1)
  CUDA_LIBS := -L$(CUDA_LIBDIR) -lcudart_static
endif
ifeq ($(MPI),1)
  MPI_CPP  := -DMOE_MPI -I$(MPI_HOME)/include
  MPI_LIBS := -L$(MPI_HOME)/lib -lmpi
endif
HWLOC_CPP  := $(if $(HAVE_NET),$(shell $(PKG_CONFIG) --cflags hwloc))
GTEST_LIBS := -lgtest_main -lgmock -lgtest
RPATH      := -Wl,-rpath,'$$ORIGIN/../lib'

ifeq ($(V),1)
  say =
  Q   =
else
  say = @printf '%-11s %s\n' '$(1)' '$(2)';
  Q   = @
endif

# ------------------------------------------------------------------------------------------------------ sources ----
obj = $(patsubst %,$(BUILDDIR)/obj/%.o,$(1))
src = $(sort $(foreach d,$(1),$(wildcard $(d)/*.cc $(if $(filter 1,$(HAVE_CUDA)),$(d)/*.cu))))

LIB_SRC  := $(call src,src/base src/api src/comm src/routing src/host $(if $(filter 1,$(HAVE_CUDA)),src/device))
NET_SRC  := $(if $(HAVE_NET),$(call src,src/net))
PLUG_SRC := $(if $(HAVE_NET),$(call src,plugin))
# The library has a CUDA part, or says that it has none.
LIB_SRC  := $(filter-out $(if $(filter src/device/%,$(LIB_SRC)),src/api/no_cuda.cc),$(LIB_SRC))
LIB_OBJ  := $(call obj,$(LIB_SRC))
NET_OBJ  := $(call obj,$(NET_SRC))
SONAME   := libmoenccl.so.$(MAJOR)
LIB      := $(BUILDDIR)/lib/libmoenccl.so.$(VERSION)
STATIC   := $(BUILDDIR)/lib/libmoenccl_static.a
PLUGIN   := $(if $(PLUG_SRC),$(BUILDDIR)/lib/libnccl-net-moe.so)
HEADERS  := $(BUILDDIR)/include/nccl_moe.h
PC       := $(BUILDDIR)/lib/pkgconfig/moenccl.pc

# tests/<area>/ is one GoogleTest binary, perf/<x>/ one perf binary, tests/fuzz/<name>_fuzz.cc one fuzz target.
# A rules.mk in a folder of theirs may set TEST_<area>_{SRC,CPP,LIBS}, PERF_<x>_{SRC,CPP,LIBS} or
# FUZZ_<name>_{SRC,LIBS} (more sources such as perf/moe/npy.cc, flags, libraries), or hold rules of its own.
.DEFAULT_GOAL := all
-include $(wildcard tests/*/rules.mk perf/*/rules.mk)
dirs      = $(sort $(patsubst $(1)/%/,%,$(dir $(foreach f,$(wildcard $(1)/*/*.cc $(1)/*/*.cu),$(f)))))
AREAS    := $(filter unit api host $(if $(filter 1,$(HAVE_CUDA)),gpu) $(if $(HAVE_NET),net verbs plugin),$(call dirs,tests))
PERFS    := $(filter-out $(if $(HAVE_NET),,net),$(call dirs,perf))
TESTS    := $(AREAS:%=$(BUILDDIR)/bin/test_%)
PERF     := $(PERFS:%=$(BUILDDIR)/bin/%_perf)
EXAMPLES := $(patsubst examples/%/main.cc,%,$(wildcard examples/*/main.cc))
EXAMPLES_CUDA := $(if $(HAVE_CUBLAS),$(patsubst examples/%/main.cu,%,$(wildcard examples/*/main.cu)))
FUZZERS  := $(patsubst tests/fuzz/%_fuzz.cc,%,$(wildcard tests/fuzz/*_fuzz.cc))
COMMON   := $(call obj,$(call src,tests/common))

.PHONY: all lib plugin perf tests examples check test demo lint format sanitize fuzz fuzzers install clean help setup
.DELETE_ON_ERROR:
.SUFFIXES:

all: lib plugin perf
ifneq ($(HAVE_CUDA),1)
	@echo "note: built without the CUDA part (nvcc, cuda_runtime.h or nccl.h not found; see CUDA_HOME and NCCL_HOME)"
endif
ifeq ($(HAVE_CUDA)$(HAVE_CUBLAS),1)
	@echo "note: examples for GPUs cannot be built (libnccl.so or cuBLAS not found)"
endif
ifeq ($(HAVE_NET),)
	@echo "note: built without the network plugin (hwloc or infiniband/verbs.h not found; see scripts/packages.txt)"
endif
lib: $(LIB) $(STATIC) $(HEADERS) $(PC)
plugin: $(PLUGIN)
perf: $(PERF)
tests: $(TESTS)
examples: $(EXAMPLES:%=$(BUILDDIR)/bin/%) $(EXAMPLES_CUDA:%=$(BUILDDIR)/bin/%)

# ---------------------------------------------------------------------------------------------------- compiling ----
# Objects depend on the flags they were compiled with: a change of SANITIZE, DEBUG, NVCC_GENCODE ... recompiles.
# -Werror is left out, for it changes no object.
$(shell mkdir -p $(BUILDDIR)/obj)
define flagsFile # file, contents
$(shell printf '%s\n' '$(subst ','\'',$(2))' | cmp -s - $(1) || printf '%s\n' '$(subst ','\'',$(2))' > $(1))
endef
$(call flagsFile,$(BUILDDIR)/obj/cxx.flags,$(CXX) $(CC) $(BASE_CPP) $(CPPFLAGS) $(CXXFLAGS) $(MPI_CPP))
$(call flagsFile,$(BUILDDIR)/obj/nvcc.flags,$(NVCC) $(BASE_CPP) $(CPPFLAGS) $(NVFLAGS))

compile = $(CXX) $(BASE_CPP) $(EXTRA_CPP) $(CPPFLAGS) $(CXXFLAGS) $(WERROR_C) -MMD -MP -c $< -o $@
$(BUILDDIR)/obj/%.cc.o: %.cc $(BUILDDIR)/obj/cxx.flags
	$(call say,Compiling,$<)mkdir -p $(@D)
	$(Q)$(compile)
$(BUILDDIR)/obj/%.c.o: %.c $(BUILDDIR)/obj/cxx.flags
	$(call say,Compiling,$<)mkdir -p $(@D)
	$(Q)$(CC) $(BASE_CPP) $(EXTRA_CPP) $(CPPFLAGS) $(CFLAGS) $(WERROR_C) -MMD -MP -c $< -o $@
$(BUILDDIR)/obj/%.cu.o: %.cu $(BUILDDIR)/obj/nvcc.flags
	$(call say,Compiling,$<)mkdir -p $(@D)
	$(Q)$(NVCC) $(BASE_CPP) $(EXTRA_CPP) $(CPPFLAGS) $(NVFLAGS) $(WERROR_NV) -MMD -MP -MF $(@:.o=.d) -c $< -o $@ \
	  > $@.ptxas 2>&1 || { grep -v 'ptxas info' $@.ptxas >&2; exit 1; }
	$(Q)grep -v -e 'ptxas info' -e 'bytes stack frame' $@.ptxas || true

$(BUILDDIR)/obj/tests/%.o: EXTRA_CPP = -I. -Itests $(HWLOC_CPP) $(TEST_$(word 2,$(subst /, ,$*))_CPP)
$(BUILDDIR)/obj/perf/%.o: EXTRA_CPP = -I. -Iperf $(MPI_CPP) $(HWLOC_CPP) $(PERF_$(word 2,$(subst /, ,$*))_CPP)
$(BUILDDIR)/obj/src/net/%.o $(BUILDDIR)/obj/plugin/%.o: EXTRA_CPP = $(HWLOC_CPP)
# Optimising tests takes longer than it saves; what they share has loops that it pays for.
$(BUILDDIR)/obj/tests/%.cc.o: OPT = $(if $(filter 1,$(DEBUG)),-O0,-O1)
$(BUILDDIR)/obj/tests/%_test.cc.o: OPT = -O0

# ------------------------------------------------------------------------------------------------------ linking ----
link = $(CXX) $(CXXFLAGS) $(LDFLAGS) -o $@

$(LIB): $(LIB_OBJ) src/libmoenccl.map
	$(call say,Linking,$@)mkdir -p $(@D)
	$(Q)$(link) -shared -Wl,-soname,$(SONAME) -Wl,--version-script=src/libmoenccl.map -Wl,-z,defs $(LIB_OBJ) $(CUDA_LIBS) $(LDLIBS)
	$(Q)ln -sf $(notdir $@) $(@D)/$(SONAME)
	$(Q)ln -sf $(SONAME) $(@D)/libmoenccl.so
$(STATIC): $(LIB_OBJ)
	$(call say,Archiving,$@)mkdir -p $(@D)
	$(Q)rm -f $@
	$(Q)ar rcs $@ $(LIB_OBJ)

PLUG_OBJ := $(call obj,$(PLUG_SRC) $(NET_SRC) $(call src,src/base))
$(BUILDDIR)/lib/libnccl-net-moe.so: $(PLUG_OBJ) plugin/libnccl-net-moe.map
	$(call say,Linking,$@)mkdir -p $(@D)
	$(Q)$(link) -shared -Wl,-soname,$(@F) -Wl,--version-script=plugin/libnccl-net-moe.map -Wl,-z,nodelete -Wl,-z,defs \
	  $(PLUG_OBJ) $(LDLIBS)

# Tests reach internals through the static library; dlopen finds the shared ones by their bare names.
define testRule # area
TEST_$(1)_OBJ := $(call obj,$(call src,tests/$(1)) $(TEST_$(1)_SRC)) $(COMMON) $(if $(filter net verbs,$(1)),$(NET_OBJ))
$(BUILDDIR)/bin/test_$(1): $$(TEST_$(1)_OBJ) $(STATIC) | $(if $(filter plugin,$(1)),$(PLUGIN)) $(if $(filter verbs,$(1)),$(FAKEVERBS)) $(LIB)
	$$(call say,Linking,$$@)mkdir -p $$(@D)
	$$(Q)$$(link) $$(RPATH) $$(TEST_$(1)_OBJ) $(STATIC) $(GTEST_LIBS) \
	  $(TEST_$(1)_LIBS) $(CUDA_LIBS) $(LDLIBS)
endef
$(foreach a,$(AREAS),$(eval $(call testRule,$(a))))

define perfRule # name
PERF_$(1)_OBJ := $(call obj,$(call src,perf/$(1)) $(PERF_$(1)_SRC)) \
                 $(if $(filter net,$(1)),$(NET_OBJ) $(call obj,$(call src,src/base)))
$(BUILDDIR)/bin/$(1)_perf: $$(PERF_$(1)_OBJ) $(LIB)
	$$(call say,Linking,$$@)mkdir -p $$(@D)
	$$(Q)$$(link) $$(RPATH) $$(PERF_$(1)_OBJ) $(if $(filter net,$(1)),,-L$(BUILDDIR)/lib -lmoenccl) \
	  $(PERF_$(1)_LIBS) $(CUDA_LIBS) $(MPI_LIBS) $(LDLIBS)
endef
$(foreach p,$(PERFS),$(eval $(call perfRule,$(p))))

# Examples see what an installed library offers, and no more.
$(EXAMPLES:%=$(BUILDDIR)/bin/%): $(BUILDDIR)/bin/%: examples/%/main.cc $(LIB) $(HEADERS)
	$(call say,Compiling,$<)mkdir -p $(@D)
	$(Q)$(CXX) -std=c++17 -Wall -Wextra $(WERROR_C) $(if $(SANITIZE),-fsanitize=$(SANITIZE)) -I$(BUILDDIR)/include \
	  $(if $(filter 1,$(HAVE_CUDA)),$(CUDA_CPP),-DNCCL_MOE_NO_CUDA) $< -o $@ $(RPATH) -L$(BUILDDIR)/lib -lmoenccl -pthread
# Those for GPUs are nvcc's, and linked with NCCL and cuBLAS.
$(EXAMPLES_CUDA:%=$(BUILDDIR)/bin/%): $(BUILDDIR)/bin/%: $(wildcard examples/*/*) $(LIB) $(HEADERS)
	$(call say,Compiling,examples/$*)mkdir -p $(@D)
	$(Q)$(NVCC) -std=c++17 $(NVCC_GENCODE) --threads 2 -O2 -Xcompiler -Wall,-Wextra $(WERROR_NV) -I$(BUILDDIR)/include \
	  $(CUDA_CPP) $(wildcard examples/$*/*.cu examples/$*/*.cc) -o $@ -Xlinker -rpath='$$ORIGIN/../lib',-rpath=$(CUDA_LIBDIR) \
	  -L$(BUILDDIR)/lib -lmoenccl $(NCCL_LIB) -lcublas

$(BUILDDIR)/include/%.h: include/%.h
	$(Q)mkdir -p $(@D)
	$(Q)cp $< $@

# ------------------------------------------------------------------------------------------------------ fuzzing ----
# Built by clang, from objects of their own, without CUDA.
FUZZ_CXX = $(CLANGXX) -Iinclude -Isrc -I. -DNCCL_MOE_NO_CUDA $(HWLOC_CPP) $(CXXSTD) $(WERROR_C) -O1 -g \
           -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_LIB := $(patsubst %,$(BUILDDIR)/fuzz/%.o,$(filter-out src/device/% %.cu,$(LIB_SRC)) $(NET_SRC))
$(BUILDDIR)/fuzz/%.cc.o: %.cc
	$(call say,Fuzz-build,$<)mkdir -p $(@D)
	$(Q)$(FUZZ_CXX) -fsanitize=fuzzer-no-link -MMD -MP -c $< -o $@
$(BUILDDIR)/fuzz/libmoenccl.a: $(FUZZ_LIB)
	$(Q)rm -f $@
	$(Q)ar rcs $@ $(FUZZ_LIB)
define fuzzRule # name
FUZZ_$(1)_OBJ := $(patsubst %,$(BUILDDIR)/fuzz/%.o,tests/fuzz/$(1)_fuzz.cc $(FUZZ_$(1)_SRC))
$(BUILDDIR)/bin/fuzz_$(1): $$(FUZZ_$(1)_OBJ) $(BUILDDIR)/fuzz/libmoenccl.a
	$$(call say,Linking,$$@)mkdir -p $$(@D)
	$$(Q)$$(FUZZ_CXX) -fsanitize=fuzzer -o $$@ $$(FUZZ_$(1)_OBJ) $(BUILDDIR)/fuzz/libmoenccl.a \
	  $(FUZZ_$(1)_LIBS) $(LDLIBS)
endef
$(foreach f,$(FUZZERS),$(eval $(call fuzzRule,$(f))))
fuzzers: $(FUZZERS:%=$(BUILDDIR)/bin/fuzz_%)
fuzz: fuzzers
	scripts/fuzz $(BUILDDIR) $(FUZZ_SECONDS) $(FUZZERS)

# ------------------------------------------------------------------------------------------- tests and the rest ----
check: all tests
	scripts/run-tests $(if $(TESTS),'$(BUILDDIR)/bin/test_*')
test: setup
	scripts/test-all
demo: setup
	$(MAKE) $(if $(filter -j%,$(MAKEFLAGS)),,-j$(shell nproc)) all
	scripts/demo
setup:
	@scripts/setup
lint:
	scripts/format --check
	scripts/lint
format:
	scripts/format
sanitize:
	scripts/test-all asan tsan

# ----------------------------------------------------------------------------------------------------- installing ----
define PC_TEXT
prefix=$(PREFIX)
libdir=$${prefix}/lib
includedir=$${prefix}/include

Name: moenccl
Description: MoE dispatch and combine on NCCL communicators and on host memory
Version: $(VERSION)
Libs: -L$${libdir} -lmoenccl
Libs.private: $(CUDA_LIBS) $(LDLIBS) -pthread -lstdc++
Cflags: -I$${includedir}
endef
export PC_TEXT
.PHONY: FORCE
$(PC): FORCE
	$(Q)mkdir -p $(@D)
	$(Q)echo "$$PC_TEXT" | cmp -s - $@ || echo "$$PC_TEXT" > $@
install: all
	install -d $(DESTDIR)$(PREFIX)/lib/pkgconfig $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/bin
	install -m 644 $(HEADERS) $(DESTDIR)$(PREFIX)/include
	install -m 644 $(STATIC) $(DESTDIR)$(PREFIX)/lib
	install -m 755 $(LIB) $(PLUGIN) $(DESTDIR)$(PREFIX)/lib
	ln -sf $(notdir $(LIB)) $(DESTDIR)$(PREFIX)/lib/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(PREFIX)/lib/libmoenccl.so
	install -m 644 $(PC) $(DESTDIR)$(PREFIX)/lib/pkgconfig
	$(if $(PERF),install -m 755 $(PERF) $(DESTDIR)$(PREFIX)/bin)

clean:
	rm -rf $(BUILDDIR)

define HELP
Targets
  all        the library, the network plugin and the perf binaries, under $$(BUILDDIR)/{lib,include,bin} (default)
  demo       sets up, builds, and runs dispatch and combine on real text over 4 ranks of this machine
  test       sets up, builds, and runs every test and check (what CI runs; 25 minutes on 2 idle cores)
  plugin perf tests examples   builds these alone; build/bin/net_conformance: the plugin's conformance cases
  check      builds and runs the test binaries only
  test-fake  the plugin on the fake verbs library;  test-rdma: over Soft-RoCE in a virtual machine
  fuzz       runs every fuzz target for FUZZ_SECONDS
  sanitize   builds and runs the host tests under address+undefined and thread sanitizers
  lint       clang-format check and clang-tidy;  format: rewrites the files
  install    into $$(DESTDIR)$$(PREFIX);  clean: removes $$(BUILDDIR)
Variables
  CUDA_HOME NCCL_HOME NVCC NVCC_GENCODE   the CUDA part; without nvcc or nccl.h the host part is built
  CXX CC CLANGXX CXXFLAGS CPPFLAGS LDFLAGS BUILDDIR PREFIX DESTDIR
  DELAYS=1 (latency mode's kernels wait in random places, for tests)
  DEBUG=1  WERROR=1  V=1 (show commands)  SANITIZE=address,undefined|thread  MPI=1 MPI_HOME=...  FUZZ_SECONDS=10
endef
export HELP
help:
	@echo "$$HELP"

ALL_OBJ := $(LIB_OBJ) $(PLUG_OBJ) $(COMMON) $(foreach a,$(AREAS),$(TEST_$(a)_OBJ)) $(foreach p,$(PERFS),$(PERF_$(p)_OBJ)) \
           $(FUZZ_LIB) $(foreach f,$(FUZZERS),$(FUZZ_$(f)_OBJ))
-include $(sort $(ALL_OBJ:.o=.d))
