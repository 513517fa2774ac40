"""How the demo model was made: its text, its student model, its training."""
