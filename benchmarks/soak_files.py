"""The second part of `make soak`: kills and disks that refuse while files are written, and what is left after a run's end.

    python benchmarks/soak_files.py                  all of it
    python benchmarks/soak_files.py saves bytes      only these sections (saves, bytes, disk, descriptors, cycles, kills, together)
    python benchmarks/soak_files.py --scale 0.1      a tenth of the cycles and kills
    python benchmarks/soak_files.py cycles --scale 0.25 --add    a quarter more, counted together with those before

Each section says what was injected, how often, what was to come of it and the figure; the table is results/soak_files.md. Exits with 1 where one
did not come out so. `saves` needs strace (it is installed where apt-get may), `disk` a file system that may be mounted; else they are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime

from endured import ROOT, Row, Skipped  # first: it finds the tests' helpers
from endured_disks import descriptors, disk
from endured_ends import cycles, cycles_row, kills, kills_row, together
from endured_saves import damaged, saves
from soak import machine

from shoal.errors import CheckpointError

RESULT = ROOT / "benchmarks" / "results" / "soak_files.md"
ROWS = RESULT.with_suffix(".jsonl")
SECTIONS: dict[str, Callable[[float], Iterator[Row]]] = {
    "saves": saves, "bytes": damaged, "disk": disk, "descriptors": descriptors, "cycles": cycles, "kills": kills, "together": together,
}  # fmt: skip
ADDED: dict[str, Callable[[list[float]], Row]] = {"cycles": cycles_row, "kills": kills_row}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--add", action="store_true", help=f"count what was measured before, too ({', '.join(ADDED)})")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    failed = False
    for name in options.sections or SECTIONS:
        begun, rows = time.monotonic(), list[Row]()
        try:
            for row in SECTIONS[name](options.scale):
                if options.add and name in ADDED:
                    row = ADDED[name]([*earlier(name), *row.seconds])
                rows.append(row)
                print(f"{name}: {row.fault}: {row.figure}", flush=True)
        except Skipped as reason:
            rows.append(Row(name, 0, f"skipped: {reason}", ""))
        except (AssertionError, CheckpointError, subprocess.TimeoutExpired) as error:
            first = re.sub(r"\s+", " ", str(error))[:300]
            rows.append(Row(name, 0, f"**failed**: {first}", "", held=False))
            print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
        keep(name, rows, f"{datetime.now(UTC):%Y-%m-%d %H:%M}")
        failed |= not all(row.held for row in rows)
    write()
    return int(failed)


def kept() -> dict[str, list[dict[str, object]]]:
    """Rows of every section's last run."""
    return dict(json.loads(line) for line in ROWS.read_text().splitlines()) if ROWS.exists() else {}


def earlier(section: str) -> list[float]:
    return [float(one) for row in kept().get(section, ()) for one in row.get("seconds", ())]  # type: ignore[attr-defined]


def keep(section: str, rows: list[Row], at: str) -> None:
    found = kept() | {section: [{**asdict(row), "at": at, "machine": machine(), "load": round(os.getloadavg()[0])} for row in rows]}
    RESULT.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps([name, found[name]]) + "\n" for name in SECTIONS if name in found))


def write() -> None:
    rows = [row for section in kept().values() for row in section]
    head = [
        "# Soak: files that cannot be written, and what is left at the end",
        "",
        "`make soak` (benchmarks/soak_files.py). Machine: "
        + "; ".join(sorted({f"{row['machine']}, load {row['load']}" for row in rows})) + ".",
        "",
        "| fault | times injected | outcome wanted | figure | held | ended, UTC |",
        "| --- | ---: | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines = [
        f"| {row['fault']} | {row['times']:,} | {row['outcome']} | {row['figure']} | {'no' if not row['held'] else 'yes' if row['times'] else '-'} | {row['at']} |"
        for row in rows
    ]
    RESULT.write_text("\n".join([*head, *lines]) + "\n")
    print(f"{RESULT.relative_to(ROOT)} is written")


if __name__ == "__main__":
    sys.exit(main())
