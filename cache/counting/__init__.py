"""Counting replay: every capacity and sequence at once, without a clock."""
