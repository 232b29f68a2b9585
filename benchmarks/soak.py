"""What `make soak` runs: every test marked `soak`, among them the hundreds of kills of tests/exactness, and the table of what they found.

    python benchmarks/soak.py                         all of it, one after the other
    python benchmarks/soak.py -n 2 tests/exactness    arguments of pytest
    python benchmarks/soak.py --keep -k whole_runs    only these; the rows of all others stay as they were

Exits with pytest's code. `results/soak.md` is written from `results/soak.jsonl` whatever it is; a test that failed has a row that says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoal.benching import measuring

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "soak.md"
ROWS = RESULT.with_suffix(".jsonl")
REQUIRED = {"actors": 100, "the learner": 20, "whole runs": 50}  # kills in sync mode, whose runs end with the same weights


def main(arguments: list[str]) -> int:
    keep = "--keep" in arguments
    arguments = [argument for argument in arguments if argument != "--keep"]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "rows"
        command = [sys.executable, "-m", "pytest", "-m", "soak", *arguments]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "SHOAL_SOAK_LOG": str(log)}, check=False).returncode
        found = read(log)
    if not found:
        print(f"nothing was measured; {RESULT.relative_to(ROOT)} stays as it was", file=sys.stderr)
        return code or 1
    here = {"at": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "machine": machine(), "load": round(os.getloadavg()[0])}
    rows = {row["test"]: row for row in read(ROWS)} if keep else {}
    rows |= {row["test"]: {**row, **here} for row in found}
    ordered = sorted(rows.values(), key=lambda row: (row.get("mode", ""), row.get("what", ""), row["test"]))
    RESULT.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in ordered))
    RESULT.write_text("\n".join(report(ordered)) + "\n")
    print(f"{RESULT.relative_to(ROOT)} is written")
    return code


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(rows: list[dict[str, Any]]) -> Iterator[str]:
    failed = [row["test"] for row in rows if not row["passed"]]
    yield "# Soak: kills at random moments, and what came of the runs"
    yield ""
    minutes = sum(row["seconds"] for row in rows) / 60
    yield f"`make soak` (benchmarks/soak.py), ended {' and '.join(sorted({row['at'] for row in rows}))} UTC."
    yield f"{len(rows)} tests, {minutes:.0f} minutes if one after the other, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}."
    for text in sorted({row["machine"] for row in rows}):
        yield f"Machine: {text}; its load at the end: {' and '.join(str(n) for n in sorted({row['load'] for row in rows}))}."
    yield ""
    yield "Every kill is a SIGKILL from outside; of roles only those are counted that the run itself noticed while it went on (events of its run.db)."
    yield "**Equal**: sync runs end with the `weights_sha256` of the same run with all roles in one process and no kill; async runs with that of their"
    yield "`shoal replay`, whose updates also train the same stamps in the same order (the row without kills is not replayed). The ledger balances in every row (produced = trained + dropped,"
    yield "nothing in flight at the end), in environment steps."
    yield ""
    yield "| mode | killed | kills | runs | equal |"
    yield "| --- | --- | ---: | ---: | ---: |"
    passed = [row for row in rows if row["passed"]]
    for mode, what in dict.fromkeys((row["mode"], row["what"]) for row in passed):
        mine = [row for row in passed if (row["mode"], row["what"]) == (mode, what)]
        wanted = REQUIRED.get(what, 0) if mode == "sync" else 0
        least = f" (at least {wanted} wanted)" if wanted else ""
        yield f"| {mode} | {what} | {sum(row['kills'] for row in mine)}{least} | {len(mine)} | {len(mine) if 'none' not in what else ''} |"
    yield ""
    yield "| run | kills | of them inside a save | produced | trained | dropped | lag mean, max | s |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: |"
    for row in rows:
        yield from line(row)
    if notes := [f"- {row['test']}: {row['note']}" for row in rows if row.get("note")]:
        yield from ["", "Notes:", *notes]


def line(row: dict[str, Any]) -> Iterator[str]:
    if not row["passed"]:
        yield f"| {row['test']} | **failed** | | | | | | {row['seconds']:.0f} |"
        return
    ledger, lag = row["ledger"], row.get("lag")
    dropped = ", ".join(f"{reason} {steps:,}" for reason, steps in ledger["dropped"].items()) or "0"
    ages = f"{lag['mean']:.2f}, {lag['max']}" if lag else "0, 0"
    name = f"{row['task']} {row['mode']}, killed: {row['what']}"
    yield (
        f"| {name} | {row['kills']} | {row.get('saves_hit', '')} | {ledger['produced']:,} | {ledger['trained']:,} | {dropped} | {ages} "
        f"| {row['seconds']:.0f} |"
    )


def machine() -> str:
    """Said with every row: rows may come from several machines."""
    m = measuring.machine()
    return f"{m['cpu']}, {m['cores']} cores, torch {m['torch']}, Python {m['python']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
