"""What of a model is loaded or replaced that is no expert: dense weights, linear layers, the embedding, hooks."""
