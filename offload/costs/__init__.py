"""What a machine was measured to do, as data, and the seconds that gives. Torch-free.

Measuring itself lives in `offload/machine/`.
"""
