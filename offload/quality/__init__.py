"""What lossy choices cost in quality, and calibrations that choices go by."""
