"""The demo model, built on first use."""
