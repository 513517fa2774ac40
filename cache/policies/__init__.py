"""The built-in eviction policies, one algorithm a file. Importing this package registers all of them."""

from cache.policies import arc, belady, belady_bypass, fifo, lfru, lfu, lifo, lru, s3fifo, sieve, slru

__all__ = ["arc", "belady", "belady_bypass", "fifo", "lfru", "lfu", "lifo", "lru", "s3fifo", "sieve", "slru"]
