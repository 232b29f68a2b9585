"""What `make soak` runs: every test marked `soak`, among them the hundreds of kills of tests/exactness, and the table of what they found.

    python benchmarks/soak.py                         all of it, one after the other
    python benchmarks/soak.py -n 2 tests/exactness    arguments of pytest

Exits with pytest's code. `results/soak.md` is written whatever it is; a test that failed has a row that says so.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "soak.md"
REQUIRED = {"actors": 100, "the learner": 20, "whole runs": 50}  # kills in sync mode, whose runs end with the same weights


def main(arguments: list[str]) -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "rows"
        command = [sys.executable, "-m", "pytest", "-m", "soak", *arguments]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "SHOAL_SOAK_LOG": str(log)}, check=False).returncode
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows.sort(key=lambda row: (row.get("mode", ""), row.get("what", ""), row["test"]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(report(rows, code, arguments, time.monotonic() - begun)) + "\n")
    print(f"{RESULT.relative_to(ROOT)} is written")
    return code


def report(rows: list[dict[str, Any]], code: int, arguments: list[str], seconds: float) -> Iterator[str]:
    yield "# Soak: kills at random moments, and what came of the runs"
    yield ""
    yield (
        f"`python benchmarks/soak.py {' '.join(arguments)}`".replace(" `", "`")
        + f", {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {seconds / 60:.0f} minutes."
    )
    yield f"Machine: {cpu()}, {len(os.sched_getaffinity(0))} cores, other work on it; torch {version('torch')}, Python {platform.python_version()}."
    yield f"pytest ended with {code} ({'all passed' if code == 0 else 'see the rows that failed'})."
    yield ""
    yield "Every kill is a SIGKILL from outside; of roles only those are counted that the run itself noticed while it went on (events of its run.db)."
    yield "**equal**: sync runs end with the `weights_sha256` of the same run with all roles in one process and no kill; async runs with that of their"
    yield "`shoal replay`, whose updates also train the same stamps in the same order. The ledger balances in every row (produced = trained + dropped,"
    yield "nothing in flight at the end), in environment steps."
    yield ""
    yield "| mode | killed | kills, all runs | runs | equal |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for mode, what in dict.fromkeys((row["mode"], row["what"]) for row in rows if row["passed"]):
        mine = [row for row in rows if row["passed"] and (row["mode"], row["what"]) == (mode, what)]
        kills, wanted = sum(row["kills"] for row in mine), REQUIRED.get(what, 0) if mode == "sync" else 0
        yield f"| {mode} | {what} | {kills}{f' (of {wanted} at least)' if wanted else ''} | {len(mine)} | {len(mine)} |"
    yield ""
    yield "| run | kills | of them inside a save | produced | trained | dropped | lag mean, max | s |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: |"
    for row in rows:
        yield from line(row)


def line(row: dict[str, Any]) -> Iterator[str]:
    if not row["passed"]:
        yield f"| {row['test']} | **failed** | | | | | | {row['seconds']:.0f} |"
        return
    ledger, lag = row["ledger"], row.get("lag")
    dropped = ", ".join(f"{reason} {steps:,}" for reason, steps in ledger["dropped"].items()) or "0"
    ages = f"{lag['mean']:.2f}, {lag['max']}" if lag else "0, 0"
    name = f"{row['task']} {row['mode']}, kills of {row['what']}"
    yield (
        f"| {name} | {row['kills']} | {row.get('saves_hit', '')} | {ledger['produced']:,} | {ledger['trained']:,} | {dropped} | {ages} "
        f"| {row['seconds']:.0f} |"
    )


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [text.partition(":")[2].strip() for text in info.read_text().splitlines() if text.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
