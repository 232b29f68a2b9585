"""What `make bench-async` measures: what staleness costs, and what working at the same time gives, per environment step and per second.

Sync PPO; APPO and IMPALA at a lag of 1, 2, 4, 8 and 16 updates, with V-trace's correction and without it (`uncorrected`); and both as users have them
(`shipped-BOUND`). Every run has the same budget of environment steps, and the preset's settings otherwise; its curve is recorded after every update, and its
final policy is evaluated. Every measurement is appended to `results/asynchrony.jsonl` as soon as it is there, so that a bench that was cut off goes on with
the next one (seed by seed, so that it may be ended early). `results/asynchrony.md` and `docs/figures/asynchrony.png` are written from all of it.

**Which lag?** As shipped, at most two batches are ahead of the learner, and with environments that are alike the lag stays about 2, seldom 3, whatever `max_policy_lag`
allows: larger bounds cannot bite. So the rows `lag-L` keep the queue full, L batches deep (curve.py): the lag is what the row says, and nothing else differs.

    python benchmarks/asynchrony.py                                       what is missing
    python benchmarks/asynchrony.py --rows 'CartPole-v1/*' --seeds 3      some rows, fewer seeds
    python benchmarks/asynchrony.py --again                               measure anew
    python benchmarks/asynchrony.py --list | --table                      what there is, what is done | only table and figure
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rows import (
    Entry,
    Measurement,
    Store,
    answer_of,
    chosen,
    code_line,
    codes,
    digest,
    line,
    measure_all,
    parser_of,
    scratch,
    where_and_when,
)

from shoal.settings import resolve

CURVE = Path(__file__).with_name("curve.py")
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "asynchrony.png"
SEEDS = 5
EPISODES = 20
CURVE_POINTS = 40
LAGS = (1, 2, 4, 8, 16)
RUN_SECONDS = 900.0  # of one run; none takes a tenth of it on an idle machine


@dataclass(frozen=True)
class Task:
    """An environment, how many environment steps every run has, and a mean training return whose time is told."""

    environment: str
    env_steps: int
    threshold: float
    schedule_env_steps: int | None = None  # where the preset's schedules end


TASKS = (Task("CartPole-v1", 80_000, 300), Task("LunarLander-v3", 250_000, 50, 983_040))
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {  # where there is no preset
    ("LunarLander-v3", "impala"): {
        "algorithm.learning_rate": 1e-3,
        "algorithm.learning_rate_schedule": "linear",
        "algorithm.gamma": 0.999,
        "algorithm.vtrace_lambda": 0.98,
        "algorithm.entropy_coefficient": 0.002,
        "algorithm.normalise_advantage": True,
        "sampling.rollout_length": 32,
        "sampling.batch_rollouts": 2,
    }
}


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
      bound: max_policy_lag; None in sync mode.
      full: the queue is kept `bound` batches deep, so that the bound bites.
    """

    task: Task
    algorithm: str
    bound: int | None = None
    vtrace: bool = True
    full: bool = True

    @property
    def name(self) -> str:
        if self.bound is None:
            return f"{self.task.environment}/{self.algorithm}"
        kind = f"{'lag' if self.full else 'shipped'}-{self.bound}"
        return f"{self.task.environment}/{self.algorithm}/{kind}{'' if self.vtrace else '/uncorrected'}"

    def settings(self, seed: int) -> dict[str, Any]:
        """As `shoal.train` takes them."""
        task = self.task
        chosen_ones: dict[str, Any] = {"algorithm": self.algorithm, "seed": seed, "stop.env_steps": task.env_steps}
        chosen_ones |= {"evaluation.episodes": EPISODES} | SETTINGS.get((task.environment, self.algorithm), {})
        if task.schedule_env_steps is not None:
            chosen_ones["algorithm.schedule_env_steps"] = task.schedule_env_steps
        if self.bound is not None:
            chosen_ones |= {"max_policy_lag": self.bound, "algorithm.vtrace": self.vtrace}
        return chosen_ones


def _rows() -> Iterator[Row]:
    for task in TASKS:
        yield Row(task, "ppo")
        for algorithm in ("appo", "impala"):
            for vtrace in (True, False):
                yield from (Row(task, algorithm, lag, vtrace) for lag in LAGS)
            yield Row(task, algorithm, 4, full=False)
        if task.environment == "CartPole-v1":  # that a larger bound changes nothing is shown once
            yield from (Row(task, algorithm, 16, full=False) for algorithm in ("appo", "impala"))


ROWS = tuple(_rows())


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    store = Store(options.results, "asynchrony", lambda entry: (entry["row"], entry["seed"]), page)
    names = chosen((row.name for row in ROWS), options.rows)
    wanted = [
        Measurement(row.name, seed, (row.name, seed), settings_of(row, seed), partial(measure, row, seed, options.runs), brief)
        for seed in range(options.seeds)
        for row in ROWS
        if row.name in names
    ]
    code = measure_all(wanted, store, options)
    if not options.list and store.entries:
        draw(store, options.figure)
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "asynchrony")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds per row, from 0 (default: {SEEDS})")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the figure is written")
    return parser.parse_args(arguments)


# ---- one measurement -------------------------------------------------------------------------------------------------
def settings_of(row: Row, seed: int) -> str:
    """A digest of what the settings resolve to, defaults apart, and of the depth at which the queue is kept."""
    config, _ = resolve(
        row.task.environment, {**row.settings(seed), "actors": 1}
    )  # actors: by the machine's cores, which are said elsewhere
    return digest([config.model_dump(mode="json", by_alias=True, exclude_defaults=True), row.full and row.bound])


def measure(row: Row, seed: int, runs: Path) -> Entry:
    """Train once, and sum it up. Raises CommandError."""
    settings, depth = row.settings(seed), [str(row.bound)] if row.full and row.bound else []
    with scratch(runs) as directory:
        given = json.dumps({**settings, "run_dir": str(directory / "run")})
        told = answer_of([sys.executable, str(CURVE), row.task.environment, given, *depth], RUN_SECONDS)
    return {
        "row": row.name,
        "seed": seed,
        "command": f"curve.py {row.task.environment} {json.dumps(settings)} {' '.join(depth)}".strip(),
    } | summary(told, row.task)


def summary(told: Entry, task: Task) -> Entry:
    """What is kept of a run: the figures of the table, and CURVE_POINTS of its curve."""
    result, steps, seconds, returns = told["result"], told["env_steps"], told["seconds"], told["mean_return"]
    first = next((i for i, value in enumerate(returns) if value >= task.threshold), None)
    return {
        "env_steps": result["env_steps"],
        "updates": result["updates"],
        "seconds": round(result["seconds"], 2),
        "env_steps_per_second": round(result["env_steps_per_second"]),
        "lag": result["lag"],
        "dropped": result["ledger"]["dropped"],
        "area": round(area(steps, returns, task.env_steps), 2),
        "final": round(returns[-1], 2),
        "evaluated": round(result["evaluation"]["mean_return"], 2),
        "threshold": None if first is None else {"env_steps": steps[first], "seconds": round(seconds[first], 2)},
        "curve": curve(steps, seconds, returns, task.env_steps),
    }


def area(at: Sequence[float], value: Sequence[float], end: float) -> float:
    """Mean of a curve over 0 to `end`: the area under it, divided by `end`. Each value holds until the next one; the first also before it."""
    edges = [0.0, *(min(x, end) for x in at[1:]), end]
    return sum((right - left) * y for (left, right), y in zip(pairwise(edges), value, strict=True)) / end


def curve(env_steps: Sequence[int], seconds: Sequence[float], returns: Sequence[float], end: int) -> dict[str, list[float]]:
    """The curve at CURVE_POINTS equal distances of environment steps up to `end`: mean return, and the second at which it was reached."""
    places = [max(0, bisect_right(env_steps, end * (k + 1) / CURVE_POINTS) - 1) for k in range(CURVE_POINTS)]
    return {"mean_return": [round(returns[i], 1) for i in places], "seconds": [round(seconds[i], 2) for i in places]}


def brief(entry: Entry) -> str:
    return f"{entry['area']:.0f} on average, {entry['evaluated']:.0f} evaluated, lag {entry['lag']['mean']:.1f}, {entry['seconds']:.0f} s"


# ---- the table -------------------------------------------------------------------------------------------------------
def entries_of(store: Store, row: Row) -> list[Entry]:
    return [entry for key, entry in sorted(store.entries.items()) if key[0] == row.name]


def page(store: Store) -> Iterator[str]:
    known = [entry for row in ROWS for entry in entries_of(store, row)]
    yield "# Sync or async, and how stale\n"
    yield "Made by `make bench-async` (`benchmarks/asynchrony.py`); raw rows in `asynchrony.jsonl`, the figure in `docs/figures/asynchrony.png`.\n"
    yield from where_and_when(known)
    yield (
        "Median over the seeds, and in brackets the least and the largest (with five seeds: a 94 % interval of the median, whatever the distribution). "
        "Lag: updates between the policy that chose an action and the one that learned from it, mean and maximum over all trained steps. "
        "Return per step: the mean of the training curve (last 100 episodes) over the whole budget of environment steps, which is the area under it; "
        "return per second: the same over the first seconds of the run, as many for all runs of an environment. Final: the end of the training curve; "
        f"evaluated: {EPISODES} episodes of the final policy. Rows `lag-L`: the queue is kept full, L batches deep; rows `shipped-B`: as users have it, with "
        f"max_policy_lag B. Seconds count from the first environment step. {code_line()}"
    )
    for task in TASKS:
        rows = [row for row in ROWS if row.task is task and entries_of(store, row)]
        if rows:
            yield from _section(store, task, rows)


def _section(store: Store, task: Task, rows: Sequence[Row]) -> Iterator[str]:
    horizon = horizon_of([entry for row in rows for entry in entries_of(store, row)])
    yield f"\n## {task.environment}, {task.env_steps:,} environment steps\n"
    yield line(
        "configuration", "seeds", "lag, mean (max)", "steps an update", "return per step", f"return per second (first {horizon:.0f} s)", "final",
        "evaluated", f"env steps to {task.threshold:g}", f"seconds to {task.threshold:g}", "env steps/s", "code",
    )  # fmt: skip
    yield line(*["---"] * 12)
    for row in rows:
        found = entries_of(store, row)
        yield line(
            row.name.partition("/")[2], len(found), f"{fmean(e['lag']['mean'] for e in found):.1f} ({max(e['lag']['max'] for e in found)})",
            f"{fmean(e['env_steps'] / e['updates'] for e in found):,.0f}", spread([e["area"] for e in found]),
            spread([by_second(e, horizon) for e in found]), spread([e["final"] for e in found]), spread([e["evaluated"] for e in found]),
            reached_at(found, "env_steps"), reached_at(found, "seconds"), spread([e["env_steps_per_second"] for e in found]), codes(found),
        )  # fmt: skip


def horizon_of(entries: Sequence[Entry]) -> float:
    """Seconds over which runs of one environment are compared: the median of their durations."""
    return median(entry["seconds"] for entry in entries)


def by_second(entry: Entry, horizon: float) -> float:
    """Mean of the curve over the first `horizon` seconds; a run that had ended by then stays where it was."""
    return area(entry["curve"]["seconds"], entry["curve"]["mean_return"], horizon)


def spread(values: Sequence[float]) -> str:
    """`median (least to largest)`."""
    return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def reached_at(entries: Sequence[Entry], unit: str) -> str:
    """Median of when the threshold was reached, where most seeds did, and how many."""
    times = [math.inf if entry["threshold"] is None else entry["threshold"][unit] for entry in entries]
    number = sum(map(math.isfinite, times))
    middle = median(times)
    return f"{f'{middle:,.0f}' if math.isfinite(middle) else 'not reached'} ({number} of {len(times)})"


# ---- the figure ------------------------------------------------------------------------------------------------------
COLOURS = {"ppo": "black", "appo": "tab:blue", "impala": "tab:orange"}
CURVES = ("ppo", "appo/lag-1", "appo/lag-16", "appo/lag-16/uncorrected", "impala/lag-1", "impala/lag-16", "impala/lag-16/uncorrected")


def draw(store: Store, path: Path) -> None:
    """For each environment: the median curves over environment steps and over seconds, and the return per step at each lag."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no figure: matplotlib is not installed (pip install '.[bench]')", file=sys.stderr)
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in TASKS if any(entries_of(store, row) for row in ROWS if row.task is task)]
    figure, axes = plt.subplots(len(tasks), 3, figsize=(15, 4.2 * len(tasks)), squeeze=False, layout="constrained")
    for task, (by_step, by_time, by_lag) in zip(tasks, axes, strict=True):
        rows = [row for row in ROWS if row.task is task and entries_of(store, row)]
        _draw_curves(by_step, by_time, task, [(row, entries_of(store, row)) for row in rows])
        _draw_lags(by_lag, task, [(row, entries_of(store, row)) for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"{path} is written", file=sys.stderr)


def _draw_curves(by_step: Any, by_time: Any, task: Task, rows: Sequence[tuple[Row, list[Entry]]]) -> None:
    steps = [task.env_steps * (k + 1) / CURVE_POINTS for k in range(CURVE_POINTS)]
    for row, entries in rows:
        label = row.name.partition("/")[2]
        if label not in CURVES:
            continue
        style = {"color": COLOURS[row.algorithm], "ls": "-" if (row.bound or 1) == 1 else "--" if row.vtrace else ":", "label": label}
        returns = [median(values) for values in zip(*(e["curve"]["mean_return"] for e in entries), strict=True)]
        seconds = [median(values) for values in zip(*(e["curve"]["seconds"] for e in entries), strict=True)]
        by_step.plot(steps, returns, **style)
        by_time.plot(seconds, returns, **style)
    by_step.set(title=f"{task.environment}: by environment step", xlabel="environment steps", ylabel="mean return, last 100 episodes")
    by_time.set(title=f"{task.environment}: by second", xlabel="seconds since the first step")
    by_step.legend(fontsize="small")


def _draw_lags(axes: Any, task: Task, rows: Sequence[tuple[Row, list[Entry]]]) -> None:
    for algorithm in ("appo", "impala"):
        for vtrace in (True, False):
            of_lag = [(row.bound, [e["area"] for e in entries]) for row, entries in rows
                      if row.algorithm == algorithm and row.full and row.bound and row.vtrace is vtrace]  # fmt: skip
            if of_lag:
                middle = [median(values) for _, values in of_lag]
                below = [median(values) - min(values) for _, values in of_lag]
                above = [max(values) - median(values) for _, values in of_lag]
                style = {"color": COLOURS[algorithm], "ls": "-" if vtrace else ":", "marker": "o", "capsize": 3}
                axes.errorbar(
                    [lag for lag, _ in of_lag], middle, [below, above], label=algorithm + ("" if vtrace else ", uncorrected"), **style
                )
    sync = [e["area"] for row, entries in rows if row.bound is None for e in entries]
    if sync:
        axes.axhspan(min(sync), max(sync), color="black", alpha=0.12)
        axes.axhline(median(sync), color="black", label="ppo, sync")
    axes.set_xscale("log", base=2)
    axes.set_xticks(LAGS, [str(lag) for lag in LAGS])
    axes.set(title=f"{task.environment}: what staleness costs", xlabel="lag in updates", ylabel="return per step: mean over the budget")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    sys.exit(main())
