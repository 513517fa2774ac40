"""The prefetch rules, one rule a file. Importing this package registers them."""

from offload.decide.prefetchers import fate, finemoe, hobbit, hybrimoe, known, moe_infinity, ours, ring, speculative

__all__ = ["fate", "finemoe", "hobbit", "hybrimoe", "known", "moe_infinity", "ours", "ring", "speculative"]
