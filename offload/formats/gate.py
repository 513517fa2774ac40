"""What experts do between their two products."""

from __future__ import annotations

import math
from typing import NamedTuple


class Gate(NamedTuple):
    """(up + plus) * gate * sigmoid(alpha * gate), element by element.

    Before that the gate is at most `limit`, and up lies between -limit and limit. The first matrix has the rows of the
    gate and of up in turn where they are `interleaved`, else all of the gate's first.
    """

    limit: float = math.inf
    alpha: float = 1.0
    plus: float = 0.0
    interleaved: bool = False


SILU = Gate()
"""The commonest: silu(gate) * up."""
