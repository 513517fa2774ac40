"""The built-in quotas, one rule a file. Importing this package registers all of them."""

from cache.quotas import distinct, dp, even, plec, shallow

__all__ = ["distinct", "dp", "even", "plec", "shallow"]
