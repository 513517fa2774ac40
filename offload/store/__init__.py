"""Experts on disk, as the checkpoint has them or as converted records, and how they are read."""
