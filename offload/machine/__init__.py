"""Measurements of a machine, for `offload profile`. The figures themselves are `offload/costs/`."""
