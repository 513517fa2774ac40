"""The optimum for caches that need not keep what they fetch."""

from __future__ import annotations

from cache.policies.belady import Belady
from cache.policy import register


@register
class BeladyBypass(Belady):
    """Keep the experts whose next uses are nearest, be they resident or just fetched; offline.

    The fewest misses that any policy can have, for experts of one size that are fetched on demand. Sources: as for
    `belady`; bypassing as in Zhang, arXiv 2608.07911.
    """

    name = "belady-bypass"
    bypass = True
