"""What `make bench-peers` measures: shoal and other libraries in turn on this machine (shoal, peer, shoal, peer ...), and the median of the ratios.

Absolute figures drift from hour to hour and from machine to machine, ratios of neighbouring runs hardly. Every pair is appended to
`results/peers.jsonl` at once; `results/peers.md` is written from the newest measurement of each comparison. No figure is entered by hand.

    python benchmarks/peers.py                              all comparisons, three pairs each
    python benchmarks/peers.py --only 'CartPole-v1 ppo*'    some
    python benchmarks/peers.py --list | --table             what there is | only the table

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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from observing import steady_rate
from rows import RESULTS, ROOT, CommandError

from shoal.benching.measuring import machine

PEER_ATTEMPTS = 2
START_SECONDS = 240.0  # a peer may take so long besides the seconds that are measured
PACKAGES = ("gymnasium", "box2d", "ale-py", "opencv-python-headless", "pygame", "stable-baselines3", "ray[rllib]", "tensorboard")

MATCHED = (
    "--preset none --sampling.groups 2 --sampling.group-size 4 --sampling.rollout-length 128 --algorithm.learning-rate 2.5e-4 "
    "--algorithm.max-gradient-norm 0.5 --policy.hidden-sizes 64,64 --policy.activation tanh --device cpu"
)
EPOCHS = "--algorithm.epochs 4 --algorithm.minibatch-size 256"
THROUGHPUT = "--preset none --policy.hidden-sizes 64,64 --policy.activation tanh --device cpu"
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

    def peer_seconds(self, seconds: float) -> float:
        """RLlib's asynchronous algorithms report every ten seconds or so, and the script's clock begins with the first report."""
        return max(seconds, 45.0) if self.peer_name.startswith(("rllib appo", "rllib impala")) else seconds


SB3 = "sb3_matched.py {} SECONDS dummy 1"
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
    Comparison("CartPole-v1", "impala", MATCHED, "rllib_matched.py impala CartPole-v1 SECONDS 0"),
    Comparison("LunarLander-v3", "ppo", f"{MATCHED} {EPOCHS}", SB3.format("LunarLander-v3"), times=3),
    Comparison(
        "CartPole-v1",
        "impala",
        f"{THROUGHPUT} --sampling.groups 4 --sampling.group-size 64 --sampling.rollout-length 32",
        "rllib_matched.py impala CartPole-v1 SECONDS 0",
        floor=50_000,
    ),
    Comparison(
        "CartPole-v1",
        "impala",
        f"{THROUGHPUT} --env.form native --sampling.groups 4 --sampling.group-size 256 --sampling.rollout-length 32",
        "rllib_matched.py impala CartPole-v1 SECONDS 0",
        floor=150_000,
    ),
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    wanted = [c for c in COMPARISONS if fnmatch(c.name, options.only)]
    if options.list:
        print("\n".join(c.name for c in wanted))
        return 0
    rows_file = options.results / "peers.jsonl"
    failed = False
    try:
        if not options.table:
            if not wanted:
                raise PeerError(f"no comparison is named {options.only}; there are {', '.join(c.name for c in COMPARISONS)}")
            scripts = find_scripts(options.scripts, wanted)
            python = find_environment(options.environment)
            for comparison in wanted:
                try:
                    measure(comparison, options.pairs, options.seconds, scripts, python, rows_file)
                except CommandError as error:
                    failed = True
                    print(f"{comparison.name}: {error}", file=sys.stderr, flush=True)
                write_table(rows_file)
    except PeerError as error:
        print(f"bench-peers: {error}", file=sys.stderr)
        return 2
    print(write_table(rows_file))
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scripts, environment = os.environ.get("PEERS_SCRIPTS", ROOT.parent / "shared" / "peers"), os.environ.get("PEERS_ENV", ROOT / ".peers")
    parser.add_argument("--scripts", type=Path, default=Path(scripts), help="directory of the peers' scripts (default: %(default)s)")
    parser.add_argument(
        "--environment", type=Path, default=Path(environment), help="virtual environment of the peers (default: %(default)s)"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="comparisons whose name fits; * and ? as in file names")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="name the comparisons")
    parser.add_argument("--table", action="store_true", help="only write the table from what was measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of peers.jsonl and peers.md")
    return parser.parse_args(arguments)


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


# ---- measuring -------------------------------------------------------------------------------------------------------
def measure(comparison: Comparison, pairs: int, seconds: float, scripts: Path, python: Path, rows_file: Path) -> None:
    """Shoal and the peer in turn; every pair is a row."""
    measurement = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    versions = peer_versions(python)
    for pair in range(pairs):
        load = os.getloadavg()[0]
        own, command = shoal_speed(comparison, seconds)
        peer, failure = attempt(lambda: peer_speed(comparison, seconds, scripts, python))
        row = {
            "comparison": comparison.name, "measurement": measurement, "pair": pair, "seconds": seconds, "shoal": own, "peer": peer,
            "ratio": None if peer is None else own / peer, "peer_failure": failure, "times": comparison.times, "floor": comparison.floor, "command": command, "peer_command": comparison.peer,
            "versions": versions, "machine": machine(), "load": round(load, 2),
        }  # fmt: skip
        rows_file.parent.mkdir(parents=True, exist_ok=True)
        with rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told = f"the peer failed: {failure}" if peer is None else f"{peer:,.0f} = {own / peer:.2f}"
        print(f"{comparison.name}: {own:,.0f} / {told}", file=sys.stderr, flush=True)


def attempt(work: Callable[[], float]) -> tuple[float | None, str]:
    """A peer's speed, tried again where it fails (RLlib reports an iteration without samples now and then, which its script does not survive)."""
    failure = ""
    for _ in range(PEER_ATTEMPTS):
        try:
            return work(), ""
        except CommandError as error:
            failure = str(error)[-500:]
    return None, failure


def shoal_speed(comparison: Comparison, seconds: float) -> tuple[float, str]:
    """Environment steps per second since the first one, as `shoal train` says it, or after the warm-up, as the run's record says it."""
    words = [
        "train",
        comparison.environment,
        "--algorithm",
        comparison.algorithm,
        *comparison.options.split(),
        "--stop.seconds",
        f"{seconds:g}",
    ]
    with tempfile.TemporaryDirectory(prefix="shoal-peers-") as scratch:
        command = [sys.executable, "-m", "shoal.cli", *words, "--run-dir", f"{scratch}/run", "--view", "silent", "--json"]
        result = json.loads(run(command, seconds, Path(scratch)))
        speed = steady_rate(Path(scratch) / "run") if comparison.learning_only else float(result["env_steps_per_second"])
    return speed, f"shoal {' '.join(words)}"


def peer_speed(comparison: Comparison, seconds: float, scripts: Path, python: Path) -> float:
    seconds = comparison.peer_seconds(seconds)
    script, *words = comparison.peer.replace("SECONDS", f"{seconds:g}").split()
    with tempfile.TemporaryDirectory(prefix="shoal-peers-") as scratch:
        said = run([str(python), str((comparison.scripts or scripts) / script), *words], seconds, Path(scratch))
    found = re.findall(r"sps=(\d+)", said)
    if not found or int(found[-1]) == 0:
        raise CommandError(f"{script} measured no speed in {seconds:g} s (sps=...):\n{said[-2000:]}")
    return float(found[-1])


def run(command: Sequence[str], seconds: float, directory: Path) -> str:
    """Standard output of a command that runs with one thread per process, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, complained = started.communicate(timeout=seconds + START_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        raise CommandError(f"`{' '.join(command)}` did not end within {seconds + START_SECONDS:g} s") from None
    if started.returncode != 0:
        raise CommandError(f"`{' '.join(command)}` ended with code {started.returncode}:\n{complained[-2000:]}")
    return said


def peer_versions(python: Path) -> dict[str, str]:
    names = ["stable-baselines3", "ray", "torch", "gymnasium"]
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    said = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    versions: dict[str, str] = json.loads(said)
    return versions


# ---- the table -------------------------------------------------------------------------------------------------------
def write_table(rows_file: Path) -> str:
    texts = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.exists() else []
    text = "\n".join(table([json.loads(line) for line in texts])) + "\n"
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    rows_file.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The newest measurement of every comparison."""
    yield "# Beside other libraries"
    yield ""
    yield "`make bench-peers` (benchmarks/peers.py): shoal and the peer run in turn on the same machine; medians over pairs, in environment steps per"
    yield "second with learning included. Matched protocol: 8 environments x 128 steps, minibatch 256, 4 epochs, separate 2x64 tanh actor and critic,"
    yield "Adam 2.5e-4, gradient norm 0.5, CPU. IMPALA has one epoch; on the throughput track groups and batch are chosen freely."
    yield "DQN (16 environments, of the peer 16 or 1; 2x64, batch 128, Adam 1e-3, one update per 4 steps, the target copied every 10,000 steps,"
    yield "epsilon 0.05) and SAC (4 environments, 2x256, batch 256, Adam 3e-4, one update per step, learned temperature, tau 0.005): on both sides ReLU,"
    yield "a replay of 100,000 steps, sampled uniformly, one-step returns, learning from 1,000 steps on; no double or duelling. Their speed is counted"
    yield "once learning has started."
    yield "The commands are in peers.jsonl."
    yield ""
    yield "| shoal / peer | shoal | peer | median of ratios | lowest, highest | wanted | pairs of | date | load |"
    yield "| --- | ---: | ---: | ---: | --- | --- | --- | --- | --- |"
    newest = {row["comparison"]: row["measurement"] for row in rows}
    found = {name: [r for r in rows if (r["comparison"], r["measurement"]) == (name, at)] for name, at in newest.items()}
    order = [c.name for c in COMPARISONS]
    for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order)):
        yield line(name, found[name])
    machines = {json.dumps(row["machine"], sort_keys=True): row["machine"] for of in found.values() for row in of}
    versions = {json.dumps(row["versions"], sort_keys=True): row["versions"] for of in found.values() for row in of}
    yield ""
    for one in machines.values():
        yield f"Machine: {one['cpu']}, {one['cores']} cores, torch {one['torch']}, Python {one['python']}."
    for one in versions.values():
        yield f"Peers: {', '.join(f'{name} {number}' for name, number in one.items())}."


def line(name: str, rows: list[dict[str, Any]]) -> str:
    pairs, first = [row for row in rows if row["ratio"] is not None], rows[0]
    own = statistics.median(row["shoal"] for row in rows)
    ratio = statistics.median(row["ratio"] for row in pairs) if pairs else 0.0
    wanted = ""
    if first["times"] is not None:
        wanted = f">= {first['times']:g}x: {'yes' if ratio >= first['times'] else '**no**'}"
    if first["floor"] is not None:
        wanted = f">= {first['floor']:,} steps/s: {'yes' if own >= first['floor'] else '**no**'}"
    peer = f"{statistics.median(row['peer'] for row in pairs):,.0f}" if pairs else "failed"
    spread = f"{min(row['ratio'] for row in pairs):.2f}, {max(row['ratio'] for row in pairs):.2f}" if pairs else ""
    loads = ", ".join(f"{row['load']:g}" for row in rows)
    return (
        f"| {name} | {own:,.0f} | {peer} | {f'{ratio:.2f}' if pairs else ''} | {spread} | {wanted} "
        f"| {len(pairs) or len(rows)} x {first['seconds']:g} s | {first['measurement'][:10]} | {loads} |"
    )


if __name__ == "__main__":
    sys.exit(main())
