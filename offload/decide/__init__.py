"""Everything between a routing event and a plan. Torch-free: no tensor, no clock, no device lives here.

Every rule in this folder runs live and in replay alike.
"""
