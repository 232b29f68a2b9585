"""What `make bench-peers` measures: shoal and other libraries in turn on this machine (shoal, peer, shoal, peer ...), and the median of the ratios.

Absolute figures drift from hour to hour and from machine to machine, ratios of neighbouring runs hardly. Every pair is appended to
`results/peers.jsonl` at once, so that a bench that was cut off goes on with the next one; pairs of other commands or seconds are made again.
`results/peers.md` is written from all of it: of each comparison the newest command of which three pairs are there, and no answer from fewer.

    python benchmarks/peers.py                              what is missing
    python benchmarks/peers.py --rows 'CartPole-v1 ppo*'    some comparisons
    python benchmarks/peers.py --again                      measure anew, also pairs whose peer failed
    python benchmarks/peers.py --list | --table             what there is, what is done | only the table

The peers' scripts are looked for in ../shared/peers beside the checkout (--scripts, PEERS_SCRIPTS), where a comparison names no directory of its own
(peer_scripts/, beside this file). Their environment, apart from the project's own, is made once in .peers (--environment, PEERS_ENV) where
it is missing. Measure on an idle machine.

Matched protocol: 8 environments x 128 steps, minibatch 256, 4 epochs, separate 2x64 tanh actor and critic, Adam 2.5e-4, gradient norm 0.5, CPU.
With a replay, also matched: what OFF_POLICY, DQN and SAC say here, and SETTINGS in peer_scripts/sb3_off_policy.py; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from observing import steady_rate
from rows import (
    ROOT,
    CommandError,
    Entry,
    Measurement,
    Store,
    chosen,
    code_line,
    codes,
    day,
    digest,
    from_to,
    measure_all,
    parser_of,
    scratch,
)
from rows import line as cells

STEM = "peers"
PAIRS = 3  # fewer answer nothing
PEER_ATTEMPTS = 2
START_SECONDS = 240.0  # a peer may take so long besides the seconds that are measured
PACKAGES = ("gymnasium", "box2d", "ale-py", "opencv-python-headless", "pygame", "stable-baselines3", "ray[rllib]", "tensorboard")

MATCHED = (
    "--preset none --sampling.groups 2 --sampling.group-size 4 --sampling.rollout-length 128 --algorithm.learning-rate 2.5e-4 "
    "--algorithm.max-gradient-norm 0.5 --policy.hidden-sizes 64,64 --policy.activation tanh --device cpu"
)
EPOCHS = "--algorithm.epochs 4 --algorithm.minibatch-size 256"
THROUGHPUT = "--preset none --policy.hidden-sizes 64,64 --policy.activation tanh --device cpu"
# Rows of speed.py too: one target, one configuration.
IMPALA_PYTHON = f"{THROUGHPUT} --sampling.groups 4 --sampling.group-size 64 --sampling.rollout-length 32"
IMPALA_NATIVE = f"{THROUGHPUT} --env.form native --sampling.groups 4 --sampling.group-size 256 --sampling.rollout-length 32"
FLOORS = {IMPALA_PYTHON: 50_000, IMPALA_NATIVE: 150_000}  # env steps per second
OFF_POLICY = (
    "--preset none --replay.capacity-steps 100000 --replay.learning-starts 1000 --replay.n-step 1 --replay.prioritised false "
    "--policy.activation relu --device cpu"
)
DQN = (
    f"{OFF_POLICY} --sampling.groups 2 --sampling.group-size 8 --sampling.rollout-length 16 --policy.hidden-sizes 64,64 "
    "--algorithm.learning-rate 1.0e-3 --algorithm.adam-epsilon 1.0e-8 --algorithm.batch-size 128 --replay.samples-per-insert 32 "
    "--algorithm.double false --algorithm.duelling false --algorithm.target-tau none --algorithm.target-update-steps 2500 "
    "--algorithm.epsilon-initial 0.05 --algorithm.epsilon-final 0.05"
)
SAC = (
    f"{OFF_POLICY} --sampling.groups 2 --sampling.group-size 2 --sampling.rollout-length 8 --policy.hidden-sizes 256,256 "
    "--algorithm.learning-rate 3.0e-4 --algorithm.batch-size 256 --replay.samples-per-insert 256"
)
OWN_SCRIPTS = Path(__file__).resolve().parent / "peer_scripts"


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
      options: of `shoal train`. peer: script and arguments, SECONDS for the seconds; the speed is what it prints after `sps=`.
      times: the ratio that is wanted. floor: env steps per second that are wanted of shoal.
      scripts: where the peer's script lies, if not where --scripts says.
      learning_only: the speed is that between the updates after the warm-up (observing.py), since before it nothing is learned for a while.
    """

    environment: str
    algorithm: str
    options: str
    peer: str
    times: float | None = None
    floor: int | None = None
    scripts: Path | None = None
    learning_only: bool = False

    @property
    def name(self) -> str:
        track = "throughput " if self.options.startswith(THROUGHPUT) else ""
        form = " native" if "--env.form native" in self.options else ""
        return f"{self.environment} {track}{self.algorithm}{form} / {self.peer_name}"

    @property
    def peer_name(self) -> str:
        script, algorithm, *_, runners = self.peer.split()
        if script.startswith("sb3"):
            return "sb3 ppo" if script == "sb3_matched.py" else f"sb3 {algorithm} ({runners} envs)"
        return f"rllib {algorithm} ({runners} runners)"

    def arguments(self, seconds: float) -> list[str]:
        """Of `shoal`."""
        return ["train", self.environment, "--algorithm", self.algorithm, *self.options.split(), "--stop.seconds", f"{seconds:g}"]

    def command(self, seconds: float) -> str:
        return f"shoal {' '.join(self.arguments(seconds))}"

    def peer_seconds(self, seconds: float) -> float:
        """RLlib's asynchronous algorithms report every ten seconds or so, and the script's clock begins with the first report."""
        return max(seconds, 45.0) if self.peer_name.startswith(("rllib appo", "rllib impala")) else seconds


SB3 = "sb3_matched.py {} SECONDS dummy 1"
RLLIB_IMPALA = "rllib_matched.py impala CartPole-v1 SECONDS 0"
SB3_OFF_POLICY = "sb3_off_policy.py {} {} SECONDS {}"
COMPARISONS = (
    Comparison("CartPole-v1", "ppo", f"{MATCHED} {EPOCHS}", SB3.format("CartPole-v1"), times=3),
    Comparison("CartPole-v1", "appo", f"{MATCHED} {EPOCHS}", SB3.format("CartPole-v1"), times=4),
    *(
        Comparison("CartPole-v1", algorithm, f"{MATCHED} {EPOCHS}", f"rllib_matched.py ppo CartPole-v1 SECONDS {runners}", times=8)
        for runners in (0, 2)  # in the driver's process, or in two of their own: which is faster depends on the machine
        for algorithm in ("ppo", "appo")
    ),
    Comparison("CartPole-v1", "appo", f"{MATCHED} {EPOCHS}", "rllib_matched.py appo CartPole-v1 SECONDS 0"),
    Comparison("CartPole-v1", "impala", MATCHED, RLLIB_IMPALA),
    Comparison("LunarLander-v3", "ppo", f"{MATCHED} {EPOCHS}", SB3.format("LunarLander-v3"), times=3),
    *(Comparison("CartPole-v1", "impala", options, RLLIB_IMPALA, floor=floor) for options, floor in FLOORS.items()),
    *(
        Comparison(
            "CartPole-v1",
            "dqn",
            DQN,
            SB3_OFF_POLICY.format("dqn", "CartPole-v1", num_envs),
            times=3,
            scripts=OWN_SCRIPTS,
            learning_only=True,
        )
        for num_envs in (16, 1)  # as many as shoal steps, which is faster, or one, as it has without further ado
    ),
    Comparison(
        "Pendulum-v1", "sac", SAC, SB3_OFF_POLICY.format("sac", "Pendulum-v1", 4), times=1.3, scripts=OWN_SCRIPTS, learning_only=True
    ),
)


class PeerError(Exception):
    """Something that is needed is missing; the message says what to do."""


@dataclass(frozen=True)
class Peers:
    """Where they are, and which."""

    scripts: Path
    python: Path
    versions: dict[str, str]

    @classmethod
    def find(cls, scripts: Path, environment: Path) -> Peers:
        """Raises PeerError."""
        found = find_scripts(scripts, COMPARISONS)
        python = find_environment(environment)
        return cls(found, python, peer_versions(python))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    store = Store(options.results, STEM, key_of, page)
    peers = cache(lambda: Peers.find(options.scripts, options.environment))
    names = chosen((c.name for c in COMPARISONS), options.rows)
    wanted = [
        Measurement(
            c.name, pair, (c.name, settings, pair), settings, partial(measure, c, pair, options.seconds, peers, options.runs), brief
        )
        for c in COMPARISONS
        if c.name in names
        for settings in [digest([c.command(options.seconds), c.peer, options.seconds])]
        for pair in range(options.pairs)
    ]
    try:
        return measure_all(wanted, store, options)
    except PeerError as error:
        print(f"bench-peers: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, STEM)
    scripts, environment = os.environ.get("PEERS_SCRIPTS", ROOT.parent / "shared" / "peers"), os.environ.get("PEERS_ENV", ROOT / ".peers")
    parser.add_argument("--scripts", type=Path, default=Path(scripts), help="directory of the peers' scripts (default: %(default)s)")
    parser.add_argument(
        "--environment", type=Path, default=Path(environment), help="virtual environment of the peers (default: %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help=f"runs of each side; fewer than {PAIRS} answer nothing (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run (default: %(default)s)")
    return parser.parse_args(arguments)


# ---- what was measured -----------------------------------------------------------------------------------------------
def settings_of(entry: Entry) -> str:
    """A digest of both commands and the seconds."""
    return str(entry["settings"] if "settings" in entry else digest([entry["command"], entry["peer_command"], entry["seconds"]]))


def key_of(entry: Entry) -> Hashable:
    return entry["comparison"], settings_of(entry), entry["pair"]


def compared(pairs: Iterable[Entry]) -> list[Entry]:
    """Those in which both sides ran."""
    return [pair for pair in pairs if pair["ratio"] is not None]


def pairs_of(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Of each comparison the pairs that count, in the table's order: those of its newest settings of which PAIRS are there, or of its newest.

    entries: the newest last, one of each key.
    """
    found: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        of = found.setdefault(entry["comparison"], {})
        of[settings_of(entry)] = [*of.pop(settings_of(entry), []), entry]  # to the end
    order = [c.name for c in COMPARISONS]
    counting = {}
    for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order)):
        newest_first = list(reversed(found[name].values()))
        counting[name] = next((pairs for pairs in newest_first if len(compared(pairs)) >= PAIRS), newest_first[0])
    return counting


# ---- what is needed --------------------------------------------------------------------------------------------------
def find_scripts(directory: Path, wanted: Sequence[Comparison]) -> Path:
    """Where the scripts lie of those comparisons that name no directory of their own."""
    scripts = {c.peer.split()[0] for c in wanted if c.scripts is None}
    missing = {script for script in scripts if not (directory / script).is_file()}
    if missing:
        raise PeerError(
            f"the peers' scripts {', '.join(sorted(missing))} are not in {directory}; say where they are: --scripts DIR or PEERS_SCRIPTS=DIR"
        )
    return directory.resolve()


def find_environment(directory: Path) -> Path:
    """The peers' Python; makes their virtual environment where there is none."""
    python = directory / "bin" / "python"
    if not python.exists():
        print(f"making the peers' environment in {directory} (some minutes, some gigabytes) ...", file=sys.stderr, flush=True)
        torch = next(text for text in (ROOT / "constraints.txt").read_text().splitlines() if text.startswith("torch=="))
        for command in (
            [sys.executable, "-m", "venv", str(directory)],
            [str(python), "-m", "pip", "install", "-q", torch],  # alone and first: it keeps a CPU build that lies in pip's find-links
            [str(python), "-m", "pip", "install", "-q", *PACKAGES],
        ):
            if subprocess.run(command, check=False).returncode != 0:
                raise PeerError(f"the peers' environment cannot be made: `{' '.join(command)}` failed; remove {directory} and try again")
    check = [str(python), "-c", "import stable_baselines3, ray; print(stable_baselines3.__version__, ray.__version__)"]
    if subprocess.run(check, capture_output=True, check=False).returncode != 0:
        raise PeerError(f"{directory} has no Stable-Baselines3 and Ray; remove it, or name another one: --environment DIR or PEERS_ENV=DIR")
    return python.absolute()


def peer_versions(python: Path) -> dict[str, str]:
    names = ["stable-baselines3", "ray", "torch", "gymnasium"]
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    said = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    versions: dict[str, str] = json.loads(said)
    return versions


# ---- measuring -------------------------------------------------------------------------------------------------------
def measure(comparison: Comparison, pair: int, seconds: float, find: Callable[[], Peers], runs: Path) -> Entry:
    """Shoal, then the peer; where the peer fails, the entry says so. Raises CommandError (shoal failed) and PeerError."""
    peers = find()
    own = shoal_speed(comparison, seconds, runs)
    peer, failure = attempt(lambda: peer_speed(comparison, seconds, peers, runs))
    return {
        "comparison": comparison.name, "pair": pair, "seconds": seconds, "shoal": own, "peer": peer, "ratio": None if peer is None else own / peer,
        "peer_failure": failure, "times": comparison.times, "floor": comparison.floor, "command": comparison.command(seconds),
        "peer_command": comparison.peer, "versions": peers.versions,
    }  # fmt: skip


def brief(entry: Entry) -> str:
    peer = entry["peer"]
    told = f"the peer failed: {entry['peer_failure']}" if peer is None else f"{peer:,.0f} = {entry['ratio']:.2f}"
    return f"{entry['shoal']:,.0f} / {told}"


def attempt(work: Callable[[], float]) -> tuple[float | None, str]:
    """A peer's speed, tried again where it fails (RLlib reports an iteration without samples now and then, which its script does not survive)."""
    failure = ""
    for _ in range(PEER_ATTEMPTS):
        try:
            return work(), ""
        except CommandError as error:
            failure = str(error)[-500:]
    return None, failure


def shoal_speed(comparison: Comparison, seconds: float, runs: Path) -> float:
    """Environment steps per second since the first one, as `shoal train` says it, or after the warm-up, as the run's record says it."""
    with scratch(runs) as directory:
        where = ["--run-dir", str(directory / "run"), "--view", "silent", "--json"]
        told = json.loads(run([sys.executable, "-m", "shoal.cli", *comparison.arguments(seconds), *where], seconds, directory))
        return steady_rate(directory / "run") if comparison.learning_only else float(told["env_steps_per_second"])


def peer_speed(comparison: Comparison, seconds: float, peers: Peers, runs: Path) -> float:
    seconds = comparison.peer_seconds(seconds)
    script, *words = comparison.peer.replace("SECONDS", f"{seconds:g}").split()
    with scratch(runs) as directory:
        said = run([str(peers.python), str((comparison.scripts or peers.scripts) / script), *words], seconds, directory)
    found = re.findall(r"sps=(\d+)", said)
    if not found or int(found[-1]) == 0:
        raise CommandError(f"{script} measured no speed in {seconds:g} s (sps=...):\n{said[-2000:]}")
    return float(found[-1])


def run(command: Sequence[str], seconds: float, directory: Path) -> str:
    """Standard output of a command that runs with one thread per process, in a session of its own, which ends with this one's wait for it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, complained = started.communicate(timeout=seconds + START_SECONDS)
    except BaseException as error:  # Ctrl-C does not come to another session
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise CommandError(f"`{' '.join(command)}` did not end within {seconds + START_SECONDS:g} s") from None
        raise
    if started.returncode != 0:
        raise CommandError(f"`{' '.join(command)}` ended with code {started.returncode}:\n{complained[-2000:]}")
    return said


# ---- the table -------------------------------------------------------------------------------------------------------
def page(store: Store) -> Iterator[str]:
    found = pairs_of(store.entries.values())
    yield "# Beside other libraries"
    yield ""
    yield "`make bench-peers` (benchmarks/peers.py): shoal and the peer run in turn on the same machine; medians over pairs, in environment steps per"
    yield "second with learning included. Matched protocol: 8 environments x 128 steps, minibatch 256, 4 epochs, separate 2x64 tanh actor and critic,"
    yield "Adam 2.5e-4, gradient norm 0.5, CPU. IMPALA has one epoch; on the throughput track groups and batch are chosen freely."
    yield "DQN (16 environments, of the peer 16 or 1; 2x64, batch 128, Adam 1e-3, one update per 4 steps, the target copied every 10,000 steps,"
    yield "epsilon 0.05) and SAC (4 environments, 2x256, batch 256, Adam 3e-4, one update per step, learned temperature, tau 0.005): on both sides ReLU,"
    yield "a replay of 100,000 steps, sampled uniformly, one-step returns, learning from 1,000 steps on; no double or duelling. Their speed is counted"
    yield "once learning has started. The commands are in peers.jsonl."
    yield f"Fewer than {PAIRS} pairs answer nothing. {code_line()}"
    yield ""
    yield "| shoal / peer | shoal | peer | median of ratios | lowest, highest | wanted | pairs of | date | load | code |"
    yield "| --- | ---: | ---: | ---: | --- | --- | --- | --- | --- | --- |"
    for name, pairs in found.items():
        yield line(name, pairs)
    known = [pair for pairs in found.values() for pair in pairs]
    yield ""
    for text in dict.fromkeys(json.dumps(pair["machine"], sort_keys=True) for pair in known):
        one = json.loads(text)
        yield f"Machine: {one['cpu']}, {one['cores']} cores, torch {one['torch']}, Python {one['python']}."
    for text in dict.fromkeys(json.dumps(pair["versions"], sort_keys=True) for pair in known):
        yield f"Peers: {', '.join(f'{name} {number}' for name, number in json.loads(text).items())}."


def line(name: str, pairs: Sequence[Entry]) -> str:
    both, first = compared(pairs), pairs[0]
    own = statistics.median(pair["shoal"] for pair in pairs)
    ratios = [pair["ratio"] for pair in both]
    wanted = ""
    if first["times"] is not None:
        wanted = f">= {first['times']:g}x: {answer(len(both), lambda: statistics.median(ratios) >= first['times'])}"
    if first["floor"] is not None:
        wanted = f">= {first['floor']:,} steps/s: {answer(len(pairs), lambda: own >= first['floor'])}"
    return cells(
        name, f"{own:,.0f}", f"{statistics.median(pair['peer'] for pair in both):,.0f}" if both else "failed",
        f"{statistics.median(ratios):.2f}" if both else "", f"{min(ratios):.2f}, {max(ratios):.2f}" if both else "", wanted,
        f"{len(both) or len(pairs)} x {first['seconds']:g} s", from_to(sorted(map(day, pairs))), ", ".join(f"{pair['load']:g}" for pair in pairs),
        codes(pairs),
    )  # fmt: skip


def answer(number: int, held: Callable[[], bool]) -> str:
    """Whether it held, from so many pairs."""
    return f"{number} of {PAIRS} pairs" if number < PAIRS else "yes" if held() else "**no**"


if __name__ == "__main__":
    sys.exit(main())
