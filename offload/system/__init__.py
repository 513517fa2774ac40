"""The process and the operating system: sizes, paths, memory, interrupts, timing, progress.

Knows nothing of models. Imports `cache.errors` at most.
"""
