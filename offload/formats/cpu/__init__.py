"""CPU kernels of the formats and what they need: C, Numba, threads."""
