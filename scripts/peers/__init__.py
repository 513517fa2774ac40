"""Benchmarks beside other engines: the workers that drive each of them, and the files they need."""
