"""Native CPU kernels: C++ under `csrc`, picked at run time by what the CPU can do."""
