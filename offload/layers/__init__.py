"""What of a model is replaced that is no expert: linear layers, the embedding, hooks on routers."""
