"""The fallbacks, one rule a file. Importing this package registers them."""

from offload.decide.fallbacks import (
    adapmoe,
    buddy,
    cache_prior,
    d2moe,
    deadline,
    edgemoe,
    fate,
    hobbit,
    moe_spec,
    none,
    resident_low,
)

__all__ = [
    "adapmoe",
    "buddy",
    "cache_prior",
    "d2moe",
    "deadline",
    "edgemoe",
    "fate",
    "hobbit",
    "moe_spec",
    "none",
    "resident_low",
]
