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
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from shoal.monitoring.store import RunReader
from shoal.settings import available_cores, resolve

RESULTS = Path(__file__).parent / "results"
EPISODES = 100
CURVE_POINTS = 60
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      target: mean return of the evaluation that every seed has to reach; None where only the curve counts.
      seeds: how many, from 0.
      options: of `shoal train`, besides environment, algorithm and seed; as for any user, the rest is the preset's.
      env_steps_limit: what the target has to be reached within.
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

    @property
    def name(self) -> str:
        return f"{self.environment}/{self.algorithm}"


ROWS = (
    *(Row("CartPole-v1", algorithm, 475) for algorithm in ("ppo", "appo", "impala")),
    *(Row("Acrobot-v1", algorithm, -100) for algorithm in ("ppo", "appo")),
    Row("Pendulum-v1", "ppo", -200),
    Row("MountainCarContinuous-v0", "ppo", 90),
    *(Row("LunarLander-v3", algorithm, 200, env_steps_limit=1_000_000) for algorithm in ("ppo", "appo")),
    Row("HalfCheetah-v5", "ppo", 1500, seeds=1, note="published PPO figures: 1,500 to 3,000"),
    Row("ALE/Pong-v5", "ppo", None, seeds=1, options=("--stop.seconds", "1800"), curve=True, note="30 minutes; the curve has to rise"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    rows = [row for row in ROWS if any(fnmatch(row.name, pattern) for pattern in options.rows)]
    if not rows:
        print(f"no row is named {' or '.join(options.rows)}; there are {', '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    store = Store(options.results)
    wanted = [(row, seed) for row in rows for seed in range(options.seeds or row.seeds)]
    if options.list:
        for row, seed in wanted:
            print(f"{row.name} seed {seed}: {'done' if store.find(row, seed) else 'to do'}")
        return 0
    failed = 0
    for row, seed in () if options.table else wanted:
        if store.find(row, seed) is None or options.again:
            print(f"{row.name} seed {seed} ...", file=sys.stderr, flush=True)
            try:
                measured = measure(row, seed, options.episodes, Path(options.runs))
            except CommandError as error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
                continue
            store.append(measured)
            print(f"{row.name} seed {seed}: {brief(measured)}", file=sys.stderr, flush=True)
            store.write_table()
    store.write_table()
    print(store.table_path.read_text(encoding="utf-8"))
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ENV/ALGORITHM", help="rows to measure; * and ? as in file names")
    parser.add_argument("--seeds", type=int, help="seeds per row, from 0 (default: 3, or 1 for the long rows)")
    parser.add_argument("--episodes", type=int, default=EPISODES, help=f"evaluation episodes of each seed (default: {EPISODES})")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--list", action="store_true", help="say what is done and what is to do")
    parser.add_argument("--table", action="store_true", help="only write the table from what was measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of learning.jsonl and learning.md")
    parser.add_argument("--runs", default=tempfile.gettempdir(), help="directory for the runs, which are removed once measured")
    return parser.parse_args(arguments)


# ---- one measurement -------------------------------------------------------------------------------------------------
class CommandError(Exception):
    """A command of shoal failed; the message holds its last words."""


def measure(row: Row, seed: int, episodes: int, runs: Path) -> dict[str, Any]:
    """Train and evaluate once. Raises CommandError."""
    scratch = Path(tempfile.mkdtemp(prefix="shoal-bench-", dir=runs))
    try:
        run = scratch / "run"
        begun = time.monotonic()
        command = ["train", row.environment, "--algorithm", row.algorithm, "--seed", str(seed), *row.options]
        trained = shoal([*command, "--run-dir", str(run), "--json"])
        train_seconds = time.monotonic() - begun
        evaluated = shoal(["evaluate", str(run), "--episodes", str(episodes), "--json"])
        return {
            "environment": row.environment,
            "algorithm": row.algorithm,
            "seed": seed,
            "settings": settings_of(row, seed),
            "command": " ".join(["shoal", *command, "--json"]),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "load": os.getloadavg()[1],
            "wall_seconds": round(train_seconds, 1),
            "train": {key: value for key, value in trained.items() if key != "run"},
            "evaluate": evaluated,
            "curve": curve_of(run) if row.curve else None,
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def shoal(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a command of shoal in a process of its own and return its JSON object. Raises CommandError."""
    executable = Path(sys.executable).with_name("shoal")
    done = subprocess.run([str(executable), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandError(f"shoal {' '.join(arguments)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def curve_of(run: Path) -> list[dict[str, float]]:
    """The training curve, CURVE_POINTS of it: env_steps, seconds, mean return of the last 100 training episodes."""
    with RunReader(run / "run.db") as reader:
        points = [p for p in reader.series("rollout/ep_rew_mean") if p.value is not None and math.isfinite(p.value)]
    last = len(points) - 1
    places = sorted({round(i * last / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)}) if points else []
    return [{"env_steps": points[i].env_steps, "seconds": round(points[i].seconds, 1), "mean_return": points[i].value} for i in places]


def settings_of(row: Row, seed: int) -> str:
    """A digest of what a user's command resolves to, defaults apart, so that figures of other settings are not mistaken for these."""
    overrides = {"algorithm": row.algorithm, "seed": seed, "actors": 1}  # actors: by the machine's cores, which are said elsewhere
    overrides |= {key.removeprefix("--").replace("-", "_"): value for key, value in zip(row.options[::2], row.options[1::2], strict=True)}
    config, _ = resolve(row.environment, overrides)
    chosen = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def machine() -> dict[str, Any]:
    """CPU model, cores that may be used, and the versions that figures depend on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": available_cores(), "torch": version("torch"), "python": platform.python_version()}


def brief(measured: dict[str, Any]) -> str:
    trained, evaluated = measured["train"], measured["evaluate"]
    return (
        f"{evaluated['mean_return']:.1f} after {trained['env_steps']:,} env steps, {measured['wall_seconds']:.0f} s ({trained['reason']})"
    )


# ---- what was measured -----------------------------------------------------------------------------------------------
class Store:
    """`learning.jsonl`, one measurement a line, the newest counting; and the table made of it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.table_path = directory / "learning.jsonl", directory / "learning.md"
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError):
                print(f"{self.path}: a line is cut off and is left out", file=sys.stderr)

    def _take(self, entry: dict[str, Any]) -> None:
        self.entries[f"{entry['environment']}/{entry['algorithm']}", entry["seed"]] = entry

    def find(self, row: Row, seed: int) -> dict[str, Any] | None:
        """The measurement of a row and seed under today's settings."""
        entry = self.entries.get((row.name, seed))
        return entry if entry is not None and entry["settings"] == settings_of(row, seed) else None

    def append(self, entry: dict[str, Any]) -> None:
        cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_off else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def of(self, row: Row) -> list[dict[str, Any]]:
        return [self.entries[key] for key in sorted(self.entries) if key[0] == row.name]

    def write_table(self) -> None:
        self.table_path.write_text("\n".join(_page(self)) + "\n", encoding="utf-8")


def _page(store: Store) -> Iterable[str]:
    known = [entry for row in ROWS for entry in store.of(row)]
    machines = sorted({json.dumps(entry["machine"], sort_keys=True) for entry in known})
    dates = sorted({entry["date"] for entry in known})
    yield "# Learning\n"
    yield "Made by `make bench-learning` (`benchmarks/learning.py`); raw rows in `learning.jsonl`.\n"
    for text in machines:
        m = json.loads(text)
        yield f"- Machine: {m['cpu']}, {m['cores']} cores; torch {m['torch']}, Python {m['python']}."
    yield f"- Date: {' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'nothing measured yet'}.\n"
    yield (
        f"Each seed: one training with the preset, then {EPISODES} evaluation episodes. Mean: over the seeds. Interval: {CONFIDENCE:.0%} of that mean "
        "over evaluation episodes, stratified by seed (how seeds differ, the second table shows). Seconds: of the whole `shoal train` command, "
        "start-up included. Reached: the mean of every seed reaches the target.\n"
    )
    yield "| environment | algorithm | seeds | mean return | 95 % interval | worst seed | target | reached | env steps, mean (max) | wall seconds, mean |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    yield from (_summary_line(row, store.of(row)) for row in ROWS if store.of(row))
    yield from (f"\n{row.name}: {row.note}." for row in ROWS if row.note and store.of(row))
    yield "\n## Each seed\n"
    yield "| environment | algorithm | seed | mean return | 95 % interval | min | max | env steps | ended by | wall seconds | env steps/s | mean lag |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    yield from (_seed_line(entry) for entry in known)
    for row in ROWS:
        for entry in store.of(row):
            if entry.get("curve"):
                yield from _curve(entry)


def _summary_line(row: Row, entries: list[dict[str, Any]]) -> str:
    evaluated = [entry["evaluate"] for entry in entries]
    means = [e["mean_return"] for e in evaluated]
    error = math.sqrt(sum(e["std_return"] ** 2 / e["episodes"] for e in evaluated)) / len(evaluated)
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    steps = [entry["train"]["env_steps"] for entry in entries]
    target = "rises" if row.target is None else f"{row.target:g}" + (f" in {row.env_steps_limit:,} steps" if row.env_steps_limit else "")
    cells = (
        row.environment, row.algorithm, len(entries), f"{fmean(means):.1f}", f"{fmean(means) - half:.1f} to {fmean(means) + half:.1f}",
        f"{min(means):.1f}", target, "yes" if reached(row, entries) else "no", f"{fmean(steps):,.0f} ({max(steps):,})",
        f"{fmean(entry['wall_seconds'] for entry in entries):.0f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def reached(row: Row, entries: Sequence[dict[str, Any]]) -> bool:
    """Whether every seed reached the target within its env steps; without a target, whether every curve rises (see `rise`)."""
    if row.target is None:
        return all(entry["curve"] and rise(entry["curve"]) > 0 for entry in entries)
    within = all(row.env_steps_limit is None or entry["train"]["env_steps"] <= row.env_steps_limit for entry in entries)
    return within and all(entry["evaluate"]["mean_return"] >= row.target for entry in entries)


def rise(curve: Sequence[dict[str, float]]) -> float:
    """Mean of the last fifth of a curve's points less that of the first fifth."""
    fifth = max(1, len(curve) // 5)
    return fmean(p["mean_return"] for p in curve[-fifth:]) - fmean(p["mean_return"] for p in curve[:fifth])


def _seed_line(entry: dict[str, Any]) -> str:
    trained, evaluated = entry["train"], entry["evaluate"]
    low, high = evaluated["ci95"]
    lag = (trained.get("lag") or {}).get("mean")
    cells = (
        entry["environment"], entry["algorithm"], entry["seed"], f"{evaluated['mean_return']:.1f}", f"{low:.1f} to {high:.1f}",
        f"{evaluated['min']:.1f}", f"{evaluated['max']:.1f}", f"{trained['env_steps']:,}", trained["reason"], f"{entry['wall_seconds']:.0f}",
        f"{trained['env_steps_per_second']:,.0f}", "–" if lag is None else f"{lag:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _curve(entry: dict[str, Any]) -> Iterable[str]:
    yield f"\n## The curve of {entry['environment']}, {entry['algorithm']}, seed {entry['seed']}\n"
    yield f"Mean return of the last 100 training episodes; the last fifth of the points lies {rise(entry['curve']):+.2f} above the first.\n"
    yield "| env steps | seconds | mean return |"
    yield "| --- | --- | --- |"
    yield from (f"| {p['env_steps']:,} | {p['seconds']:.0f} | {p['mean_return']:.2f} |" for p in entry["curve"])


if __name__ == "__main__":
    sys.exit(main())
