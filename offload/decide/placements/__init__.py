"""What lies where before the first token, one rule a file. Importing this package registers them."""

from offload.decide.placements import empty, popular, random

__all__ = ["empty", "popular", "random"]
