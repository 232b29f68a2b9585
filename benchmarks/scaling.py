"""What `make bench-scaling` measures: what a cluster keeps of the local engine's speed, and what more nodes give, on one machine.

one-node/*   the same training on the local engine, then on a cluster of one node
waiting/*    environments that sleep 10 ms, 32 a node: one node beside the local engine, then two and four beside one, all of them on this machine
hosts/*      the same on network namespaces, one node each, where they are permitted (namespaces.py)

A measurement is a pair of runs, one right after the other (A B, A B, ...), and what counts is the median of the ratios. Every pair is appended to
`results/scaling.jsonl` at once; `results/scaling.md` is written from all of it. Clusters have a token and TLS, as those that shoal starts.

    python benchmarks/scaling.py                          what is missing
    python benchmarks/scaling.py --rows 'waiting/*'       some rows
    python benchmarks/scaling.py --again                  measure anew
    python benchmarks/scaling.py --list | --table         what there is, what is done | only the table

Measure on an idle machine: all nodes share its cores, so four of them leave little to spare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from clusters import Place, nodes_here, watching
from namespaces import hosts, why_not
from observing import steady_rate
from peers import EPOCHS, IMPALA_PYTHON, MATCHED
from rows import (
    SHOAL,
    Entry,
    Measurement,
    Store,
    answer_of,
    chosen,
    code_line,
    codes,
    digest,
    line,
    loads,
    measure_all,
    parser_of,
    scratch,
    where_and_when,
)
from speed import WAIT_SECONDS, column, spread

PAIRS = 3  # fewer answer nothing
ENVS_OF_NODE = 32  # that wait
STORE_GROWTH_MB = 5.0  # of all object stores in the second half of a run: flat
WAITING = (
    "--algorithm", "impala", "--preset", "none", "--env.form", "threads", "--sampling.group-size", str(ENVS_OF_NODE), "--sampling.rollout-length", "64",
)  # fmt: skip

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      options: of `shoal train`, but for what says how many nodes there are.
      nodes: of the run. beside: of the run that it is compared with; 0: the local engine.
      least: share of the base's speed, for each node, that is wanted.
      groups: of a node, where they are not in the options. actors: of a node.
      on_hosts: nodes are network namespaces.
    """

    name: str
    environment: str
    options: tuple[str, ...]
    nodes: int
    beside: int
    least: float
    groups: int | None = None
    actors: int = 2
    on_hosts: bool = False

    def what(self, nodes: int = 1) -> list[str]:
        """Environment and options of a training on so many nodes, of whichever engine."""
        groups = [] if self.groups is None else ["--sampling.groups", str(self.groups * nodes)]
        return [self.environment, *self.options, *groups]

    def arguments(self, nodes: int, address: str) -> list[str]:
        """Of `shoal train` with so many nodes; 0: on the local engine."""
        if not nodes:
            return ["train", *self.what(), "--actors", str(self.actors)]
        return [
            "train",
            *self.what(nodes),
            "--engine",
            "ray",
            "--address",
            address,
            "--nodes",
            str(nodes),
            "--actors-per-node",
            str(self.actors),
        ]

    @property
    def command(self) -> str:
        """With HEAD for the cluster's address."""
        return " ".join(["shoal", *self.arguments(self.nodes, "HEAD")])

    @property
    def wanted(self) -> str:
        times = f"≥ {self.least:.0%}"
        return f"{times} of the local engine" if not self.beside else f"{times} of {self.nodes / self.beside:g} times one node"

    def cluster(self, nodes: int) -> AbstractContextManager[Place]:
        return hosts(nodes, self.actors) if self.on_hosts else nodes_here(nodes, self.actors)


def _alone(name: str, environment: str, options: str) -> Row:
    return Row(f"one-node/{name}", environment, tuple(options.split()), 1, 0, 0.90)


def _waiting(name: str, nodes: int, least: float, *, beside: int = 1, on_hosts: bool = False) -> Row:
    return Row(name, "benchmarks/waiting.py:fixed", WAITING, nodes, beside, least, groups=1, actors=1, on_hosts=on_hosts)


ROWS = (
    _alone("cartpole-ppo", "CartPole-v1", f"{MATCHED} {EPOCHS}"),
    _alone("cartpole-impala", "CartPole-v1", f"--algorithm impala {IMPALA_PYTHON}"),
    _alone("lunarlander", "LunarLander-v3", f"{MATCHED} {EPOCHS}"),
    _waiting("waiting/1", 1, 0.90, beside=0),
    _waiting("waiting/2", 2, 0.92),
    _waiting("waiting/4", 4, 0.92),
    _waiting("hosts/2", 2, 0.95, on_hosts=True),
)


# ---- measuring -------------------------------------------------------------------------------------------------------
def pair(row: Row, seed: int, options: argparse.Namespace) -> Figures:
    """The base, then the row."""
    base = on_cluster(row, row.beside, seed, options) if row.beside else {"rate": trained(row, 0, None, seed, options)[0]}
    figures = on_cluster(row, row.nodes, seed, options)
    return {**figures, "base": base["rate"], "kept": figures["rate"] / base["rate"] / (row.nodes / max(1, row.beside))}


def on_cluster(row: Row, nodes: int, seed: int, options: argparse.Namespace) -> Figures:
    """A run on a cluster that is started for it: its speed, what crossed the network, and what lay in the object stores."""
    with row.cluster(nodes) as place, watching(place.session) as watched:
        rate, told = trained(row, nodes, place, seed, options)
    network = told["network"]
    each = {name: network[name] for name in ("bytes_per_env_step", "messages_per_env_step")}
    ways = {name: network[name] / network["env_steps"] for name in ("bytes_said", "bytes_heard")}
    return {"rate": rate, **each, **ways, **watched.figures()}


def trained(row: Row, nodes: int, place: Place | None, seed: int, options: argparse.Namespace) -> tuple[float, Figures]:
    """Env steps per second of one training once it is warm, and its answer."""
    with scratch(options.runs) as directory:
        length = ["--stop.seconds", f"{options.seconds:g}", "--seed", str(seed), "--evaluation.episodes", "0"]
        words = [
            SHOAL,
            *row.arguments(nodes, "" if place is None else place.address),
            *length,
            "--run-dir",
            str(directory / "run"),
            "--json",
        ]
        told = answer_of(words if place is None else place.command(words), options.seconds + 300.0)
        return steady_rate(directory / "run"), told


def settings_of(row: Row, options: argparse.Namespace) -> str:
    return digest([row.command, row.beside, row.on_hosts, options.seconds])


def measure(row: Row, number: int, options: argparse.Namespace) -> Entry:
    return {"row": row.name, "seed": number, "command": row.command, "figures": pair(row, number, options)}


# ---- the table -------------------------------------------------------------------------------------------------------
def measured(entries: Iterable[Entry]) -> Iterator[tuple[Row, list[Entry]]]:
    """Every row that was measured, and its pairs. entries: one of each row and number."""
    found: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (entry["row"], entry["seed"])):
        found.setdefault(entry["row"], []).append(entry)
    return ((row, found[row.name]) for row in ROWS if row.name in found)


def kept(row: Row, figures: Sequence[Figures]) -> str:
    """The median share of the base, and what it means in times of it."""
    share = spread([100 * value for value in column(figures, "kept")], "%", 1)
    return share if not row.beside else f"{share}, {median(column(figures, 'rate')) / median(column(figures, 'base')):.2f} times"


def reached(row: Row, figures: Sequence[Figures]) -> str:
    if len(figures) < PAIRS:
        return f"{len(figures)} of {PAIRS} pairs"
    return "yes" if median(column(figures, "kept")) >= row.least else "**no**"


def store(figures: Sequence[Figures]) -> str:
    """What Ray's object stores held, and whether that was flat."""
    held, growth, spilled = (max(column(figures, name)) for name in ("store_mb", "store_growth_mb", "spilled_mb"))
    flat = "" if growth <= STORE_GROWTH_MB and not spilled else ", **not flat**"
    return f"{held:.1f} MB, {growth:+.1f} in the second half, {spilled:.1f} spilled{flat}"


def lines(entries: Iterable[Entry]) -> Iterator[str]:
    """The table."""
    yield line(
        "row", "base, env steps/s", "env steps/s", "of the base, for each node", "wanted", "reached", "bytes/env step (from nodes, to them)",
        "messages/1,000 env steps", "object stores", "cores busy", "load", "code",
    )  # fmt: skip
    yield line(*["---"] * 12)
    for row, found in measured(entries):
        figures = [entry["figures"] for entry in found]
        said, heard, each, messages, busy = (
            median(column(figures, name))
            for name in ("bytes_said", "bytes_heard", "bytes_per_env_step", "messages_per_env_step", "cores_busy")
        )
        yield line(
            row.name, *(spread(column(figures, name), "") for name in ("base", "rate")), kept(row, figures), row.wanted, reached(row, figures),
            f"{each:.1f} ({heard:.1f}, {said:.1f})", f"{1000 * messages:.2f}", store(figures), f"{busy:.2f}", loads(found), codes(found),
        )  # fmt: skip


def page(kept_here: Store) -> Iterator[str]:
    entries = list(kept_here.entries.values())
    yield "# Scaling\n"
    yield "Made by `make bench-scaling` (`benchmarks/scaling.py`); raw rows in `scaling.jsonl`.\n"
    yield from where_and_when(entries)
    yield (
        f"Pairs of runs, one right after the other; medians, in brackets the least and the largest. one-node/*: the local engine, then a cluster of one node. waiting/*, hosts/*: {ENVS_OF_NODE} environments "
        f"a node that sleep {1e3 * WAIT_SECONDS:g} ms at each step, one actor a node; the base of waiting/1 is the local engine, that of the others one node. All nodes share this machine's cores (`cores busy`, of all programs), so weak scaling holds only as long as "
        "some are left. hosts/*: nodes in network namespaces. Bytes and messages are shoal's own between the driver and all nodes, both ways, for each env step that came. Object stores: memory of Ray's stores of all nodes "
        f"at the end of a run (flat: at most {STORE_GROWTH_MB:g} MB more than at its half, and nothing spilled to disk), the largest of the pairs. {code_line()}\n"
    )
    yield from lines(entries)
    yield "\n## Commands\n"
    for row, found in measured(entries):
        yield f"- {row.name}: `{found[-1]['command']}`"
    missing = [row for row in ROWS if row.name not in {entry["row"] for entry in entries}]
    reasons = {row.name: why for row in missing if row.on_hosts and (why := why_not())}
    if missing:
        yield f"\nNot measured yet: {', '.join(row.name for row in missing if row.name not in reasons) or 'nothing'}."
    for name, why in reasons.items():
        yield f"\n{name} is not measured here: {why}."


# ---- the bench -------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    kept_here = Store(options.results, "scaling", lambda entry: (entry["row"], entry["seed"]), page)
    names = chosen((row.name for row in ROWS), options.rows)
    rows = [row for row in ROWS if row.name in names]
    if any(row.on_hosts for row in rows) and (why := why_not()):
        print(f"{', '.join(row.name for row in rows if row.on_hosts)}: left out, {why}", file=sys.stderr)
        rows = [row for row in rows if not row.on_hosts]
    wanted = [
        Measurement(row.name, n, (row.name, n), settings_of(row, options), partial(measure, row, n, options), partial(_brief, row))
        for row in rows
        for n in range(options.pairs)
    ]
    return measure_all(wanted, kept_here, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "scaling")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"of each row; fewer than {PAIRS} answer nothing (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each training (default: %(default)s)")
    return parser.parse_args(arguments)


def _brief(row: Row, entry: Entry) -> str:
    figures = entry["figures"]
    return f"{figures['rate']:,.0f} env steps/s beside {figures['base']:,.0f}: {kept(row, [figures])}; {figures['bytes_per_env_step']:.1f} bytes/env step"


if __name__ == "__main__":
    sys.exit(main())
