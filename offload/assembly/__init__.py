"""Where the parts of a model are put together, and what happens around its passes; no decisions, no arithmetic."""
