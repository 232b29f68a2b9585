"""Whole runs of the command line in processes of their own, and somebody who kills their processes with SIGKILL at random moments.

When a kill comes is drawn in units of progress (committed checkpoints), plus a random moment, so that kills hit a slow and a fast machine alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.files import CheckpointDirectory

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 1800.0  # of one part of a run: generous, it only ends what hangs
POLL_SECONDS = 0.004
ROLES = ("shoal:actor", "shoal:learner", "shoal:inference")
SAMPLING = ["--preset", "none", "--sampling.groups", "4", "--sampling.group-size", "4", "--sampling.rollout-length", "24"]
SAVING = ["--checkpoint.every-updates", "2"]
PPO = [*SAMPLING, "--algorithm", "ppo", "--algorithm.epochs", "2", "--algorithm.minibatch-size", "128", *SAVING]
REPLAY = ["--replay.learning-starts", "200", "--replay.capacity-steps", "3000", "--algorithm.batch-size", "32", *SAVING]
TASKS = {
    "cartpole": ["CartPole-v1", *PPO],
    "images": [f"{HERE / 'environments.py'}:Images", *PPO, "--sampling.group-size", "2", "--sampling.rollout-length", "16"],
    "dict": [
        f"{HERE / 'environments.py'}:Readings", *PPO, "--policy.hidden-sizes", "256,256",
        "--policy.normalise-observations", "true", "--policy.normalise-rewards", "true",
    ],
    "dqn": ["CartPole-v1", *SAMPLING, "--algorithm", "dqn", "--replay.samples-per-insert", "3.1", *REPLAY],
    "sac": [
        f"{HERE / 'environments.py'}:Readings", *SAMPLING, "--algorithm", "sac", "--policy.hidden-sizes", "64,64",
        "--replay.samples-per-insert", "1.3", *REPLAY,
    ],
    "discrete-sac": ["CartPole-v1", *SAMPLING, "--algorithm", "sac", "--policy.hidden-sizes", "64,64", "--replay.samples-per-insert", "1.3", *REPLAY],
    "td3": [
        f"{HERE / 'environments.py'}:Readings", *SAMPLING, "--algorithm", "td3", "--policy.hidden-sizes", "64,64",
        "--replay.samples-per-insert", "1.3", *REPLAY,
    ],
    "r2d2": [
        f"{HERE.parents[1] / 'examples' / 'memory.py'}:hidden_velocities", *SAMPLING, "--algorithm", "r2d2", "--policy.memory", "gru",
        "--policy.memory-size", "24", "--replay.samples-per-insert", "6.1", *REPLAY, "--algorithm.batch-size", "8",
    ],
    "memory": [f"{HERE.parents[1] / 'examples' / 'memory.py'}:hidden_velocities", *PPO, "--policy.memory", "lstm", "--policy.memory-size", "24"],
    "learners": [
        f"{HERE / 'environments.py'}:Readings", *PPO, "--learners", "2", "--policy.hidden-sizes", "64,64",
        "--policy.normalise-observations", "true", "--policy.normalise-rewards", "true",
    ],
}  # fmt: skip
# Of several learners that learn from replays: not among TASKS, since a whole run takes its time, and each test of all would make some of them.
SEVERAL = {f"{name}, two learners": [*TASKS[name], "--learners", "2"] for name in ("dqn", "sac")}


@dataclass
class Proc:
    pid: int
    name: str
    state: str


def descendants(root: int) -> list[Proc]:
    """Living processes below `root`, from /proc."""
    children: dict[int, list[Proc]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
            except OSError:
                continue
            name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            children.setdefault(int(rest[1]), []).append(Proc(int(entry), name, rest[0]))
    found, todo = [], [root]
    while todo:
        for process in children.get(todo.pop(), []):
            found.append(process)
            todo.append(process.pid)
    return [p for p in found if p.state not in "ZX"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def newest_checkpoint(run: Path) -> int:
    """Update of the newest committed checkpoint, -1 where there is none."""
    try:
        names = os.listdir(run / "checkpoints")
    except OSError:
        return -1
    return max((int(digits) for name in names if (digits := name.partition("-")[2][:9].partition(".")[0]).isdigit()), default=-1)


@dataclass
class Killer:
    """Kills one living role whose name begins with `prefix`, as soon as a checkpoint passed the next of `moments`, and a bit later.

    It lets every role live until progress was made after its `patience` latest kills, since a role that dies again and again without any
    progress is rightly given up. `times` are the kills that were sent.
    """

    prefix: str
    moments: list[int]
    rng: random.Random
    patience: int = 3
    jitter_seconds: float = 0.15
    together: bool = False  # all of them at once
    sent: list[tuple[int, str]] = field(default_factory=list)  # (newest checkpoint then, role)
    not_before: float = 0.0
    seen: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, prefix: str, kills: int, updates: int, seed: int) -> Killer:
        rng = random.Random(f"{prefix} {kills} {updates} {seed}")
        last = int(updates * 0.6)  # the end of the run is whole: what was lost last is made again
        return cls(prefix, sorted(rng.randint(0, last) for _ in range(kills)), rng, patience=3 if "actor" in prefix else 2)

    def tick(self, root: int, run: Path) -> None:
        newest = newest_checkpoint(run)
        if not self.moments or newest < self.moments[0] - 1 or time.monotonic() < self.not_before:
            return
        if len(self.sent) >= self.patience and self.sent[-self.patience][0] >= newest:
            return
        victims = [p for p in descendants(root) if p.name.startswith(self.prefix) and p.name.startswith(ROLES) and p.pid not in self.seen]
        if not victims or (self.together and len({p.name for p in victims}) < 2):
            return
        victim = self.rng.choice(victims)
        time.sleep(self.rng.random() * self.jitter_seconds)
        self.seen.add(victim.pid)
        if alive(victim.pid):
            for pid in [p.pid for p in victims] if self.together else [victim.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.sent.append((newest, victim.name))
            self.moments.pop(0)
            self.not_before = time.monotonic() + self.rng.random() * self.jitter_seconds


@dataclass
class Outcome:
    """How a run ended: its answer (`--json`), kills that were sent and those that the run itself noticed, parts it was run in."""

    result: dict[str, Any]
    sent: int = 0
    noticed: int = 0
    parts: int = 1
    saves_hit: int = 0  # kills of whole runs that found a checkpoint half written

    @property
    def sha(self) -> str:
        return str(self.result["weights_sha256"])


def start(args: Sequence[str], log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TERM": "dumb", **(env or {})}
    paths = [str(HERE.parents[1] / "src"), str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "shoal.cli", *args, "--json"]
    with log.open("ab") as errors, log.with_suffix(".out").open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=environment, cwd=log.parent)


def answer(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.returncode == 0, f"exit {process.returncode}: {log.read_text(errors='replace')[-4000:]}"
    found = json.loads(log.with_suffix(".out").read_text())
    assert isinstance(found, dict)
    return found


def shoal(*args: str, log: Path, env: dict[str, str] | None = None) -> dict[str, Any]:
    """One command from its beginning to its end; its answer."""
    process = start(args, log, env)
    try:
        process.wait(TIMEOUT_SECONDS)
    finally:
        process.kill()
    return answer(process, log)


def train(args: Sequence[str], run: Path, *killers: Killer, env: dict[str, str] | None = None) -> Outcome:
    """`shoal train`, with killers at work. Fails if a killer never hit, or the run did not notice."""
    log = run.with_suffix(".log")
    process = start(["train", *args, "--run-dir", str(run)], log, env)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            for killer in killers:
                killer.tick(process.pid, run)
            time.sleep(POLL_SECONDS if killers else 0.05)
    finally:
        process.kill()
        process.wait()
    outcome = Outcome(answer(process, log), sum(len(k.sent) for k in killers))
    deaths = noticed_deaths(run)
    outcome.noticed = len(deaths)
    for killer in killers:
        assert any(role.startswith(killer.prefix.partition(":")[2]) for role in deaths), f"no kill of {killer.prefix} hit the run"
    balanced(outcome.result)
    return outcome


def noticed_deaths(run: Path) -> list[str]:
    """Roles that the run itself saw killed by SIGKILL which it had not sent (events of run.db)."""
    with sqlite3.connect(run / "run.db") as connection:
        facts = [json.loads(row[0]) for row in connection.execute("SELECT json FROM events WHERE kind = 'died'")]
    return [f"{f['role']}-{f['index']}" for f in facts if "SIGKILL" in f["how"] and not f["reason"]]


def train_through_kills(
    args: Sequence[str], run: Path, kills: int, updates: int, seed: int, env: dict[str, str] | None = None, killers: Sequence[Killer] = ()
) -> Outcome:
    """`shoal train`, then `shoal resume` as often as the whole run was killed, which is `kills` times: every other time its supervisor
    alone (whose end ends everything), else every process of it in random order. The next part begins at once.
    """
    rng = random.Random(f"whole {kills} {updates} {seed}")
    moments = sorted(rng.randint(0, int(updates * 0.8)) for _ in range(kills))
    log = run.with_suffix(".log")
    saves_hit, sent, parts = 0, 0, 0
    old: list[int] = []
    for moment in [*moments, None]:
        command = ["resume", str(run)] if (run / "config.yaml").exists() else ["train", *args, "--run-dir", str(run)]
        process = start(command, log, env)
        parts += 1
        try:
            if moment is None:
                wait_with(process, run, killers)
                break
            old += _kill_whole(process, run, moment, rng)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            break  # it was quicker
        sent += 1
        saves_hit += any(name.startswith(".staging") for name in _names(run / "checkpoints"))
    deadline = time.monotonic() + 120
    while any(map(alive, old)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, old)), "processes outlived the supervisor that was killed"
    outcome = Outcome(answer(process, log), sent, sent, parts, saves_hit)
    assert sent, "no kill hit the run"
    balanced(outcome.result)
    return outcome


def wait_with(process: subprocess.Popen[str], run: Path, killers: Sequence[Killer]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        for killer in killers:
            killer.tick(process.pid, run)
        time.sleep(POLL_SECONDS)


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


def _kill_whole(process: subprocess.Popen[str], run: Path, moment: int, rng: random.Random) -> list[int]:
    """Wait for the moment while the run is under way, then kill. Returns the pids of all its processes."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        assert process.poll() is None, (
            f"ended before it was killed, with {process.returncode}: {run.with_suffix('.log').read_text()[-4000:]}"
        )
        assert time.monotonic() < deadline, "no progress"
        below = descendants(process.pid)
        if newest_checkpoint(run) >= moment - 1 and any(p.name.startswith("shoal:learner") for p in below):
            break
        time.sleep(POLL_SECONDS)
    time.sleep(rng.random() * 0.4)
    below = descendants(process.pid)
    victims = [process.pid]
    if rng.random() < 0.5:
        victims += [p.pid for p in below]
        rng.shuffle(victims)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return [p.pid for p in below]


def balanced(result: dict[str, Any]) -> None:
    """produced = trained + replayed + dropped + in flight, and nothing in flight at the end."""
    ledger = result["ledger"]
    consumed = ledger["trained"] + ledger.get("replayed", 0)
    assert ledger["produced"] == consumed + sum(ledger["dropped"].values()) + ledger["in_flight"], ledger
    assert ledger["in_flight"] == 0
    assert consumed == result["env_steps"]


def groups_of(run: Path) -> dict[int, dict[str, Any]]:
    """The ledger per group in the newest checkpoint: steps by fate, produced_steps."""
    ledger = CheckpointDirectory(run / "checkpoints").newest().json("coordinator")["ledger"]
    return {int(group): row for group, row in ledger.items()}


def reference(task: str, updates: int, shared: Path) -> Outcome:
    """The same training with all roles in one process (`--actors 0`), made once for all tests and test processes."""
    place = shared / f"reference-{task}-{updates}"
    with (shared / f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = place.with_suffix(".json")
        if not kept.exists():
            outcome = train([*(TASKS | SEVERAL)[task], "--stop.updates", str(updates), "--actors", "0"], place)
            kept.write_text(json.dumps(outcome.result))
        return Outcome(json.loads(kept.read_text()))
