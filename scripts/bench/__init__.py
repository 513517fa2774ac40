"""Benchmarks of this project, what they share, and the random checkpoints they run on; other engines are in peers/.

Run each by its path, from an environment where the project is installed.
"""
