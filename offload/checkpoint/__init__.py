"""Which bytes on disk are what: the hub, headers, the skeleton, the mapping to experts, dequantising.

Nothing here knows budgets or caches.
"""
