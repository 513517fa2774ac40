"""From budgets and a model's headers to what goes where, and how much work a token is."""
