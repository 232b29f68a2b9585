"""What `make bench-speed` measures: waiting environments, the start, the time to a solved task, memory, weights, an inference server, the replay,
throughput, the matched runs beside their ceilings, Atari.

Every measurement is appended to `results/speed.jsonl` as soon as it is there, so that a bench that was cut off goes on with the next one; what was
measured with other settings (options, seconds, a preset that changed since) is measured again. `results/speed.md` is written from all of it.

    python benchmarks/speed.py                                                 what is missing
    python benchmarks/speed.py --rows 'waiting/*' memory                       some rows
    python benchmarks/speed.py --again                                         measure anew
    python benchmarks/speed.py --rows 'throughput/*' --groups 4 --group-size 256 --batch-rollouts 2
    python benchmarks/speed.py --list | --table                                what there is, what is done | only the table

How shoal compares with other libraries, `make bench-peers` measures; how close a training comes to its ceiling, `shoal bench train`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from observing import first_update_seconds, growth_mb, mb_per_hour, memory_of, steady_rate, wall_seconds
from peers import EPOCHS, FLOORS, IMPALA_NATIVE, IMPALA_PYTHON, MATCHED
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
    shoal,
    where_and_when,
)
from waiting import blocking_seconds, exponential, fixed

from shoal.settings import resolve

NUM_WAITING = 64
WAIT_SECONDS = 0.01
STRAGGLER_TIMES = 100.0
SAMPLE_SECONDS = 2.0
MEMORY_FROM_SECONDS = 30.0
GROWTH_MB = 5.0  # what allocators and caches may do in ten minutes
# In the second half of a run, when caches are full: so a day's run grows by less than the 500 MB that it may have in all. Of what is the processes' own,
# which lies within 0.2 MB of a line (PSS within 30 MB, while other programs map the same files); but one allocation of 1 MB in the middle of five minutes
# is a slope of 13 MB an hour.
HOURLY_MB = 20.0
GPU_CALLS_MS = 0.1  # what a GPU's calls and copies may add to a question: assumed, not measured

Figures = dict[str, Any]  # numbers; of memory its curve too


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      measure: makes one measurement of the row; the number is its seed where it trains, else only counts.
      figure: all measurements in words.
      reached: whether they are within the target, None where they do not say; no function where there is no target.
      repeats: measurements.
      environment, options: of the `shoal` command; what they resolve to says whether an old measurement still counts.
        Without an environment the command says all of it.
      script: beside this file, where no `shoal` command is measured.
    """

    name: str
    target: str
    measure: Callable[[Row, int, argparse.Namespace], Figures]
    figure: Callable[[Sequence[Figures]], str]
    reached: Callable[[Sequence[Figures]], bool | None] | None
    repeats: int = 3
    verb: str = "train"
    environment: str = ""
    options: tuple[str, ...] = ()
    script: str = ""

    @property
    def command(self) -> str:
        return f"benchmarks/{self.script}" if self.script else " ".join(filter(None, ["shoal", self.verb, self.environment, *self.options]))

    def answer(self, figures: Sequence[Figures]) -> str:
        """Whether the target is reached."""
        return "–" if self.reached is None else {True: "yes", False: "no", None: "unknown"}[self.reached(figures)]


def column(figures: Sequence[Figures], name: str) -> list[float]:
    return [one[name] for one in figures]


def spread(values: Sequence[float], unit: str, digits: int = 0) -> str:
    """Median, and the least and the largest where there are several."""
    around = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else ""
    return f"{median(values):,.{digits}f}{around} {unit}"


# ---- waiting ---------------------------------------------------------------------------------------------------------
def waiting(row: Row, repeat: int, options: argparse.Namespace) -> Figures:
    """Env steps per second against N / w."""
    make = exponential if "exponential" in row.name else fixed
    blocking = blocking_seconds(partial(make, WAIT_SECONDS), WAIT_SECONDS)
    found = throughput(row, repeat, options)
    return {**found, "blocking_ms": 1e3 * blocking, "fraction": found["env_steps_per_second"] * blocking / NUM_WAITING}


def straggling(row: Row, repeat: int, options: argparse.Namespace) -> Figures:
    """What one slow environment costs each of the others, beside a run without one, made just before."""
    without = throughput(replace(row, environment=row.environment.replace("straggler", "fixed")), repeat, options)
    with tempfile.TemporaryDirectory() as directory:
        lock = ("--env.kwargs.lock", str(Path(directory) / "lock"), "--env.kwargs.times", f"{STRAGGLER_TIMES:g}")
        found = throughput(replace(row, options=(*row.options, *lock)), repeat, options)
    return {
        **found,
        "without": without["env_steps_per_second"],
        "update_without": without["steps_of_an_update"],
        "loss": loss_of_others(without["env_steps_per_second"], found["env_steps_per_second"]),
    }


def loss_of_others(without: float, with_one: float) -> float:
    """Share of their env steps per second that NUM_WAITING - 1 environments lose to a straggler, whose own steps are not theirs."""
    alone = without / NUM_WAITING
    return 1.0 - (with_one - alone / STRAGGLER_TIMES) / (NUM_WAITING - 1) / alone


def throughput(row: Row, seed: int, options: argparse.Namespace) -> Figures:
    """Env steps per second of one training, once it is warm."""
    with scratch(options.runs) as directory:
        run = directory / "run"
        length = ("--stop.seconds", f"{options.seconds:g}", "--seed", str(seed))
        trained = shoal(["train", row.environment, *row.options, *length, "--run-dir", str(run), "--json"])
        return {"env_steps_per_second": steady_rate(run), "steps_of_an_update": trained["env_steps"] / trained["updates"]}


# ---- start and end ---------------------------------------------------------------------------------------------------
def start(row: Row, repeat: int, options: argparse.Namespace) -> Figures:
    """One pair: `import torch`, then a training up to its first update; and `shoal --help`."""
    torch = wall_seconds([sys.executable, "-c", "import torch"])
    with scratch(options.runs) as directory:
        first = first_update_seconds(["train", row.environment, *row.options], directory / "run")
    return {"first_update": first, "import_torch": torch, "more": first - torch, "help": wall_seconds([SHOAL, "--help"])}


def solve(row: Row, seed: int, options: argparse.Namespace) -> Figures:
    """From the prompt to the evaluation of the final policy."""
    with scratch(options.runs) as directory:
        begun = time.monotonic()
        trained = shoal(["train", row.environment, *row.options, "--seed", str(seed), "--run-dir", str(directory / "run"), "--json"])
        seconds = time.monotonic() - begun
    return {"seconds": seconds, "mean_return": trained["evaluation"]["mean_return"], "env_steps": trained["env_steps"]}


def solved_seconds(figures: Sequence[Figures], wanted: float) -> float:
    """Median over the seeds; one whose evaluation is below what is wanted never got there."""
    return median(one["seconds"] if one["mean_return"] >= wanted else math.inf for one in figures)


def _solved(figures: Sequence[Figures]) -> str:
    evaluated = column(figures, "mean_return")
    return f"{spread(column(figures, 'seconds'), 's', 1)}, evaluated {median(evaluated):.0f} (least {min(evaluated):.0f})"


# ---- memory, weights, an inference server, the replay, ceilings -------------------------------------------------------
def memory(row: Row, repeat: int, options: argparse.Namespace) -> Figures:
    """Memory of all processes of a training: their own early and late, its slope, the most in all, and the curves (seconds since the prompt, PSS, own)."""
    with scratch(options.runs) as directory:
        longer = ("--stop.seconds", f"{options.memory_seconds + 600:g}")
        samples = memory_of(["train", row.environment, *row.options, *longer], directory / "run", options.memory_seconds, SAMPLE_SECONDS)
    own = [(at, mb) for at, _, mb in samples]
    begin, end, growth = growth_mb(own, MEMORY_FROM_SECONDS)
    return {
        "begin_mb": begin,
        "end_mb": end,
        "growth_mb": growth,
        "mb_per_hour": mb_per_hour(own),
        "most_mb": max(mb for _, mb, _ in samples),
        "seconds": samples[-1][0],
        "curve": [[round(number, 2) for number in sample] for sample in samples],
    }


def _memory(figures: Sequence[Figures]) -> str:
    one = figures[-1]
    times = f"after {MEMORY_FROM_SECONDS:.0f} s, {one['end_mb']:.0f} after {one['seconds']:.0f} s ({one['growth_mb']:+.1f})"
    if "mb_per_hour" not in one:  # measured of PSS, with mapped files, before slopes were
        return f"{one['begin_mb']:.0f} MB {times}, slope not recorded, at most {one['most_mb']:.0f}"
    own = f"{one['begin_mb']:.0f} MB of its own {times}, {one['mb_per_hour']:+.1f} MB an hour in the second half"
    return f"{own}; with mapped files at most {one['most_mb']:.0f}"


def _steady(figures: Sequence[Figures]) -> bool | None:
    """None: measured before slopes were."""
    if not at_most({"most_mb": 500, "growth_mb": GROWTH_MB})(figures):
        return False
    return at_most({"mb_per_hour": HOURLY_MB})(figures) if all("mb_per_hour" in one for one in figures) else None


def scripted(row: Row, repeat: int, options: argparse.Namespace) -> Figures:
    return answer_of([sys.executable, str(Path(__file__).with_name(row.script))], 300.0)


def _weights(figures: Sequence[Figures]) -> str:
    middle, p99, publish, wait, read = (median(column(figures, n)) for n in ("median_ms", "p99_ms", "publish_ms", "wait_ms", "read_ms"))
    parts = f"publishing {publish:.2f}, words and the actor's step {wait:.2f}, reading {read:.2f}"
    return f"{figures[0]['megabytes']:.1f} MB: median {middle:.2f} ms ({parts}), p99 {p99:.2f} ms"


def _served(figures: Sequence[Figures]) -> str:
    way, image_way, small, many, images = (
        median(column(figures, n)) for n in ("way_ms", "image_way_ms", "small_ms", "served_ms", "image_ms")
    )
    return (
        f"the way {way:.2f} ms with 64 numbers, {image_way:.2f} with four frames of 84x84; in place {small:.2f} ms with "
        f"{figures[0]['small_weights']:,} weights, {many:.2f} with {figures[0]['served_weights']:,}, {images:.2f} with the Nature CNN"
    )


def _worth_serving(figures: Sequence[Figures]) -> bool:
    """Whether a question costs no more than what it saves, where `policy.inference auto` begins to ask."""
    return median(column(figures, "way_ms")) + GPU_CALLS_MS <= median(column(figures, "served_ms"))


def replayed(row: Row, repeat: int, options: argparse.Namespace) -> Figures:
    """One case of the replay; the command measures all of them."""
    found: Figures = shoal([*row.verb.split(), *row.options, "--json"])["cases"][row.name.partition("/")[2]]
    return found


def _replayed(figures: Sequence[Figures]) -> str:
    inserted = spread(column(figures, "insert_per_second"), "inserted/s")
    sampled = spread(column(figures, "sample_per_second"), "sampled/s")
    one = figures[-1]
    held = f"{one['capacity_steps']:,} steps in {one['size_bytes'] / 1e6:,.0f} MB"
    return f"{inserted}, {sampled} (transitions of one core's time; {held}, rollouts of {one['rollout_length']})"


def against_ceiling(row: Row, repeat: int, options: argparse.Namespace) -> Figures:
    told = shoal(["bench", "train", row.environment, *row.options, "--stop.seconds", f"{3 * options.seconds:g}", "--json"])
    return {name: told[name] for name in ("env_steps_per_second", "ceiling", "fraction")}


def _fraction(figures: Sequence[Figures]) -> str:
    said = f"{spread(column(figures, 'env_steps_per_second'), 'env steps/s')}, {median(column(figures, 'fraction')):.1%}"
    return f"{said} of N/w (w = {median(column(figures, 'blocking_ms')):.2f} ms)" if "blocking_ms" in figures[0] else (
        f"{said} of its ceiling ({median(column(figures, 'ceiling')):,.0f})")  # fmt: skip


# ---- the rows --------------------------------------------------------------------------------------------------------
def at_least(name: str, least: float) -> Callable[[Sequence[Figures]], bool]:
    return lambda figures: median(column(figures, name)) >= least


def at_most(limits: dict[str, float]) -> Callable[[Sequence[Figures]], bool]:
    return lambda figures: all(median(column(figures, name)) <= limit for name, limit in limits.items())


WAITING = (
    "--algorithm", "impala", "--preset", "none", "--env.form", "threads", "--actors", "2", "--sampling.groups", "2", "--sampling.group-size", "32",
    "--sampling.rollout-length", "64",
)  # fmt: skip


def _throughput(name: str, options: str) -> Row:
    least = FLOORS[options]
    said = lambda figures: spread(column(figures, "env_steps_per_second"), "env steps/s")  # noqa: E731
    return Row(f"throughput/{name}", f"≥ {least:,} env steps/s", throughput, said, at_least("env_steps_per_second", least),
               environment="CartPole-v1", options=("--algorithm", "impala", *options.split()))  # fmt: skip


def _solve(environment: str, wanted: float, seconds: float, seeds: int) -> Row:
    return Row(f"solve/{environment}", f"{wanted:g} over 100 episodes in ≤ {seconds:g} s", solve, _solved,
               lambda figures: solved_seconds(figures, wanted) <= seconds, seeds, environment=environment, options=("--evaluation.episodes", "100"))  # fmt: skip


def _ceiling(name: str, environment: str, least: float, repeats: int, *options: str) -> Row:
    wanted = f"≥ {least:.0%} of its ceiling"
    return Row(name, wanted, against_ceiling, _fraction, at_least("fraction", least), repeats, "bench train", environment, options)


def _replay(case: str, least: int | None) -> Row:
    """least: transitions per second that are wanted, inserted and sampled each."""
    both = [at_least(name, least or 0) for name in ("insert_per_second", "sample_per_second")]
    return Row(f"replay/{case}", f"≥ {least:,} inserted/s and sampled/s" if least else "", replayed, _replayed,
               (lambda figures: all(reached(figures) for reached in both)) if least else None, verb="bench replay", options=("--seconds", "2"))  # fmt: skip


def _start(figures: Sequence[Figures]) -> str:
    first, torch, more = (median(column(figures, name)) for name in ("first_update", "import_torch", "more"))
    return (
        f"first update after {first:.2f} s, import torch {torch:.2f} s, {more:.2f} s more; --help {median(column(figures, 'help')):.2f} s"
    )


def _loss(figures: Sequence[Figures]) -> str:
    lost, steps, without = (median(column(figures, name)) for name in ("loss", "steps_of_an_update", "update_without"))
    speed = spread(column(figures, "env_steps_per_second"), "env steps/s")
    return f"the others lose {lost:.1%} ({speed}); an update has {steps:,.0f} env steps, without it {without:,.0f}"


ROWS = (
    Row("waiting/fixed", "≥ 90 % of N/w", waiting, _fraction, at_least("fraction", 0.90), environment="benchmarks/waiting.py:fixed", options=WAITING),
    Row("waiting/exponential", "≥ 85 % of N/w", waiting, _fraction, at_least("fraction", 0.85), environment="benchmarks/waiting.py:exponential", options=WAITING),
    Row("waiting/straggler", "the others lose ≤ 5 %", straggling, _loss, at_most({"loss": 0.05}), environment="benchmarks/waiting.py:straggler", options=WAITING),
    Row("start", "≤ 1.5 s more than import torch; --help ≤ 0.5 s", start, _start, at_most({"more": 1.5, "help": 0.5}), 5,
        environment="CartPole-v1", options=("--stop.updates", "1")),
    _solve("CartPole-v1", 475, 10, 5),
    _solve("LunarLander-v3", 200, 150, 3),
    Row("memory", f"≤ 500 MB, growth ≤ {GROWTH_MB:g} MB in 10 minutes, ≤ {HOURLY_MB:g} MB an hour in the second half", memory, _memory, _steady, 1,
        environment="CartPole-v1", options=("--actors", "4")),
    Row("weights", "median ≤ 2 ms, p99 ≤ 10 ms", scripted, _weights, at_most({"median_ms": 2, "p99_ms": 10}), script="weights.py"),
    Row("inference/server", f"the way and {GPU_CALLS_MS:g} ms (a GPU's calls, assumed) ≤ what is saved in place where `auto` takes a server", scripted, _served,
        _worth_serving, script="served.py"),
    _replay("vector", 500_000),
    _replay("short rollouts", None),
    _replay("stacks", 20_000),
    _throughput("impala-python", IMPALA_PYTHON),
    _throughput("impala-native", IMPALA_NATIVE),
    _ceiling("ceiling/CartPole-v1 ppo", "CartPole-v1", 0.70, 3, *MATCHED.split(), *EPOCHS.split()),
    _ceiling("ceiling/CartPole-v1 appo", "CartPole-v1", 0.70, 3, *MATCHED.split(), *EPOCHS.split(), "--algorithm", "appo"),
    _ceiling("ceiling/LunarLander-v3 ppo", "LunarLander-v3", 0.70, 3, *MATCHED.split(), *EPOCHS.split()),
    _ceiling("atari/pong", "ALE/Pong-v5", 0.80, 1),
    _ceiling("atari/pong-native", "ALE/Pong-v5", 0.80, 1, "--env.form", "native"),
    _ceiling("atari/pong-cpu", "ALE/Pong-v5", 0.80, 1, "--preset", "ALE-cpu"),
    _ceiling("atari/pong-cpu-native", "ALE/Pong-v5", 0.80, 1, "--preset", "ALE-cpu", "--env.form", "native"),
)  # fmt: skip
OVERRIDES = {"actors": "--actors", "groups": "--sampling.groups", "group_size": "--sampling.group-size",
             "rollout_length": "--sampling.rollout-length", "batch_rollouts": "--sampling.batch-rollouts"}  # fmt: skip
LENGTHS = {"waiting": "seconds", "throughput": "seconds", "ceiling": "seconds", "atari": "seconds", "memory": "memory_seconds"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    store = Store(options.results, "speed", lambda entry: (entry["row"], entry["seed"]), page)
    names = chosen((row.name for row in ROWS), options.rows)
    rows = [with_options(row, options) for row in ROWS if row.name in names]
    wanted = [
        Measurement(row.name, n, (row.name, n), settings_of(row, options), partial(measure, row, n, options), partial(_brief, row))
        for row in rows
        for n in range(options.repeats or row.repeats)
    ]
    return measure_all(wanted, store, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "speed")
    parser.add_argument("--repeats", type=int, help="measurements of each row (default: its own number)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="of each training of waiting/* and throughput/* (ceiling/* and atari/*: three times as long)",
    )
    parser.add_argument("--memory-seconds", type=float, default=600.0, help="of the training of memory")
    for name, option in OVERRIDES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{option} of throughput/*")
    return parser.parse_args(arguments)


def with_options(row: Row, options: argparse.Namespace) -> Row:
    """A row of throughput/* with the options given on the command line in place of its own."""
    if not row.name.startswith("throughput/"):
        return row
    own = dict(zip(row.options[::2], row.options[1::2], strict=True))
    own |= {option: getattr(options, name) for name, option in OVERRIDES.items() if getattr(options, name) is not None}
    return replace(row, options=tuple(text for pair in own.items() for text in pair))


def settings_of(row: Row, options: argparse.Namespace) -> str:
    """A digest of what the row's command resolves to, defaults apart, and of how long it is measured; of the machine's cores nothing."""
    if row.script:
        return digest(row.command)
    if not row.environment:
        return digest([row.name, row.command])
    given = {key.removeprefix("--").replace("-", "_"): value for key, value in zip(row.options[::2], row.options[1::2], strict=True)}
    config, _ = resolve(row.environment, {"actors": 1, **given})
    length = [getattr(options, name) for kind, name in LENGTHS.items() if row.name.partition("/")[0] == kind]
    return digest([row.command, config.model_dump(mode="json", by_alias=True, exclude_defaults=True), *length])


def measure(row: Row, repeat: int, options: argparse.Namespace) -> Entry:
    return {"row": row.name, "seed": repeat, "command": row.command, "figures": row.measure(row, repeat, options)}


def _brief(row: Row, entry: Entry) -> str:
    return row.figure([entry["figures"]])


# ---- the table -------------------------------------------------------------------------------------------------------
def measured(entries: Iterable[Entry]) -> Iterator[tuple[Row, list[Entry]]]:
    """Every row that was measured, and its measurements. entries: one of each row and seed."""
    found: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (entry["row"], entry["seed"])):
        found.setdefault(entry["row"], []).append(entry)
    return ((row, found[row.name]) for row in ROWS if row.name in found)


def page(store: Store) -> Iterator[str]:
    found = list(measured(store.entries.values()))
    yield "# Speed\n"
    yield "Made by `make bench-speed` (`benchmarks/speed.py`); raw rows in `speed.jsonl`.\n"
    yield from where_and_when([entry for _, entries in found for entry in entries])
    yield (
        "Medians; in brackets the least and the largest of several measurements. Speeds leave the first seconds of a run out. "
        f"waiting/*: {NUM_WAITING} environments, N/w with w the measured mean blocking time of one step alone; the straggler is {STRAGGLER_TIMES:g} times slower "
        "than the others, and what they lose is against a run without it, made just before. memory: proportional sets summed over all processes, and of them what is "
        "their own: without mapped files, whose part depends on who else maps them; its slope is the median of those between any two samples, the curves are in "
        "`speed.jsonl`. weights: publication to "
        "first use by an actor, through board and words as in a run. inference/server: a group of 8 asks a server on the processor once a row; the way is what "
        "the answer takes besides the pass. replay/*: by priority, 3-step returns, batches of 512 with their priorities updated, old steps making room; "
        "in transitions a second of one core's time. Load is the machine's mean over five minutes, in processes, this bench's own part included. "
        f"{code_line()}\n"
    )
    yield line("row", "command", "measurements", "figure", "target", "reached", "load", "code")
    yield line(*["---"] * 8)
    for row, entries in found:
        figures = [entry["figures"] for entry in entries]
        yield line(
            row.name, f"`{entries[-1]['command']}`", len(entries), row.figure(figures), row.target, row.answer(figures), loads(entries),
            codes(entries),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
