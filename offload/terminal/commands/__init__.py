"""The commands of `offload`, one a file, as plain functions; `offload/terminal/app.py` registers them."""
