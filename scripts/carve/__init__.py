"""The parts of carve_demo.py: its text, its student model, its training."""
