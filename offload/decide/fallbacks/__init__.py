"""The fallbacks, one rule a file. Importing this package registers them."""

from offload.decide.fallbacks import (
    adapmoe,
    buddy,
    cache_prior,
    deadline,
    edgemoe,
    hobbit,
    moe_spec,
    none,
    resident_low,
)

__all__ = ["adapmoe", "buddy", "cache_prior", "deadline", "edgemoe", "hobbit", "moe_spec", "none", "resident_low"]
