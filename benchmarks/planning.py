"""What `make bench-plan` measures: trainings beside what `shoal plan` predicts for them, and what the driver takes that `shoal bench costs` does not measure.

A row's training is `shoal bench train`, whose answer has the costs of its parts and trials, short runs with another seed, of before and after it; `shoal plan` is
given these and nothing of the training. In rows `A from B` they are those of another configuration. scaling/* are the runs of scaling.py on clusters on this machine, and table/* the plan for 1 to 10,000 nodes (planned.py). Every measurement
is appended to `results/planning.jsonl` at once; `results/planning.md` is written from all of it.

    python benchmarks/planning.py                                  what is missing
    python benchmarks/planning.py --rows 'known/*' 'scaling/*'    some rows
    python benchmarks/planning.py --again                          measure anew
    python benchmarks/planning.py --list | --table                 what there is, what is done | only the table

Measure on an idle machine: the costs are of processor time, the training is of wall time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import planned
from namespaces import why_not
from observing import steady_rate
from peers import EPOCHS, MATCHED
from planned import TARGET
from rows import Entry, Measurement, Store, chosen, digest, line, measure_all, parser_of, scratch, shoal, where_and_when
from speed import WAITING
from waiting import blocking_seconds, fixed

from shoal.config import RunConfig, StopConfig
from shoal.engines.coordinator import Coordinator
from shoal.engines.plan import Plan
from shoal.experience.ring import allocate
from shoal.experience.schema import rollout_schema
from shoal.planning.inputs import DRIVER_LOOK_US, DRIVER_UPDATE_US
from shoal.planning.pipeline import simulate
from shoal.planning.system import Driver, Links, StepCosts, System
from shoal.types import EnvironmentSpec, FieldSpec, LeafSpec

REPEATS = 3
LOOK_SECONDS = 1.0
GROUPS = (40, 400, 4000)
STEP_MS, ACTORS = 20.0, 2  # of the rows known/*
IMPALA = (
    "--algorithm",
    "impala",
    "--preset",
    "none",
    "--sampling.groups",
    "4",
    "--sampling.group-size",
    "16",
    "--sampling.rollout-length",
    "32",
)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A training on one machine. costs_of: options with which the costs are measured beside, so that the plan is of a run that no trial was like."""

    name: str
    environment: str
    options: tuple[str, ...]
    costs_of: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return " ".join([self.environment, *self.options])


ROWS = (
    Row("CartPole-v1 ppo", "CartPole-v1", (*MATCHED.split(), *EPOCHS.split())),
    Row("CartPole-v1 appo", "CartPole-v1", (*MATCHED.split(), *EPOCHS.split(), "--algorithm", "appo")),
    Row("CartPole-v1 impala", "CartPole-v1", IMPALA),
    Row("CartPole-v1 impala sync", "CartPole-v1", (*IMPALA, "--mode", "sync")),
    Row("ppo from 1 actor", "CartPole-v1", (*MATCHED.split(), *EPOCHS.split()), ("--actors", "1")),
    Row("ppo from rollouts of 512", "CartPole-v1", (*MATCHED.split(), *EPOCHS.split()), ("--sampling.rollout-length", "512")),
    Row("impala from sync", "CartPole-v1", IMPALA, ("--mode", "sync")),
    Row("waiting fixed", "benchmarks/waiting.py:fixed", WAITING),
    Row("waiting exponential", "benchmarks/waiting.py:exponential", WAITING),
    Row("waiting fixed sync", "benchmarks/waiting.py:fixed", (*WAITING, "--mode", "sync")),
)


def beside(row: Row, options: argparse.Namespace) -> Figures:
    """One training, and what is predicted for it from costs that are measured right before and right after it."""
    seconds = f"{options.costs_seconds:g}"
    others = ["bench", "costs", row.environment, *row.options, *row.costs_of, "--seconds", seconds, "--json"]
    before = shoal(others) if row.costs_of else None
    length = ("--stop.seconds", f"{options.seconds:g}", "--seconds", "0" if row.costs_of else seconds)
    trained = shoal(["bench", "train", row.environment, *row.options, *length, "--json"])
    costs = trained if before is None else planned.mean(before, shoal(others))
    with scratch(options.runs) as directory:
        file = directory / "costs.json"
        file.write_text(json.dumps(costs), encoding="utf-8")
        found = shoal(["plan", row.environment, *row.options, "--costs", str(file), "--json"])
    return compared(trained, found["rows"][0])


def compared(trained: dict[str, Any], planned: dict[str, Any]) -> Figures:
    """Error is the prediction's: positive where it is too high."""
    measured, predicted = trained["env_steps_per_second"], planned["env_steps_per_second"]
    return {
        "measured": measured,
        "predicted": predicted,
        "error": predicted / measured - 1.0,
        "ceiling": trained["ceiling"],
        "lag": trained["result"]["lag"]["mean"],
        "lag_predicted": planned["lag"]["mean"],
        "bottleneck": planned["bottleneck"]["name"],
        "update_us": driver_update_us(trained),
    }


def driver_update_us(trained: dict[str, Any]) -> float | None:
    """What the supervisor took for each update besides words and decisions; None where the system does not tell."""
    share = trained["processor"].get("supervisor")
    if share is None:
        return None
    batch, transport = trained["settings"]["batch_env_steps"], trained["transport"]
    per_step = 1e4 * share * trained["cores"] / trained["env_steps_per_second"]
    return float(batch * (per_step - transport["words"] - transport["decide"]))


# ---- known times -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Known:
    """A training whose steps and updates sleep for known times, so that only the pipeline itself is predicted: no core is scarce, no cost is measured."""

    name: str
    mode: Literal["sync", "async"]
    learn: float  # time of an update for each env step, in steps of an environment
    groups: int = 4
    batch: int | None = None
    lag: int = 4

    @property
    def options(self) -> tuple[str, ...]:
        told = {
            "env.form": "python", "env.kwargs.seconds": 1e-3 * STEP_MS, "algorithm": "benchmarks/known.py:Known", "algorithm.step_seconds": 1e-3 * STEP_MS * self.learn,
            "mode": self.mode, "actors": ACTORS, "preset": "none", "sampling.groups": self.groups, "sampling.group_size": 2, "sampling.rollout_length": 8,
        }  # fmt: skip
        if self.mode == "async":
            told |= {"max_policy_lag": self.lag} | ({} if self.batch is None else {"sampling.batch_rollouts": self.batch})
        return tuple(text for key, value in told.items() for text in (f"--{key.replace('_', '-')}", str(value)))

    def system(self, step_seconds: float) -> System:
        config = RunConfig(mode=self.mode, max_policy_lag=self.lag)
        config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = self.groups, 2, 8
        config.sampling.batch_rollouts = self.batch
        costs = StepCosts(step_seconds, 0.0, 1e-3 * STEP_MS * self.learn, own_device=True)
        return System(Plan.of(config), 1, ACTORS, ACTORS, 1, costs, Links(0.0, 1.0, 1.0), Driver(0.0))


KNOWN = (
    Known("known/sync", "sync", 0.5),
    Known("known/sync uneven", "sync", 0.5, groups=3),
    Known("known/async actors", "async", 0.2),
    Known("known/async learner", "async", 1.0),
    Known("known/async even", "async", 0.5),
    Known("known/async uneven", "async", 0.2, groups=3),
    Known("known/async small batch", "async", 0.4, batch=1),
    Known("known/async lag 1", "async", 0.5, lag=1),
)


def beside_known(row: Known, options: argparse.Namespace) -> Figures:
    """A training, and the model with the times that it was told; of a step, what the system's sleep adds is measured."""
    step = blocking_seconds(partial(fixed, 1e-3 * STEP_MS), 1e-3 * STEP_MS)
    with scratch(options.runs) as directory:
        length = ("--stop.seconds", f"{options.known_seconds:g}", "--run-dir", str(directory / "run"), "--json")
        trained = shoal(["train", "benchmarks/waiting.py:fixed", *row.options, *length])
        measured = steady_rate(directory / "run")
    planned = simulate(row.system(step))
    predicted = planned.env_steps_per_second
    lag = {"lag": trained["lag"]["mean"], "lag_predicted": planned.lag_mean}
    return {"measured": measured, "predicted": predicted, "error": predicted / measured - 1.0, **lag}


# ---- the driver ------------------------------------------------------------------------------------------------------
def looks(groups: int) -> Figures:
    """Microseconds of the coordinator for each group, whenever it looks what may be begun and nothing may be."""
    config = RunConfig(mode="async")
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = groups, 1, 1
    plan = Plan.of(config)
    leaf, action = (
        LeafSpec((), "box", "float32", (1,), low=(0.0,), high=(1.0,)),
        LeafSpec((), "discrete", "int64", (), nvec=(2,), start=(0,)),
    )
    spec = EnvironmentSpec("bench", (leaf,), action)
    ring = allocate(rollout_schema(spec, [FieldSpec("action", "int64", (), "T")], 1, 1), plan.num_slots)
    coordinator = Coordinator(plan, spec, ring, StopConfig())
    coordinator.place(range(groups))
    begun = time.process_time()
    leases = len(coordinator.next_leases())
    leasing, found = time.process_time() - begun, []
    end = time.perf_counter() + LOOK_SECONDS
    while time.perf_counter() < end or not found:
        begun = time.process_time()
        coordinator.next_leases()
        found.append(time.process_time() - begun)
    return {"groups": groups, "look_us": 1e6 * median(found) / groups, "lease_us": 1e6 * leasing / leases}


# ---- the bench -------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    store = Store(options.results, "planning", lambda entry: (entry["row"], entry["seed"]), page)
    clusters = {f"scaling/{row.name}": row for row in planned.ROWS}
    names = chosen([*(row.name for row in (*ROWS, *KNOWN)), *map(_driver_row, GROUPS), *clusters, *planned.TABLES], options.rows)
    if any(row.on_hosts for name, row in clusters.items() if name in names) and (why := why_not()):
        print(f"rows on hosts are left out: {why}", file=sys.stderr)
        clusters = {name: row for name, row in clusters.items() if not row.on_hosts}
    settings = [options.seconds, options.costs_seconds]
    wanted = [
        Measurement(
            row.name, n, (row.name, n), digest([row.command, *row.costs_of, *settings]), partial(_training, row, n, options), _brief
        )
        for row in ROWS
        for n in range(options.repeats)
        if row.name in names
    ]
    wanted += [
        Measurement(
            _driver_row(groups), 0, (_driver_row(groups), 0), digest([groups, LOOK_SECONDS]), partial(_driver, groups), _brief_driver
        )
        for groups in GROUPS
        if _driver_row(groups) in names
    ]
    wanted += [
        Measurement(row.name, 0, (row.name, 0), digest([*row.options, options.known_seconds]), partial(_known, row, options), _brief)
        for row in KNOWN
        if row.name in names
    ]
    wanted += [
        Measurement(name, n, (name, n), digest([row.command, row.on_hosts, *settings]), partial(_on_cluster, name, row, n, options), _brief)
        for name, row in clusters.items()
        if name in names
        for n in range(options.repeats)
    ]
    wanted += [
        Measurement(
            name,
            0,
            (name, 0),
            digest([planned.TABLE, learners, options.costs_seconds]),
            partial(_table, name, learners, options),
            _brief_table,
        )
        for name, learners in planned.TABLES.items()
        if name in names
    ]
    return measure_all(wanted, store, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "planning")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="measurements of each training")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each training")
    parser.add_argument("--costs-seconds", type=float, default=6.0, help="for the costs of its parts")
    parser.add_argument("--known-seconds", type=float, default=30.0, help="of each training of known/*")
    return parser.parse_args(arguments)


def _driver_row(groups: int) -> str:
    return f"driver/{groups}"


def _training(row: Row, repeat: int, options: argparse.Namespace) -> Entry:
    return {"row": row.name, "seed": repeat, "command": row.command, "figures": beside(row, options)}


def _known(row: Known, options: argparse.Namespace) -> Entry:
    return {"row": row.name, "seed": 0, "command": " ".join(row.options), "figures": beside_known(row, options)}


def _driver(groups: int) -> Entry:
    return {"row": _driver_row(groups), "seed": 0, "command": "benchmarks/planning.py", "figures": looks(groups)}


def _on_cluster(name: str, row: planned.scaling.Row, repeat: int, options: argparse.Namespace) -> Entry:
    return {"row": name, "seed": repeat, "command": row.command, "figures": planned.beside_cluster(row, repeat, options)}


def _table(name: str, learners: int, options: argparse.Namespace) -> Entry:
    return {"row": name, "seed": 0, "command": " ".join(planned.TABLE), "figures": planned.table(learners, options)}


def _brief_table(entry: Entry) -> str:
    return planned.broken(entry["figures"]["breaks"])


def _brief(entry: Entry) -> str:
    figures = entry["figures"]
    return f"{figures['measured']:,.0f} env steps/s, predicted {figures['predicted']:,.0f} ({figures['error']:+.1%})"


def _brief_driver(entry: Entry) -> str:
    figures = entry["figures"]
    return f"{figures['look_us']:.2f} us a look and group, {figures['lease_us']:.1f} us a lease"


# ---- the table -------------------------------------------------------------------------------------------------------
def page(store: Store) -> Iterator[str]:
    yield "# Predictions beside measurements\n"
    yield "Made by `make bench-plan` (`benchmarks/planning.py`); raw rows in `planning.jsonl`.\n"
    yield from where_and_when(list(store.entries.values()))
    yield (
        "Every training beside what `shoal plan` says from the costs of its parts and from trials of a few seconds with another seed, which were measured right before and right after it. In rows `A from B` costs and trials are those of another number of actors, length of rollouts or mode. The error is the prediction's: "
        f"positive where it is too high; the target is {TARGET:.0%} either way. Medians; in brackets the least and the largest error. lag: mean policy lag in "
        "updates, measured and predicted.\n"
    )
    yield line("row", "`shoal train`", "measurements", "env steps/s", "ceiling", "predicted", "error", "lag", "bottleneck", "reached")
    yield line(*["---"] * 10)
    for row in ROWS:
        entries = [entry for key, entry in sorted(store.entries.items()) if key[0] == row.name]
        if entries:
            yield _line(row, entries)
    loads = [entry["load"] for key, entry in store.entries.items() if key[0] in {row.name for row in ROWS}]
    if loads:
        yield f"\nLoad of the machine, this bench's own part (about 2) included: {min(loads):.1f} to {max(loads):.1f}. Rows that are missing are not measured yet.\n"
    yield "\n## Clusters on this machine\n"
    yield (
        "The runs of [scaling](scaling.md), beside what `shoal plan --engine ray --one-machine` says from the means of the costs that were measured right before and right after them, and from the link of "
        "their cluster: latency is half of a small call, Gbit/s of messages of 4 MiB, us a message the processor time of a call at one end.\n"
    )
    yield from planned.cluster_lines(store.entries.values())
    yield "\n## 1 to 10,000 nodes\n"
    yield from planned.table_lines(list(store.entries.values()))
    yield "\n## Known times\n"
    yield (
        f"Steps sleep for {STEP_MS:g} ms and updates for a known share of that for each of their env steps, {ACTORS} actors, groups of 2, rollouts of 8: what is predicted is the pipeline alone, who "
        "waits for whom and how old samples grow. So other programs on the machine hardly disturb it.\n"
    )
    yield line("row", "an update, steps", "groups", "env steps/s", "predicted", "error", "lag, measured", "predicted")
    yield line(*["---"] * 8)
    for row in KNOWN:
        if entry := store.entries.get((row.name, 0)):
            f = entry["figures"]
            rates = (f"{f['measured']:,.0f}", f"{f['predicted']:,.0f}", f"{f['error']:+.1%}")
            yield line(row.name, f"{row.learn:g}", row.groups, *rates, f"{f['lag']:.2f}", f"{f['lag_predicted']:.2f}")
    drivers = [store.entries[key] for groups in GROUPS if (key := (_driver_row(groups), 0)) in store.entries]
    updates = [u for entry in store.entries.values() if (u := entry["figures"].get("update_us")) is not None]
    yield "\n## The driver\n"
    if updates:
        yield (
            f"An update takes the supervisor {median(updates):,.0f} us besides words and decisions (median of {len(updates)} trainings, {min(updates):,.0f} to "
            f"{max(updates):,.0f}); a plan takes what it took in the trial, and {DRIVER_UPDATE_US:,.0f} without one.\n"
        )
    yield f"A look at what may be begun, by the number of groups; a plan takes {DRIVER_LOOK_US:g} us a group.\n"
    yield line("groups", "us a look and group", "us a lease, all at once")
    yield line(*["---"] * 3)
    for entry in drivers:
        yield line(f"{entry['figures']['groups']:,}", f"{entry['figures']['look_us']:.2f}", f"{entry['figures']['lease_us']:.1f}")


def _line(row: Row, entries: Sequence[Entry]) -> str:
    def of(name: str) -> list[float]:
        return [entry["figures"][name] for entry in entries]

    error = median(of("error"))
    around = f" ({min(of('error')):+.1%} to {max(of('error')):+.1%})" if len(entries) > 1 else ""
    return line(
        row.name, f"`{row.command}`", len(entries), *(f"{median(of(name)):,.0f}" for name in ("measured", "ceiling", "predicted")), f"{error:+.1%}{around}",
        f"{median(of('lag')):.2f}, {median(of('lag_predicted')):.2f}", entries[-1]["figures"]["bottleneck"] or "-", "yes" if abs(error) <= TARGET else "no",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
