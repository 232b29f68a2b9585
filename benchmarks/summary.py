"""The README's table of results, made from what the benches wrote: no figure in it is entered by hand.

    python benchmarks/summary.py             writes it between the two markers of README.md
    python benchmarks/summary.py --print     shows it

Rows whose bench has not run are left out. A test compares the README with what this makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: benchmarks/summary.py -->\n", "<!-- end of results -->\n"

Entry = dict[str, Any]


def entries(name: str) -> list[Entry]:
    """Rows of a bench in the order in which they were measured."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def newest(rows: list[Entry], *keys: str) -> dict[tuple[Any, ...], Entry]:
    return {tuple(row[key] for key in keys): row for row in rows}


def table() -> Iterator[str]:
    yield "| what | result | measured |"
    yield "| --- | --- | --- |"
    yield from learning_lines()
    yield from peer_lines()


def learning_lines() -> Iterator[str]:
    """Of each environment and algorithm: evaluated return, steps and seconds, means over the seeds."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for (environment, algorithm, _), entry in newest(entries("learning"), "environment", "algorithm", "seed").items():
        found.setdefault((environment, algorithm), []).append(entry)
    for (environment, algorithm), seeds in found.items():
        mean = fmean(entry["evaluate"]["mean_return"] for entry in seeds)
        steps = fmean(entry["train"]["env_steps"] for entry in seeds)
        seconds = fmean(entry["wall_seconds"] for entry in seeds)
        many = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
        yield f"| {environment}, {algorithm} | return {mean:.0f} | {steps:,.0f} env steps, {seconds:,.0f} s ({many}) |"


def peer_lines() -> Iterator[str]:
    """Of each comparison: shoal's speed, and how many times the peer's it is."""
    rows = entries("peers")
    latest = {row["comparison"]: row["measurement"] for row in rows}
    for name, at in latest.items():
        pairs = [row for row in rows if (row["comparison"], row["measurement"]) == (name, at) and row["ratio"] is not None]
        if pairs:
            own, times = median(row["shoal"] for row in pairs), median(row["ratio"] for row in pairs)
            yield f"| {name.replace(' / ', ', beside ')} | {own:,.0f} env steps/s | {times:.1f} times ({len(pairs)} pairs) |"


def written(text: str) -> str:
    """`text` of a README with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(table()) + "\n" + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="show the table only")
    if parser.parse_args().print:
        print("\n".join(table()))
    else:
        README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
