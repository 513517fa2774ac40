"""CPU kernels of the formats and what they need: C, threads, what the processor can do."""
