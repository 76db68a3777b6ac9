# Builds, tests and installs the library.  `make help` lists the targets and the variables.

BUILDDIR   ?= build
PREFIX     ?= /usr/local
DEBUG      ?= 0
WERROR     ?= 0
SANITIZE   ?=
MPI        ?= 0
MPI_HOME   ?= /usr/lib/x86_64-linux-gnu/openmpi
CXX        ?= g++
CC         ?= gcc
CUDA_HOME  ?= $(firstword $(wildcard /usr/local/cuda /usr/lib/cuda))
NVCC       ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null))
NCCL_HOME  ?=
NVCC_GENCODE ?= -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 \
                -gencode=arch=compute_100,code=sm_100 -gencode=arch=compute_100,code=compute_100

MAJOR := $(shell sed -n 's/^.define NCCL_MOE_MAJOR \([0-9]*\)/\1/p' include/nccl_moe.h)
MINOR := $(shell sed -n 's/^.define NCCL_MOE_MINOR \([0-9]*\)/\1/p' include/nccl_moe.h)
PATCH := $(shell sed -n 's/^.define NCCL_MOE_PATCH \([0-9]*\)/\1/p' include/nccl_moe.h)
VERSION := $(MAJOR).$(MINOR).$(PATCH)

# The CUDA part is built where nvcc, cuda_runtime.h and nccl.h are found.
CUDA_INC  := $(if $(CUDA_HOME),$(CUDA_HOME)/include)
NCCL_INC  := $(if $(NCCL_HOME),$(NCCL_HOME)/include)
HAVE_CUDA := $(shell [ -n "$(NVCC)" ] && echo '\#include <cuda_runtime.h>|\#include <nccl.h>' | tr '|' '\n' | \
               $(CXX) -E -x c++ $(if $(NCCL_INC),-I$(NCCL_INC)) $(if $(CUDA_INC),-isystem $(CUDA_INC)) - >/dev/null 2>&1 && echo 1)

CPPFLAGS += -Iinclude -Isrc
CXXFLAGS += -std=c++17 -fPIC -fvisibility=hidden -pthread -ffp-contract=off -Wall -Wextra -MMD -MP
CFLAGS   += -std=c99 -pedantic -Wall -Wextra -MMD -MP
LDFLAGS  += -pthread
LDLIBS   += -ldl -lrt
ifeq ($(DEBUG),1)
  CXXFLAGS += -O0 -g
  NVFLAGS  += -O0 -g -lineinfo
else
  CXXFLAGS += -O3 -g
  NVFLAGS  += -O3 -lineinfo
endif
ifeq ($(WERROR),1)
  CXXFLAGS += -Werror
  CFLAGS   += -Werror
endif
ifneq ($(SANITIZE),)
  CXXFLAGS += -fsanitize=$(SANITIZE) -fno-omit-frame-pointer
  LDFLAGS  += -fsanitize=$(SANITIZE)
endif
ifeq ($(HAVE_CUDA),1)
  CPPFLAGS += $(if $(NCCL_INC),-isystem $(NCCL_INC)) -isystem $(CUDA_INC)
  NVFLAGS  += -std=c++17 $(NVCC_GENCODE) -Iinclude -Isrc $(if $(NCCL_INC),-I$(NCCL_INC)) -Xcompiler -fPIC,-fvisibility=hidden,-Wall \
              -Xptxas -v --threads 2 -MMD -MP
  CUDA_LIBS := -L$(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib)) -lcudart_static
else
  CPPFLAGS += -DNCCL_MOE_NO_CUDA
endif

LIB_CC  := $(sort $(wildcard src/base/*.cc src/api/*.cc src/comm/*.cc src/routing/*.cc src/host/*.cc))
LIB_CU  :=
ifeq ($(HAVE_CUDA),1)
  LIB_CC += $(sort $(wildcard src/device/*.cc))
  LIB_CU += $(sort $(wildcard src/device/*.cu))
endif
obj = $(patsubst %,$(BUILDDIR)/obj/%.o,$(1))
LIB_OBJ := $(call obj,$(LIB_CC) $(LIB_CU))
HEADERS := $(BUILDDIR)/include/nccl_moe.h
SONAME  := libmoenccl.so.$(MAJOR)
LIB     := $(BUILDDIR)/lib/libmoenccl.so.$(VERSION)
STATIC  := $(BUILDDIR)/lib/libmoenccl_static.a

.PHONY: all lib help
all: lib
ifneq ($(HAVE_CUDA),1)
	@echo "note: built without the CUDA part (nvcc, cuda_runtime.h or nccl.h not found; see CUDA_HOME and NCCL_HOME)"
endif
lib: $(LIB) $(STATIC) $(HEADERS)

$(BUILDDIR)/obj/%.cc.o: %.cc
	@mkdir -p $(@D)
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) -c $< -o $@
$(BUILDDIR)/obj/%.c.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -c $< -o $@
$(BUILDDIR)/obj/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) $(NVFLAGS) -c $< -o $@ 2> $@.ptxas || { cat $@.ptxas >&2; exit 1; }

$(LIB): $(LIB_OBJ) src/libmoenccl.map
	@mkdir -p $(@D)
	$(CXX) -shared $(CXXFLAGS) $(LDFLAGS) -Wl,-soname,$(SONAME) -Wl,--version-script=src/libmoenccl.map -Wl,-z,defs \
	  -o $@ $(LIB_OBJ) $(CUDA_LIBS) $(LDLIBS)
	ln -sf $(notdir $@) $(@D)/$(SONAME)
	ln -sf $(SONAME) $(@D)/libmoenccl.so
$(STATIC): $(LIB_OBJ)
	@mkdir -p $(@D)
	rm -f $@
	ar rcs $@ $(LIB_OBJ)
$(BUILDDIR)/include/%.h: include/%.h
	@mkdir -p $(@D)
	cp $< $@

-include $(LIB_OBJ:.o=.d)
