"""What published systems claim, each claim measured here: `scripts/papers.py` prints them beside each other.

One file for each kind of claim. A claim is a function of a workload, with the paper's words beside it.
"""
