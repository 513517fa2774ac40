"""Misses and bytes of every policy on the made-up trace, in golden.json. After an intended change:

    python tests/cache/golden.py

writes the table anew; its diff shows what the change did.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
SLOTS = (6, 8, 16, 24)
"""Experts a layer; a pool of all layers has as many for each of them."""


@cache
def traces() -> tuple[Any, Any]:
    """The made-up trace, and another to learn from."""
    from synthetic import zipf_markov

    return zipf_markov(), zipf_markov(21)


def shape() -> dict[str, Any]:
    """What golden.json should say of the trace."""
    from cache.counting.counting import count

    trace, _ = traces()
    (counted,) = count(trace, "lru", [[1]], pool="global")
    return {"trace": trace.fingerprint, "accesses": counted.accesses, "slots": list(SLOTS)}


def rows(name: str) -> dict[str, dict[str, list[int]]]:
    """What golden.json should say of a policy."""
    from cache.counting.counting import count
    from cache.policy import find_policy

    trace, profile = traces()
    layers = trace.num_layers
    found = {}
    for pool in ("layer", "global"):
        capacities = [[slots] * layers if pool == "layer" else [slots * layers] for slots in SLOTS]
        for cold in (True, False):
            learnt = profile if find_policy(name).learns else None
            counts = count(trace, name, capacities, pool=pool, cold=cold, profile=learnt)
            found[f"{pool}, {'cold' if cold else 'warm'}"] = {
                "misses": [c.misses for c in counts],
                "bytes": [c.misses * (trace.expert_bytes or 0) for c in counts],
            }
    return found


def main() -> None:
    """Write golden.json."""
    root = TABLE.parents[2]
    sys.path[:0] = [str(root), str(TABLE.parent)]
    from cache.policy import names

    lines = json.dumps({**shape(), "policies": {name: rows(name) for name in names()}}, indent=1)
    # One list a line.
    for _ in SLOTS:
        lines = lines.replace(",\n     ", ", ").replace("[\n     ", "[").replace("\n    ]", "]")
    TABLE.write_text(lines + "\n")


if __name__ == "__main__":
    main()
