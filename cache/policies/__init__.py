"""The built-in eviction policies, one algorithm a file. Importing this package registers all of them."""

from cache.policies import lfru, lfu, lru

__all__ = ["lfru", "lfu", "lru"]
