"""The fourth part of `make soak`: runs on a Ray cluster of several hosts (network namespaces of this machine), and how long each fault cost them.

    python benchmarks/soak_hosts.py                    what is missing; the table is results/soak_hosts.md
    python benchmarks/soak_hosts.py --rows raylet      some rows
    python benchmarks/soak_hosts.py --list | --table   what there is, what is done | only the table

A row is kept as soon as it is there. Exits with 1 where one did not come out as wanted. Hosts need root and iproute2; without, nothing is measured, and that is said.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from injected import Found  # first: it finds the tests' helpers
from rows import Entry, Measurement, Store, chosen, code_line, codes, digest, hold_all, line, parser_of, where_and_when

from faults import host_faults
from faults.host_faults import Absence, Training, World, world
from faults.hosts import missing

STEM = "soak_hosts"
SAME = "the weights are those of the local engine"
SECONDS = {"noticed": "noticed, s", "back": "back, s", "again": "host takes part again, s"}  # an Absence's, and the table's columns
Strike = Callable[[Training, World], Absence]
Work = Callable[[Found, list[Absence], Path], None]


@dataclass(frozen=True)
class Row:
    """`within`: seconds that no figure may pass: noticed, back, and where a host comes back: until it takes part again."""

    fault: str
    wanted: str
    within: tuple[float, ...]
    work: Work


def strikes(strike: Strike, times: int) -> Work:
    """One run, struck so often, each time once it has got over the last."""

    def work(found: Found, absences: list[Absence], place: Path) -> None:
        with world(place, "a", "b") as there:
            training = there.train()
            for _ in range(times):
                absences.append(strike(training, there))
                found.times += 1
            compare(found, training, training.end())

    return work


def compare(found: Found, training: Training, result: Entry) -> None:
    found.figure += f"{result['updates']:,} updates"
    expected = training.expected(result["updates"])
    found.expect(
        result["weights_sha256"] == expected, f"weights {result['weights_sha256'][:12]}, those of the local engine {expected[:12]}"
    )


def and_again(strike: Callable[[Training, Any], Absence]) -> Strike:
    """The host takes part again before it is struck again."""

    def struck(training: Training, there: World) -> Absence:
        before, host = time.time(), there.workers[1]
        absence = strike(training, host)
        return replace(absence, again=host_faults.join_again(training, host, before))

    return struck


def slow(found: Found, absences: list[Absence], place: Path) -> None:
    with world(place, "a", "b") as there:
        slowness = host_faults.slow_down(there)
        absences.append(Absence(slowness.said_after, slowness.seconds))
        to_it, from_it = (carried / 1e6 for carried in slowness.carried)
        found.times = 1
        found.figure = f"{to_it:.1f} MB to the host, {from_it:.1f} MB from it; `shoal stalls` says: {slowness.blamed}; "
        compare(found, slowness.training, slowness.result)


ROWS = {
    "actor": Row(
        "SIGKILL of an actor on a host", f"replaced there; {SAME}", (1.0, 5.0),
        strikes(lambda training, there: host_faults.kill_actor(training, there.workers[0]), 5),
    ),
    "learner": Row(
        "SIGKILL of the learner", f"back to the last checkpoint; {SAME}", (1.0, 10.0),
        strikes(lambda training, _: host_faults.kill_learner(training), 5),
    ),
    "fleet": Row(
        "SIGKILL of the process that holds a host's fleet", f"its groups move; nothing of it is left on its host, which takes part again; {SAME}",
        (5.0, 10.0, 45.0), strikes(and_again(host_faults.kill_fleet), 3),
    ),
    "raylet": Row(
        "SIGKILL of a host's raylet", f"its groups move; nothing of it is left on its host, which takes part again once Ray is up there; {SAME}",
        (20.0, 25.0, 60.0), strikes(and_again(host_faults.kill_raylet), 3),
    ),
    "driver": Row(
        "SIGKILL of the driver, then `shoal resume`", f"nothing of it is left on any host; {SAME}", (20.0, 45.0),
        strikes(host_faults.kill_driver, 3),
    ),
    "partition": Row(
        f"a host that nobody reaches for {host_faults.PARTITION_SECONDS:g} s", f"its groups move, the run goes on meanwhile; it takes part again; {SAME}",
        (20.0, 25.0, 60.0), strikes(lambda training, there: host_faults.part(training, there.workers[1]), 1),
    ),
    "head": Row(
        "the head's power fails, then a head elsewhere and `shoal resume`", f"code 1, `shoal resume RUN` in the message; {SAME}", (45.0, 60.0),
        strikes(host_faults.lose_head, 1),
    ),
    "slow": Row(
        f"a host behind a link of {host_faults.SLOW_MBIT} Mbit/s, which takes {host_faults.LARGE_SECONDS:.0f} s for the weights ({host_faults.LARGE_BYTES / 1e6:.0f} MB)",
        f"nobody is given up, nothing is dropped, no weights go twice; `shoal stalls` names who is waited for, and why; {SAME}",
        (host_faults.LARGE_SECONDS, 1.25 * host_faults.LARGE_SECONDS), slow,
    ),
}  # fmt: skip


def measure(name: str, directory: Path) -> Entry:
    row, found, absences = ROWS[name], Found(), list[Absence]()
    with tempfile.TemporaryDirectory(dir=directory) as place:
        try:
            row.work(found, absences, Path(place))
        except AssertionError as error:
            found.expect(False, str(error))
    seconds = {name: [round(getattr(one, name), 2) for one in absences if getattr(one, name) is not None] for name in SECONDS}
    for (figure, measured), limit in zip(seconds.items(), row.within, strict=False):
        found.expect(max(measured, default=0.0) <= limit, f"{SECONDS[figure]}: {max(measured, default=0.0):.1f}, {limit:.4g} wanted")
    return {"row": name, "times": found.times, **seconds, "figure": found.figure, "wrong": found.wrong}


def spread(seconds: list[float]) -> str:
    """The median, and all of it where there are several."""
    if not seconds:
        return "-"
    return f"{median(seconds):.1f}" + (f" ({min(seconds):.1f} to {max(seconds):.1f})" if len(seconds) > 1 else "")


def cells(entry: Entry) -> list[str]:
    """Seconds as they were, and what they may not pass."""
    within = ROWS[entry["row"]].within
    limits = [f", limit {within[at]:.0f}" if at < len(within) else "" for at in range(len(SECONDS))]
    return [spread(entry[name]) + limit for name, limit in zip(SECONDS, limits, strict=True)]


def said(entry: Entry) -> str:
    return "; ".join([entry["figure"], *entry["wrong"]]).replace("|", "/")


def held(entry: Entry) -> str:
    return "**no**" if entry["wrong"] else "yes"


def brief(entry: Entry) -> str:
    seconds = "; ".join(f"{name} after {spread(entry[name])} s" for name in SECONDS)
    return f"{entry['times']} times, {'not held' if entry['wrong'] else 'held'}: {seconds}; {said(entry)}"


def lines(entries: Iterable[Entry]) -> Iterator[str]:
    """The table of docs/guide.md: what each fault costs."""
    yield line("fault", "times", *SECONDS.values(), "held")
    yield line("---", "---:", *["---"] * len(SECONDS), "---")
    for entry in sorted(entries, key=lambda entry: list(ROWS).index(entry["row"])):
        yield line(ROWS[entry["row"]].fault, entry["times"], *cells(entry), held(entry))


def page(store: Store) -> Iterator[str]:
    entries = [store.entries[name] for name in ROWS if name in store.entries]
    yield "# Soak: faults on several hosts"
    yield ""
    yield "`make soak` (benchmarks/soak_hosts.py). Hosts are network namespaces of one machine, with a Ray node each, token and TLS: a head, the driver's, and"
    yield "two with one actor each. The run is CartPole-v1 in sync mode, 8 environments whose steps sleep for 2 ms. Seconds are medians (least to most), and limits"
    yield "that none may pass, from the blow: `noticed` to the event in run.db (of the driver: until nothing of it is left on any host; of the head: until the run has"
    yield "failed with a word), `back` to the last rollout (of the learner: update) of what was lost, episodes stepped again included; of driver and head to the first"
    yield "update after `shoal resume`, of the head counted from the failure, the start of the other cluster included. A host takes part again that many seconds after the"
    yield "blow, of the partition after its end. Of the slow link: until `shoal stalls` says what is waited for, and for an update. run.db is written once a second where"
    yield "there is no event."
    yield code_line()
    yield ""
    yield from where_and_when(entries)
    yield line("fault", "times", "outcome wanted", *SECONDS.values(), "figure", "held", "load", "code")
    yield line("---", "---:", "---", *["---"] * len(SECONDS), "---", "---", "---:", "---")
    for entry in entries:
        row = ROWS[entry["row"]]
        yield line(row.fault, entry["times"], row.wanted, *cells(entry), said(entry), held(entry), entry["load"], codes([entry]))
    yield ""
    yield f"{sum(not entry['wrong'] for entry in entries)} of {len(entries)} rows held; {len(ROWS) - len(entries)} rows are not measured."


def main() -> int:
    parser = parser_of(__doc__, STEM)
    options = parser.parse_args()
    if not (options.list or options.table) and (why := missing()):
        print(f"nothing is measured: {why}", file=sys.stderr)
        return 0
    store = Store(options.results, STEM, lambda entry: entry["row"], page)
    wanted = [
        Measurement(name, 0, name, digest([row.fault, row.wanted, row.within]), lambda name=name: measure(name, options.runs), brief)
        for name, row in ((name, ROWS[name]) for name in chosen(ROWS, options.rows))
    ]
    return hold_all(wanted, store, options)


if __name__ == "__main__":
    sys.exit(main())
