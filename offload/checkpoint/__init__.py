"""Which bytes on disk are what: headers, the skeleton, the mapping to experts, dequantising.

`hub/` finds the files, and `config/` reads those around the weights. Nothing here knows budgets or caches.
"""
