"""Recorded routing traces: the file, its checks, passes, and what a trace says."""
