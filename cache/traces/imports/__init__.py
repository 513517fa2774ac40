"""Traces made of what other programs logged: one file a format, and what they have in common.

No pickle is ever read: it could run any program.
"""
