"""Last in, first out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.policies.fifo import FIFO
from cache.policy import register


@register
class LIFO(FIFO):
    """Evict the expert that was admitted last, of those that the running event does not need.

    For layers that run their experts in a fixed order: what was fetched last is what the next pass needs last. An event
    admits its experts in touch order. Source: expert buffering, Huang et al., arXiv 2303.06182, section VI.
    """

    name = "lifo"

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        return -self.admitted[lanes]
