"""Which bytes on disk are what: the hub, headers, the skeleton, the mapping to experts, dequantising.

What the files around the weights say is read here, too: configurations and tokenizers.

Nothing here knows budgets or caches.
"""
