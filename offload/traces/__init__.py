"""Traces recorded from a running model, and played into one."""
