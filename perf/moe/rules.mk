# MPI's C interface is enough; the headers of its C++ one do not compile without warnings.
PERF_moe_CPP := $(if $(filter 1,$(MPI)),-DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX)
