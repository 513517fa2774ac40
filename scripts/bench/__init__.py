"""Benchmarks of this project, what they share, and the random checkpoints they run on; other engines are in peers/."""
