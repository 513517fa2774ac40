"""Measured trials: `offload bench` and `offload tune`."""
