"""Last in, first out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.policies.fifo import FIFO
from cache.policy import register


@register
class LIFO(FIFO):
    """Evict the expert that was admitted last, of those that the running event does not need.

    An event admits its experts in touch order, by ascending weight; `expert-buffering` goes by the order in which a
    layer runs them. Source: folklore.
    """

    name = "lifo"

    def priorities(self, lanes: slice) -> NDArray[np.int64]:
        return -self.admitted[lanes]
