"""A Mixture of Experts trained from scratch: its text, its training, its int8 checkpoint and its trace."""
