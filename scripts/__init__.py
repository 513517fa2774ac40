"""What maintainers run from the repository: benchmarks, comparisons, the demo model's making, documentation checks."""
