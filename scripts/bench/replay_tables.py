"""Rows of `offload replay --json` as a Markdown table: hit rate and gap closed of every policy at every capacity.

python scripts/bench/replay_tables.py ROWS.json...    one table a file, policies by hit rate at the middle capacity
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """`rows` of one trace and setting as Markdown: hit rate (gap closed to Belady; of those that bypass, to Belady
    with bypass)."""
    capacities = list(dict.fromkeys(row["capacity"] for row in rows))
    by_policy: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_policy.setdefault(_label(row), {})[row["capacity"]] = row
    middle = capacities[len(capacities) // 2]
    lines = [f"| policy | {' | '.join(capacities)} |", f"|---|{'---|' * len(capacities)}"]
    for label, here in sorted(by_policy.items(), key=lambda item: -item[1][middle]["hits"]):
        lines.append(f"| {label} | {' | '.join(_cell(here[capacity]) for capacity in capacities)} |")
    return "\n".join(lines)


def _label(row: Row) -> str:
    marks = ["offline"] if not row["causal"] else []
    marks += ["bypass"] if row["admission"] == "bypass" else []
    marks += ["trained"] if row["profile"] else []
    return f"`{row['policy']}`" + (f" ({', '.join(marks)})" if marks else "")


def _cell(row: Row) -> str:
    gap = row["gap_closed_bypass" if row["admission"] == "bypass" else "gap_closed"]
    return f"{row['hit_rate']:.4f}" + ("" if gap is None else f" ({gap:.0%})")


def main(arguments: list[str]) -> None:
    """Print a table for each file."""
    for name in arguments:
        rows = json.loads(Path(name).read_text(encoding="utf-8"))
        first = rows[0]
        mode = f"{first['pool']} pool, {'warm' if first['warm'] else 'cold'}, {first['accesses']:,} accesses"
        print(f"{Path(first['trace']).name}, {mode}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
