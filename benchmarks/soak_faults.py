"""The third part of `make soak`: every fault that shoal promises to name or to mend, injected into whole runs, and what came of each.

    python benchmarks/soak_faults.py                         what is missing; the table is results/soak_faults.md
    python benchmarks/soak_faults.py --rows 'environment/*'  some rows
    python benchmarks/soak_faults.py --list | --table        what there is, what is done | only the table

A row is kept as soon as it is there. Exits with 1 where one did not come out as wanted.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import injected_environments
import injected_processes
from injected import Found, Row
from rows import Entry, Measurement, Store, chosen, code_line, codes, digest, hold_all, line, parser_of, where_and_when

from shoal.runs import quantile

STEM = "soak_faults"
ROWS: dict[str, Row] = injected_environments.ROWS | injected_processes.ROWS


def measure(name: str, directory: Path) -> Entry:
    row, found = ROWS[name], Found()
    with tempfile.TemporaryDirectory(dir=directory) as place:
        try:
            row.work(found, Path(place))
        except AssertionError as error:
            found.expect(False, str(error))
    seconds = sorted(found.seconds)
    if row.within is not None and seconds:
        for share, limit in zip((0.5, 0.99), row.within, strict=True):
            found.expect(quantile(seconds, share) <= limit, f"{quantile(seconds, share):.2f} s, {limit:g} s wanted")
    return {
        "row": name,
        "times": found.times,
        "seconds": [round(one, 3) for one in seconds],
        "figure": found.figure,
        "wrong": found.wrong,
    }


def figure(entry: Entry) -> str:
    seconds, said = entry["seconds"], [entry["figure"]] if entry["figure"] else []
    if len(seconds) > 1:
        spread = [f"p50 {quantile(seconds, 0.5):.2f} s", *([f"p99 {quantile(seconds, 0.99):.2f} s"] if len(seconds) > 20 else [])]
        said.insert(0, ", ".join([*spread, f"at most {seconds[-1]:.2f} s"]))
    elif seconds:
        said.insert(0, f"{seconds[0]:.2f} s")
    return "; ".join([*said, *entry["wrong"]]).replace("|", "/")


def brief(entry: Entry) -> str:
    return f"{entry['times']} times, {'not held' if entry['wrong'] else 'held'}: {figure(entry)}"


def page(store: Store) -> Iterator[str]:
    entries = [store.entries[name] for name in ROWS if name in store.entries]
    yield "# Soak: faults, and what came of each"
    yield ""
    yield "`make soak` (benchmarks/soak_faults.py). Of every fault: how often it was injected, what was to come of it, and the figure."
    yield "Seconds are from the fault to the end of the command, or to the first rollout (of a learner: update) of whoever came in place, from detection where"
    yield "somebody was stopped, without the stepping of episodes again. Load is the machine's mean over five minutes, in processes."
    yield code_line()
    yield ""
    yield from where_and_when(entries)
    yield line("fault", "times injected", "outcome wanted", "figure", "held", "load", "code")
    yield line("---", "---:", "---", "---", "---", "---:", "---")
    for entry in entries:
        row = ROWS[entry["row"]]
        yield line(
            row.fault,
            entry["times"],
            row.wanted,
            figure(entry),
            "**no**" if entry["wrong"] else "yes",
            entry["load"],
            codes([entry]),
        )
    held = sum(not entry["wrong"] for entry in entries)
    yield ""
    yield f"{held} of {len(entries)} rows held; {sum(entry['times'] for entry in entries):,} faults in all; {len(ROWS) - len(entries)} rows are not measured."


def main() -> int:
    parser = parser_of(__doc__, STEM)
    options = parser.parse_args()
    store = Store(options.results, STEM, lambda entry: entry["row"], page)
    wanted = [
        Measurement(name, 0, name, digest([ROWS[name].fault, ROWS[name].wanted]), lambda name=name: measure(name, options.runs), brief)
        for name in chosen(ROWS, options.rows)
    ]
    return hold_all(wanted, store, options)


if __name__ == "__main__":
    sys.exit(main())
