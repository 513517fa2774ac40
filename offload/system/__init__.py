"""The process and the operating system: sizes, paths, memory, files, processes, messages, text, timing, progress.

Knows nothing of models. Imports `cache.errors` and `cache.registry` at most.
"""
