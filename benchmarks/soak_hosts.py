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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from injected import Found  # first: it finds the tests' helpers
from rows import Entry, Measurement, Store, chosen, code_line, codes, digest, hold_all, line, parser_of, where_and_when

from faults import host_faults
from faults.host_faults import Absence, Training, World, world
from faults.hosts import missing

STEM = "soak_hosts"
Strike = Callable[[Training, World], Absence]


@dataclass(frozen=True)
class Row:
    fault: str
    wanted: str
    work: Callable[[Found, Path], list[Absence]]


def strikes(strike: Strike, times: int, *workers: str) -> Callable[[Found, Path], list[Absence]]:
    """One run, struck so often, each time once it has got over the last."""

    def work(found: Found, place: Path) -> list[Absence]:
        with world(place, *(workers or ("a", "b"))) as there:
            training = there.train()
            absences = []
            for _ in range(times):
                absences.append(strike(training, there))
                found.times += 1
            compare(found, training, training.end())
        return absences

    return work


def compare(found: Found, training: Training, result: Entry) -> None:
    found.figure += f"{result['updates']:,} updates"
    expected = training.expected(result["updates"])
    found.expect(
        result["weights_sha256"] == expected, f"weights {result['weights_sha256'][:12]}, those of the local engine {expected[:12]}"
    )


def and_back(strike: Callable[..., Absence]) -> Strike:
    """The host takes part again before it is struck again."""

    def struck(training: Training, there: World) -> Absence:
        before = time.time()
        absence = strike(training, there.workers[1])
        host_faults.join_again(training, there.workers[1], before)
        return absence

    return struck


def partition(found: Found, place: Path) -> list[Absence]:
    with world(place, "a", "b") as there:
        training = there.train()
        absence, again = host_faults.part(training, there.workers[1])
        found.times, found.figure = 1, f"the host takes part again {again:.1f} s after the link is there again; "
        compare(found, training, training.end())
    return [absence]


def slow(found: Found, place: Path) -> list[Absence]:
    with world(place, "a", "b") as there:
        slowness = host_faults.slow_down(there)
        megabytes = [carried / 1e6 for carried in slowness.carried]
        found.times, found.figure = (
            1,
            f"{slowness.seconds:.0f} s an update; {megabytes[0]:.0f} MB to the host, {megabytes[1]:.1f} MB from it; ",
        )
        compare(found, slowness.training, slowness.result)
    return []


SAME = "the weights are those of the local engine"
ROWS = {
    "actor": Row(
        "SIGKILL of an actor on a host", f"replaced there; {SAME}",
        strikes(lambda training, there: host_faults.kill_actor(training, there.workers[0]), 5),
    ),
    "learner": Row("SIGKILL of the learner", f"back to the last checkpoint; {SAME}", strikes(lambda training, _: host_faults.kill_learner(training), 5)),
    "fleet": Row(
        "SIGKILL of the process that holds a host's fleet", f"its groups move, the host takes part again; {SAME}",
        strikes(and_back(host_faults.kill_fleet), 3),
    ),
    "raylet": Row(
        "SIGKILL of a host's raylet", f"its groups move, the host takes part again once Ray is up there; {SAME}",
        strikes(and_back(host_faults.kill_raylet), 3),
    ),
    "driver": Row("SIGKILL of the driver, then `shoal resume`", f"nothing is left on the hosts; {SAME}", strikes(host_faults.kill_driver, 3)),
    "partition": Row(
        f"a host that nobody reaches for {host_faults.PARTITION_SECONDS:g} s", f"its groups move, it takes part again later; {SAME}", partition
    ),
    "slow": Row(
        f"a host behind a link of {host_faults.SLOW_RATE[:-4]} Mbit/s, with weights of {host_faults.LARGE_BYTES / 1e6:.0f} MB",
        f"nobody is given up, nothing is dropped, the link carries what is needed; {SAME}", slow,
    ),
    "head": Row(
        "the head's power fails, then a head elsewhere and `shoal resume`", f"code 1, `shoal resume RUN` in the message; {SAME}",
        strikes(host_faults.lose_head, 1),
    ),
}  # fmt: skip


def measure(name: str, directory: Path) -> Entry:
    found, absences = Found(), list[Absence]()
    with tempfile.TemporaryDirectory(dir=directory) as place:
        try:
            absences = ROWS[name].work(found, Path(place))
        except AssertionError as error:
            found.expect(False, str(error))
    noticed, back = ([round(getattr(one, which), 2) for one in absences] for which in ("noticed", "back"))
    return {"row": name, "times": found.times, "noticed": noticed, "back": back, "figure": found.figure, "wrong": found.wrong}


def spread(seconds: list[float]) -> str:
    """The median, and all of it where there are several."""
    if not seconds:
        return "-"
    return f"{median(seconds):.1f}" + (f" ({min(seconds):.1f} to {max(seconds):.1f})" if len(seconds) > 1 else "")


def said(entry: Entry) -> str:
    return "; ".join([entry["figure"], *entry["wrong"]]).replace("|", "/")


def brief(entry: Entry) -> str:
    state = "not held" if entry["wrong"] else "held"
    return (
        f"{entry['times']} times, {state}: noticed after {spread(entry['noticed'])} s, back after {spread(entry['back'])} s; {said(entry)}"
    )


def page(store: Store) -> Iterator[str]:
    entries = [store.entries[name] for name in ROWS if name in store.entries]
    yield "# Soak: faults on several hosts"
    yield ""
    yield "`make soak` (benchmarks/soak_hosts.py). Hosts are network namespaces of one machine, with a Ray node each, token and TLS: a head, the driver's, and"
    yield "two with one actor each. The run is CartPole-v1 in sync mode, 8 environments whose steps sleep for 2 ms. Seconds are medians (least to most), from the blow:"
    yield "`noticed` to the event in run.db (of the driver: until nothing of it is left on the hosts; of the head: until the run has failed with a word), `back` to"
    yield "the last rollout (of the learner: update) of what was lost, episodes stepped again included; of driver and head to the first update after `shoal resume`, of"
    yield "the head counted from the failure, the start of the other cluster included. run.db is written once a second where there is no event."
    yield code_line()
    yield ""
    yield from where_and_when(entries)
    yield line("fault", "times", "outcome wanted", "noticed, s", "back, s", "figure", "held", "load", "code")
    yield line("---", "---:", "---", "---:", "---:", "---", "---", "---:", "---")
    for entry in entries:
        row = ROWS[entry["row"]]
        seconds = spread(entry["noticed"]), spread(entry["back"])
        held = "**no**" if entry["wrong"] else "yes"
        yield line(row.fault, entry["times"], row.wanted, *seconds, said(entry), held, entry["load"], codes([entry]))
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
        Measurement(name, 0, name, digest([ROWS[name].fault, ROWS[name].wanted]), lambda name=name: measure(name, options.runs), brief)
        for name in chosen(ROWS, options.rows)
    ]
    return hold_all(wanted, store, options)


if __name__ == "__main__":
    sys.exit(main())
