"""A recorded trace through `offload/decide/` under a simulated clock. Torch-free."""
