"""Published claims beside what this project measures of the same: prints docs/papers.md's tables.

    python scripts/papers.py --trace gpt-oss=T.safetensors --trace mixture=M.safetensors [--machine M] [--only Fate]

Every claim is measured on every trace that can say something of it. Nothing is measured live.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import groupby
from pathlib import Path

from cache.errors import OffloadError
from offload.costs.stock import find_machine
from offload.system.progress import progress_bar
from scripts.claims.claim import Claim, claims
from scripts.claims.workloads import Workload


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="append", required=True, metavar="NAME=FILE", help="any number of them")
    parser.add_argument("--machine", default="a6000-workstation", metavar="M", help="a name, or a profile's file")
    parser.add_argument("--only", metavar="SYSTEM", help="claims of one system")
    parser.add_argument("--tokens", type=int, default=Workload.tokens, help="of each trace, at most")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each claim")
    return parser.parse_args()


def main() -> None:
    options = parse()
    chosen = [each for each in claims() if options.only in (None, each.system)]
    if not chosen:
        raise SystemExit(
            f"no claim is of {options.only}: choose one of {', '.join(sorted({c.system for c in claims()}))}"
        )
    machine = find_machine(options.machine)
    with tempfile.TemporaryDirectory() as folder:
        named = [each.partition("=") for each in options.trace]
        works = [Workload(name, Path(path), Path(folder), machine, options.tokens) for name, _, path in named]
        found: dict[int, dict[str, str]] = {}
        with progress_bar("claims", len(chosen) * len(works)) as bar:
            for number, each in enumerate(chosen):
                found[number] = {}
                for work in works:
                    found[number][work.name] = measured(each, work)
                    bar.advance()
    if options.json:
        for number, each in enumerate(chosen):
            print(json.dumps({"system": each.system, "source": each.source, "claim": each.what, **found[number]}))
    else:
        print(tables(chosen, found, [work.name for work in works]))


def measured(each: Claim, work: Workload) -> str:
    """What a claim says of a workload, or why it cannot."""
    try:
        return each.measure(work) or "-"
    except OffloadError as error:
        return f"({error})"


def tables(chosen: list[Claim], found: dict[int, dict[str, str]], works: list[str]) -> str:
    """A section for each system, as Markdown."""
    lines: list[str] = []
    for (system, source), numbers in groupby(range(len(chosen)), lambda n: (chosen[n].system, chosen[n].source)):
        lines += [f"## {system}", "", f"arXiv {source}", ""]
        for number in numbers:
            each = chosen[number]
            lines += [f"**{each.what[0].upper()}{each.what[1:]}.**", ""]
            lines += ["|  |  |", "|---|---|", f"| theirs | {each.theirs} |", f"| ours | {each.ours} |"]
            lines += [f"| {name} | {found[number][name]} |" for name in works]
            lines += [f"| why | {each.why} |"] if each.why else []
            lines += [f"| command | `{each.command}` |"] if each.command else []
            lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
