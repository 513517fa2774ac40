"""The built-in eviction policies, one algorithm a file. Importing this package registers all of them."""

from cache.policies import belady, belady_bypass, lfru, lfu, lru

__all__ = ["belady", "belady_bypass", "lfru", "lfu", "lru"]
