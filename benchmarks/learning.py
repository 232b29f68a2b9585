"""What `make bench-learning` measures: whether every algorithm learns, through the command line, as a user would.

For each row and seed: `shoal train ENV --algorithm A --seed S --json`, then `shoal evaluate RUN --episodes 100 --json`. Every measurement is
appended to `results/learning.jsonl` as soon as it is there, so that a bench that was cut off goes on with the next one; what was measured with
other settings (a preset that changed since) is measured again. `results/learning.md` is written from all of it.

    python benchmarks/learning.py                                  what is missing
    python benchmarks/learning.py --rows 'CartPole-v1/*' --seeds 5 some rows, more seeds
    python benchmarks/learning.py --again                          measure anew
    python benchmarks/learning.py --list | --table                 what there is, what is done | only the table
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist, fmean

from rows import Entry, Measurement, Store, chosen, digest, line, measure_all, parser_of, scratch, shoal, where_and_when

from shoal.config import RunConfig
from shoal.monitoring.store import RunReader
from shoal.settings import resolve

EPISODES = 100
CURVE_POINTS = 60
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      target: mean return of the evaluation that every seed has to reach; None where only the curve counts, or the ceiling.
      ceiling: mean return of the evaluation that no seed may pass: the row shows what cannot be learned so.
      memory: of the policy; named beside the algorithm.
      seeds: how many, from 0.
      options: of `shoal train`, besides environment, algorithm and seed; as for any user, the rest is the preset's.
      env_steps_limit: what the target has to be reached within. A run ends with a whole update; where the preset's last one goes beyond, `options` stop
        before it.
      curve: keep the training curve.
      note: for the table.
    """

    environment: str
    algorithm: str
    target: float | None
    seeds: int = 3
    options: tuple[str, ...] = ()
    env_steps_limit: int | None = None
    curve: bool = False
    note: str = ""
    ceiling: float | None = None
    memory: str | None = None

    @property
    def name(self) -> str:
        return f"{self.environment}/{self.label}"

    @property
    def label(self) -> str:
        """The algorithm as tables name it."""
        return self.algorithm if self.memory is None else f"{self.algorithm}+{self.memory}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `shoal train` is told besides environment, algorithm and seed."""
        return self.options if self.memory is None else (*self.options, "--policy.memory", self.memory)


HIDDEN, RECALL = "examples/memory.py:hidden_velocities", "examples/memory.py:Recall"
HIDDEN_OPTIONS = (
    "--sampling.rollout-length", "64", "--policy.hidden-sizes", "64", "--policy.normalise-observations", "true", "--policy.normalise-rewards", "true",
    "--algorithm.minibatch-size", "512", "--algorithm.epochs", "6", "--algorithm.learning-rate", "1e-3", "--algorithm.gamma", "0.98",
    "--stop.return", "475", "--stop.env-steps", "250000",
)  # fmt: skip
HIDDEN_R2D2 = (  # those of the preset of CartPole-v1, and more steps
    "--sampling.rollout-length", "16", "--policy.hidden-sizes", "64", "--replay.sequence-length", "24", "--replay.burn-in", "4",
    "--replay.samples-per-insert", "48", "--replay.alpha", "0.6", "--algorithm.batch-size", "16", "--algorithm.learning-rate", "5e-4",
    "--algorithm.learning-rate-schedule", "linear", "--algorithm.epsilon", "annealed", "--algorithm.epsilon-final", "0.02",
    "--algorithm.epsilon-env-steps", "10000", "--stop.return", "490", "--stop.env-steps", "250000",
)  # fmt: skip
RECALL_OPTIONS = (  # a rollout holds two episodes
    "--sampling.rollout-length", "102", "--policy.hidden-sizes", "64", "--algorithm.minibatch-size", "816", "--algorithm.epochs", "6",
    "--algorithm.learning-rate", "2e-3", "--algorithm.learning-rate-schedule", "linear", "--algorithm.entropy-coefficient", "0.003",
    "--stop.env-steps", "300000",
)  # fmt: skip

ROWS = (
    *(Row("CartPole-v1", algorithm, 475) for algorithm in ("ppo", "appo", "impala", "dqn", "r2d2")),
    *(Row("Acrobot-v1", algorithm, -100) for algorithm in ("ppo", "appo")),
    Row("Pendulum-v1", "ppo", -200),
    *(Row("Pendulum-v1", algorithm, -200, env_steps_limit=20_000) for algorithm in ("sac", "td3")),
    Row("MountainCarContinuous-v0", "ppo", 90),
    *(Row("LunarLander-v3", algorithm, 200, env_steps_limit=1_000_000) for algorithm in ("ppo", "appo")),
    Row("LunarLander-v3", "dqn", 200, options=("--stop.return", "225", "--stop.env-steps", "499968"), env_steps_limit=500_000),
    Row("LunarLanderContinuous-v3", "sac", 200),
    Row(
        "HalfCheetah-v5",
        "sac",
        5000,
        options=("--stop.seconds", "3600", "--stop.env-steps", "299968"),
        env_steps_limit=300_000,
        note="within 300,000 env steps or an hour",
    ),
    Row(HIDDEN, "ppo", 400, options=HIDDEN_OPTIONS, memory="lstm"),
    Row(HIDDEN, "ppo", None, options=HIDDEN_OPTIONS, memory="none", ceiling=200),
    Row(HIDDEN, "r2d2", 400, options=HIDDEN_R2D2),
    *(Row(RECALL, "ppo", 0.95, options=RECALL_OPTIONS, memory=memory) for memory in ("lstm", "gru")),
    Row(
        RECALL,
        "ppo",
        None,
        options=RECALL_OPTIONS,
        memory="none",
        ceiling=0.4,
        note="the share of right answers: 0.25 by chance, since there are four cues; of 100 guesses more than 40 are right once in 3,000 times",
    ),
    Row("HalfCheetah-v5", "ppo", 1500, seeds=1, note="published PPO figures: 1,500 to 3,000"),
    Row(
        "ALE/Pong-v5",
        "ppo",
        None,
        seeds=1,
        options=("--preset", "ALE-cpu", "--stop.seconds", "1800"),
        curve=True,
        note="30 minutes, the preset for machines without a GPU; the curve has to rise",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    store = Store(options.results, "learning", _key, _page)
    names = chosen((row.name for row in ROWS), options.rows)
    rows = [row for row in ROWS if row.name in names]
    wanted = [
        Measurement(
            row.name, seed, (row.name, seed), settings_of(row, seed), partial(measure, row, seed, options.episodes, options.runs), brief
        )
        for row in rows
        for seed in range(options.seeds or row.seeds)
    ]
    return measure_all(wanted, store, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "learning")
    parser.add_argument("--seeds", type=int, help="seeds per row, from 0 (default: 3, or 1 for the long rows)")
    parser.add_argument("--episodes", type=int, default=EPISODES, help=f"evaluation episodes of each seed (default: {EPISODES})")
    return parser.parse_args(arguments)


# ---- one measurement -------------------------------------------------------------------------------------------------
def measure(row: Row, seed: int, episodes: int, runs: Path) -> Entry:
    """Train and evaluate once. Raises CommandError."""
    with scratch(runs) as directory:
        run = directory / "run"
        begun = time.monotonic()
        command = ["train", row.environment, "--algorithm", row.algorithm, "--seed", str(seed), *row.arguments]
        trained = shoal([*command, "--run-dir", str(run), "--json"])
        train_seconds = time.monotonic() - begun
        evaluated = shoal(["evaluate", str(run), "--episodes", str(episodes), "--json"])
        return {
            "environment": row.environment,
            "algorithm": row.label,
            "seed": seed,
            "command": " ".join(["shoal", *command, "--json"]),
            "wall_seconds": round(train_seconds, 1),
            "train": {key: value for key, value in trained.items() if key != "run"},
            "evaluate": evaluated,
            "curve": curve_of(run) if row.curve else None,
        }


def curve_of(run: Path) -> list[dict[str, float]]:
    """The training curve, CURVE_POINTS of it: env_steps, seconds, mean return of the last 100 training episodes."""
    with RunReader(run / "run.db") as reader:
        points = [p for p in reader.series("rollout/ep_rew_mean") if p.value is not None and math.isfinite(p.value)]
    last = len(points) - 1
    places = sorted({round(i * last / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)}) if points else []
    return [{"env_steps": points[i].env_steps, "seconds": round(points[i].seconds, 1), "mean_return": points[i].value} for i in places]


def config_of(row: Row, seed: int) -> RunConfig:
    """What its command resolves to."""
    overrides = {"algorithm": row.algorithm, "seed": seed, "actors": 1}  # actors: by the machine's cores, which are said elsewhere
    overrides |= {
        key.removeprefix("--").replace("-", "_"): value for key, value in zip(row.arguments[::2], row.arguments[1::2], strict=True)
    }
    return resolve(row.environment, overrides)[0]


def settings_of(row: Row, seed: int) -> str:
    """A digest of what a user's command resolves to, defaults apart, so that figures of other settings are not mistaken for these."""
    settled = config_of(row, seed).model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return digest(settled)


def brief(measured: Entry) -> str:
    trained, evaluated = measured["train"], measured["evaluate"]
    return (
        f"{evaluated['mean_return']:.1f} after {trained['env_steps']:,} env steps, {measured['wall_seconds']:.0f} s ({trained['reason']})"
    )


# ---- what was measured -----------------------------------------------------------------------------------------------
def _key(entry: Entry) -> tuple[str, int]:
    return f"{entry['environment']}/{entry['algorithm']}", entry["seed"]


def _of(store: Store, row: Row) -> list[Entry]:
    return [entry for key, entry in sorted(store.entries.items()) if key[0] == row.name]


def _page(store: Store) -> Iterable[str]:
    known = [entry for row in ROWS for entry in _of(store, row)]
    yield "# Learning\n"
    yield "Made by `make bench-learning` (`benchmarks/learning.py`); raw rows in `learning.jsonl`.\n"
    yield from where_and_when(known)
    yield (
        f"Each seed: one training with the preset, then {EPISODES} evaluation episodes. Mean: over the seeds. Interval: {CONFIDENCE:.0%} of that mean "
        "over evaluation episodes, stratified by seed (how seeds differ, the second table shows). Seconds: of the whole `shoal train` command, "
        "start-up included. Reached: the mean of every seed reaches the target.\n"
    )
    yield "| environment | algorithm | seeds | mean return | 95 % interval | worst seed | target | reached | env steps, mean (max) | wall seconds, mean |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    yield from (_summary_line(row, _of(store, row)) for row in ROWS if _of(store, row))
    yield from (f"\n{row.name}: {row.note}." for row in ROWS if row.note and _of(store, row))
    yield "\n## Each seed\n"
    yield "| environment | algorithm | seed | mean return | 95 % interval | min | max | env steps | ended by | wall seconds | env steps/s | mean lag |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    yield from (_seed_line(entry) for entry in known)
    for entry in known:
        if "gpu" in entry:
            yield f"\n{entry['environment']}/{entry['algorithm']}, seed {entry['seed']}: `{entry['command']}`, with {entry['gpu']}."
    for row in ROWS:
        for entry in _of(store, row):
            if entry.get("curve"):
                yield from _curve(entry)


def _summary_line(row: Row, entries: list[Entry]) -> str:
    evaluated = [entry["evaluate"] for entry in entries]
    means = [e["mean_return"] for e in evaluated]
    error = math.sqrt(sum(e["std_return"] ** 2 / e["episodes"] for e in evaluated)) / len(evaluated)
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    steps = [entry["train"]["env_steps"] for entry in entries]
    target = (
        f"at most {row.ceiling:g}"
        if row.ceiling is not None
        else "rises"
        if row.target is None
        else f"{row.target:g}" + (f" in {row.env_steps_limit:,} steps" if row.env_steps_limit else "")
    )
    cells = (
        row.environment, row.label, len(entries), shown(fmean(means)), f"{shown(fmean(means) - half)} to {shown(fmean(means) + half)}",
        shown(min(means) if row.ceiling is None else max(means)), target, "yes" if reached(row, entries) else "no", f"{fmean(steps):,.0f} ({max(steps):,})",
        f"{fmean(entry['wall_seconds'] for entry in entries):.0f}",
    )  # fmt: skip
    return line(*cells)


def shown(value: float) -> str:
    """A mean return: to two places where it is a share."""
    return f"{value:.2f}" if abs(value) < 2 else f"{value:.1f}"


def reached(row: Row, entries: Sequence[Entry]) -> bool:
    """Whether every seed reached the target within its env steps, or stayed under the ceiling; without either, whether every curve rises (see `rise`)."""
    if row.ceiling is not None:
        return all(entry["evaluate"]["mean_return"] <= row.ceiling for entry in entries)
    if row.target is None:
        return all(entry["curve"] and rise(entry["curve"]) > 0 for entry in entries)
    within = all(row.env_steps_limit is None or entry["train"]["env_steps"] <= row.env_steps_limit for entry in entries)
    return within and all(entry["evaluate"]["mean_return"] >= row.target for entry in entries)


def rise(curve: Sequence[dict[str, float]]) -> float:
    """Mean of the last fifth of a curve's points less that of the first fifth."""
    fifth = max(1, len(curve) // 5)
    return fmean(p["mean_return"] for p in curve[-fifth:]) - fmean(p["mean_return"] for p in curve[:fifth])


def _seed_line(entry: Entry) -> str:
    trained, evaluated = entry["train"], entry["evaluate"]
    low, high = evaluated["ci95"]
    lag = (trained.get("lag") or {}).get("mean")
    cells = (
        entry["environment"], entry["algorithm"], entry["seed"], shown(evaluated["mean_return"]), f"{shown(low)} to {shown(high)}",
        f"{evaluated['min']:.1f}", f"{evaluated['max']:.1f}", f"{trained['env_steps']:,}", trained["reason"], f"{entry['wall_seconds']:.0f}",
        f"{trained['env_steps_per_second']:,.0f}", "–" if lag is None else f"{lag:.2f}",
    )  # fmt: skip
    return line(*cells)


def _curve(entry: Entry) -> Iterable[str]:
    yield f"\n## The curve of {entry['environment']}, {entry['algorithm']}, seed {entry['seed']}\n"
    yield f"Mean return of the last 100 training episodes; the last fifth of the points lies {rise(entry['curve']):+.2f} above the first.\n"
    yield "| env steps | seconds | mean return |"
    yield "| --- | --- | --- |"
    yield from (f"| {p['env_steps']:,} | {p['seconds']:.0f} | {p['mean_return']:.2f} |" for p in entry["curve"])


if __name__ == "__main__":
    sys.exit(main())
