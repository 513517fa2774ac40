"""Triton kernels of one format each."""
