"""Whole runs of the command line in processes of their own, and what is asked of them when they are over."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import answer_here, said_here
from held import Line
from shoal.files import CheckpointDirectory

from .killing import TIMEOUT_SECONDS, Killer, alive, attend, kill_whole

HERE = Path(__file__).resolve().parent
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
# Of several learners that learn from replays: not among TASKS, since a whole run takes its time, and each test of all would make some of them. Few steps for
# each insert, since each is an exchange.
SEVERAL = {f"{name}, two learners": [*TASKS[name], "--learners", "2", "--replay.samples-per-insert", "1.1"] for name in ("dqn", "sac")}


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


def start(args: Sequence[str], log: Path, env: dict[str, str] | None = None, line: Line | None = None) -> subprocess.Popen[str]:
    """The command line, at once; with a line, `train` and `resume` wait after every update (tests/held.py)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TERM": "dumb", **(env or {})}
    paths = [str(HERE.parents[1] / "src"), str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with log.open("ab") as errors, log.with_suffix(".out").open("wb") as out:
        if line is not None:
            return line.start([*args, "--json"], environment, stdout=out, stderr=errors, cwd=log.parent)
        command = [sys.executable, "-m", "shoal.cli", *args, "--json"]
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
    """`shoal train`, with killers at work; in this process where there are none. Fails where a kill was not sent, or the run did not notice a killer."""
    if killers:
        log = run.with_suffix(".log")
        with contextlib.closing(Line()) as line:
            process = start(["train", *args, "--run-dir", str(run)], log, env, line)
            try:
                attend(process, line, killers)
            finally:
                process.kill()
                process.wait()
        outcome = Outcome(answer(process, log), sum(len(k.sent) for k in killers))
    else:
        outcome = Outcome(answer_here("train", *args, "--run-dir", str(run), env=env))
    deaths = noticed_deaths(run)
    outcome.noticed = len(deaths)
    for killer in killers:
        killer.assert_all_hit(deaths)
    balanced(outcome.result)
    return outcome


def noticed_deaths(run: Path) -> list[str]:
    """Roles that the run itself saw killed by SIGKILL which it had not sent (events of run.db)."""
    with sqlite3.connect(run / "run.db") as connection:
        facts = [json.loads(row[0]) for row in connection.execute("SELECT json FROM events WHERE kind = 'died'")]
    return [f"{f['role']}-{f['index']}" for f in facts if "SIGKILL" in f["how"] and not f["reason"]]


def train_through_kills(
    args: Sequence[str], run: Path, kills: int, updates: int, seed: int, env: dict[str, str] | None = None, killers: tuple[Killer, ...] = ()
) -> Outcome:
    """`shoal train`, then `shoal resume` as often as the whole run was killed, which is `kills` times: every other time its supervisor
    alone (whose end ends everything), else every process of it in random order. The next part begins at once. `killers` are at work in the last part.
    """
    rng = random.Random(f"whole {kills} {updates} {seed}")
    moments = sorted(rng.randint(0, int(updates * 0.8)) for _ in range(kills))
    all_of_it = rng.random() < 0.5
    log = run.with_suffix(".log")
    saves_hit = 0
    old: list[int] = []
    with contextlib.closing(Line()) as line:
        for moment in [*moments, None]:
            command = ["resume", str(run)] if (run / "config.yaml").exists() else ["train", *args, "--run-dir", str(run)]
            held = line if moment is not None or killers else None
            process = start(command, log, env, held)
            try:
                if moment is None:
                    attend(process, held, killers)
                else:
                    old += kill_whole(process, line, moment, rng, log, all_of_it=all_of_it)
                    all_of_it = not all_of_it
                    saves_hit += any(name.startswith(".staging") for name in _names(run / "checkpoints"))
            finally:
                process.kill()
                process.wait()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(map(alive, old)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, old)), "processes outlived the supervisor that was killed"
    outcome = Outcome(answer(process, log), kills, kills, kills + 1, saves_hit)
    for killer in killers:
        killer.assert_all_hit(noticed_deaths(run))
    balanced(outcome.result)
    return outcome


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


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


def alone(args: Sequence[str], run: Path) -> Outcome:
    """`shoal train` with all roles in this process (`--actors 0`)."""
    return train([*args, "--actors", "0"], run)


def assert_replayed(run: Path) -> None:
    """`shoal replay`, in this process, ends with the same weights."""
    assert answer_here("replay", str(run))["equal"] is True


def refused(*args: str, code: int = 2) -> str:
    """What a command that ends with this code says, in this process."""
    said = said_here(*args)
    assert said.code == code, said.err
    return said.err


def made_once(name: str, args: Sequence[str], shared: Path) -> Outcome:
    """A training with all roles in one process, made once for all tests and test processes."""
    place = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = place.with_suffix(".json")
        if not kept.exists():
            kept.write_text(json.dumps(alone(args, place).result))
        return Outcome(json.loads(kept.read_text()))


def reference(task: str, updates: int, shared: Path) -> Outcome:
    """The same training with all roles in one process."""
    return made_once(f"{task}-{updates}", [*(TASKS | SEVERAL)[task], "--stop.updates", str(updates)], shared)
