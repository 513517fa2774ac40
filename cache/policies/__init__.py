"""The built-in eviction policies, one algorithm a file. Importing this package registers all of them."""

from cache.policies import (
    belady,
    belady_bypass,
    edgemoe,
    finemoe,
    hobbit,
    least_stale,
    lfru,
    lfu,
    lru,
    moe_infinity,
    mrs,
    random,
    sch,
    static,
)

__all__ = [
    "belady",
    "belady_bypass",
    "edgemoe",
    "finemoe",
    "hobbit",
    "least_stale",
    "lfru",
    "lfu",
    "lru",
    "moe_infinity",
    "mrs",
    "random",
    "sch",
    "static",
]
