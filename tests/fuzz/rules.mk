# .npy of expert ids, as moe_perf reads it
FUZZ_npy_SRC += perf/moe/npy.cc
