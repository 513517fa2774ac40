"""The schedulers, one rule a file. Importing this package registers them."""

from offload.decide.schedulers import auto, cpu_only, dali, gpu_only, hybrimoe, monde, optimal, ratio

__all__ = ["auto", "cpu_only", "dali", "gpu_only", "hybrimoe", "monde", "optimal", "ratio"]
