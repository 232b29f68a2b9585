"""Rows of soak_faults.py: processes that are killed, stopped and woken, numbers that diverge, configurations that cannot be, stalls, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from injected import CAP_SECONDS, ENDLESS, ROOT, Found, Row, answer, events, kwargs  # first: it finds the tests' helpers

from faults.living import SMALL, TINY, Living, command, living, saved
from shoal.engines.process import DEATHS_IN_A_ROW as DEATHS
from shoal.engines.process import back_off_seconds
from shoal.files import CheckpointDirectory
from shoal.supervision.injector import roles_below

ZOO = f"{ROOT / 'tests' / 'environments' / 'faulty.py'}:make"
SIMULATED = ROOT / "tests" / "faults" / "simulated.py"
ALGORITHMS = {"ppo": ["--algorithm", "ppo"], "appo": ["--algorithm", "appo"]}


# ---- actors and the learner, at random moments ----------------------------------------------------------------------------
def chaos(
    kind: str, every: float, algorithm: str, within: tuple[float, float], seconds: float, *more: str
) -> Callable[[Found, Path], None]:
    def work(found: Found, place: Path) -> None:
        with living(
            "chaos", "CartPole-v1", f"--{kind}", f"{every:g}s", "--seconds", f"{seconds:g}", *ALGORITHMS[algorithm], "--actors", "2", *more,
            "--run-dir", str(place / "run"), "--json", cwd=place,
        ) as run:  # fmt: skip
            code, said, _ = answer(run)
            found.expect(code == 0, f"code {code}: {run.said[-300:]}")
        mine = said.get("faults", {}).get(kind, {})
        if not mine.get("recovered"):
            found.expect(False, f"nobody recovered: {mine}")
            return
        found.times = mine["injected"]
        found.figure = f"p50 {mine['p50']:.2f} s, p99 {mine['p99']:.2f} s, at most {mine['max']:.2f} s; the ledger balances" + (
            "; the weights are those without" if said["weights_equal"] else ""
        )
        found.expect(mine["p50"] <= within[0] and mine["p99"] <= within[1], f"p50 {within[0]:g} s and p99 {within[1]:g} s are wanted")
        found.expect(said["balances"], "the ledger does not balance")
        found.expect(said["weights_equal"] is not False, "the weights are others")

    return work


def kept(seconds: float, share: float) -> Callable[[Found, Path], None]:
    """Throughput with a kill every five seconds against that without, in turns of one run, which takes twice `seconds`."""

    def work(found: Found, place: Path) -> None:
        with living(
            "chaos",
            "CartPole-v1",
            "--kill",
            "5s",
            "--seconds",
            f"{seconds:g}",
            "--no-compare",
            "--run-dir",
            str(place / "run"),
            "--json",
            cwd=place,
        ) as run:
            out, _ = run.process.communicate(timeout=2 * seconds + CAP_SECONDS)
        found.expect(run.process.returncode == 0, f"code {run.process.returncode}: {run.said[-300:]}")
        if run.process.returncode == 0:
            said = json.loads(out)
            found.times, found.figure = (
                said["faults"]["kill"]["injected"],
                f"{said['kept']:.1%} kept of {said['env_steps_per_second']['quiet']:,.0f} env steps/s",
            )
            found.expect(said["kept"] >= share, f"{share:.0%} are wanted")
            found.expect(said["balances"], "the ledger does not balance")

    return work


@contextlib.contextmanager
def training(place: Path, *more: str, environment: str = "CartPole-v1") -> Iterator[tuple[Living, Path]]:
    """A run without end, with a checkpoint made."""
    directory = place / "run"
    with living("train", environment, *TINY, *ENDLESS, "--run-dir", str(directory), "--json", *more, cwd=place) as run:
        run.until(lambda: saved(directory), "checkpoint")
        run.until(lambda: len(roles_below(run.process.pid)) > 1, "actor")
        yield run, directory


def role(run: Living, name: str, index: int = 0) -> int:
    """The number of a living role's process."""
    if name == "zygote":
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "shoal:zygote")
    run.until(lambda: (name, index) in roles_below(run.process.pid), name)
    return roles_below(run.process.pid)[name, index]


def interrupt(run: Living, found: Found) -> dict[str, Any]:
    run.process.send_signal(signal.SIGINT)
    code, said, _ = answer(run)
    found.expect(code == 130, f"code {code}: {run.said[-300:]}")
    ledger = said.get("ledger", {"produced": -1, "trained": 0, "dropped": {}, "in_flight": 0})
    balanced = ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"]
    found.expect(balanced, "the ledger does not balance")
    return said


def again_and_again(name: str, number: signal.Signals, times: int, algorithm: str, wake: bool = False) -> Callable[[Found, Path], None]:
    """Signal a role so many times, each time once the last is mended. Figures: as the events `recovered` say."""

    def work(found: Found, place: Path) -> None:
        rng = random.Random(name)
        with training(place, *ALGORITHMS[algorithm], "--actors", "2") as (run, directory):
            for time_ in range(1, times + 1):
                time.sleep(0.5 + rng.random())
                pid = role(run, name)
                os.kill(pid, number)
                if wake:
                    time.sleep(rng.uniform(0.3, 1.0))  # before or after it is noticed and replaced
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                    continue
                back = "learner" if name in ("learner", "zygote") else name
                run.until(lambda: sum(e["role"] == back for e in events(directory, "recovered")) >= time_, "recovery")  # noqa: B023
            time.sleep(1.0)
            found.times = times
            interrupt(run, found)
            back = [e for e in events(directory, "recovered") if e["role"] == ("actor" if name == "actor" else "learner")]
            found.seconds = [e["seconds"] - e["restoring_seconds"] for e in back]
            if wake:
                found.figure = f"{len(back)} replaced; the ledger balances"

    return work


def all_at_once(algorithm: str) -> Callable[[Found, Path], None]:
    """Kill every actor in the same moment, again and again. Figures: as the events `recovered` say."""

    def work(found: Found, place: Path) -> None:
        rng = random.Random(algorithm)
        with training(place, *ALGORITHMS[algorithm], "--actors", "2") as (run, directory):
            for time_ in range(1, 9):
                time.sleep(0.5 + rng.random())
                for pid in [role(run, "actor", index) for index in range(2)]:
                    os.kill(pid, signal.SIGKILL)
                run.until(lambda: len(events(directory, "recovered")) >= 2 * time_, "recovery")  # noqa: B023
                found.times += 2
            interrupt(run, found)
            found.expect(len(events(directory, "died")) == found.times, f"{len(events(directory, 'died'))} deaths are in the books")
            found.seconds = [e["seconds"] - e["restoring_seconds"] for e in events(directory, "recovered")]

    return work


def crash_loop(name: str, code: int, says: str) -> Callable[[Found, Path], None]:
    """Kill a role as often as it comes."""

    def work(found: Found, place: Path) -> None:
        with training(place, "--actors", "1") as (run, _):
            begun, last = time.monotonic(), 0
            while run.process.poll() is None and time.monotonic() - begun < CAP_SECONDS:
                with contextlib.suppress(StopIteration, OSError, AssertionError, KeyError):
                    pid = role(run, "zygote") if name == "zygote" else roles_below(run.process.pid)[name, 0]
                    if pid != last:
                        os.kill(pid, signal.SIGKILL)
                        found.times, last = found.times + 1, pid
                time.sleep(0.01)
            found.seconds = [time.monotonic() - begun]
            got, said, _ = answer(run)
        least = sum(map(back_off_seconds, range(1, DEATHS)))
        found.expect(found.seconds[0] > least, f"it did not back off: {least:g} s of waiting are wanted")
        message = said.get("error", {}).get("message", "")
        found.expect(got == code, f"code {got}: {message or run.said[-200:]}")
        found.expect(says in message, f"the message is {message}")

    return work


def supervisor(found: Found, place: Path) -> None:
    found.times = 5
    for number in range(found.times):
        here = place / str(number)
        here.mkdir()
        with training(here, "--actors", "2", environment=f"{SIMULATED}:make") as (run, directory):
            time.sleep(0.3 * number)
            begun = time.monotonic()
            run.process.kill()
            run.process.wait()
            run.gone(2.0)
            found.seconds.append(time.monotonic() - begun)
        newest = CheckpointDirectory(directory / "checkpoints").newest()
        code, _, said = command("resume", str(directory), "--stop.updates", str(newest.update + 1), cwd=here)
        found.expect(code == 0, f"resume: code {code}: {said}")


# ---- numbers ---------------------------------------------------------------------------------------------------------------
def diverging(at: str, code: int) -> Callable[[Found, Path], None]:
    """Rewards whose square no float32 holds."""

    def work(found: Found, place: Path) -> None:
        with living(
            "train", f"{ROOT / 'tests' / 'faults' / 'huge.py'}:make", *TINY, "--actors", "1", *kwargs(at=at), "--checkpoint.every-updates", "2",
            "--stop.updates", "40", "--run-dir", str(place / "run"), "--json", cwd=place,
        ) as run:  # fmt: skip
            got, said, _ = answer(run)
            found.expect(got == code, f"code {got}: {run.said[-300:]}")
        found.times = 1
        rolled = len(events(place / "run", "diverged"))
        found.expect(rolled == (code == 4), f"rolled back {rolled} times")
        if code == 0:
            found.expect(said["skipped_steps"] > 0, "no step was skipped")
            found.figure = f"{said['skipped_steps']} optimizer steps skipped"
        else:
            found.figure = f"rolled back {rolled} time, then: {said.get('error', {}).get('message', '').splitlines()[0][:120]}"

    return work


# ---- configurations --------------------------------------------------------------------------------------------------------
REFUSED: list[tuple[list[str], list[str]]] = [
    (["CartPole-v1", "--algorithm.learning-rat", "1"], ["algorithm.learning_rat", "did you mean algorithm.learning_rate"]),
    (["CartPole-v1", "--algorithm.learning-rate", "fast"], ["algorithm.learning_rate", "number"]),
    (["CartPole-v1", "--algorithm.gamma", "1.5"], ["algorithm.gamma", "1"]),
    (["CartPole-v1", "--sampling.groups", "0"], ["sampling.groups", "greater than 0"]),
    (["CartPole-v1", "--actors", "9", "--sampling.groups", "2"], ["actors", "sampling.groups"]),
    (["CartPole-v1", "--mode", "async", "--algorithm", "ppo"], ["mode", "sync"]),
    (["CartPole-v1", "--algorithm.minibatch-size", "1000000"], ["algorithm.minibatch_size"]),
    (["CartPole-v9"], ["CartPole-v9", "did you mean CartPole-v1"]),
    (["Cartpole-v1"], ["did you mean CartPole-v1"]),
    (["CartPole-v1", "--algorithm", "pop"], ["pop", "ppo"]),
    (["nowhere.yaml"], ["nowhere.yaml"]),
    (["nowhere/file.py:make"], ["nowhere/file.py"]),
    (["CartPole-v1", "--device", "cuda:7"], ["device"]),
    (["CartPole-v1", "--preset", "nothing"], ["preset"]),
    (["CartPole-v1", "--stop.env-steps", "-1"], ["stop.env_steps"]),
    (["CartPole-v1", "--policy.exploration", "gsde"], ["policy.exploration"]),
    ([f"{ROOT / 'tests' / 'faults' / 'huge.py'}:text"], ["action space", "Text"]),
    (["CartPole-v1", "--env.kwargs.gravitas", "3"], ["env.kwargs", "gravitas"]),
    (["CartPole-v1", "--sampling.groups", "1000000000"], ["sampling.groups", "free here"]),
]  # fmt: skip


def configurations(found: Found, place: Path) -> None:
    for args, parts in REFUSED:
        begun = time.monotonic()
        code, out, said = command("train", *args, "--json", "--view", "silent", cwd=place)
        found.seconds.append(time.monotonic() - begun)
        found.times += 1
        name = " ".join(args)
        found.expect(code == 2, f"{name}: code {code}")
        found.expect(all(part in said for part in parts), f"{name}: {said}")
        found.expect(code != 2 or json.loads(out)["error"]["exit_code"] == 2, f"{name}: no object")
        found.expect(not list((place / "runs").glob("*")), f"{name}: a run is left")


# ---- stalls -----------------------------------------------------------------------------------------------------------------
def stalls(found: Found, place: Path) -> None:
    for number, (fault, how) in enumerate((fault, how) for fault in ("sleeps", "loops") for how in ALGORITHMS.values()):
        here = place / str(number)
        here.mkdir()
        with living(
            "train", ZOO, *TINY, *how, *kwargs(fault=fault, hidden=True, told=here / "told"), "--env.step-timeout-seconds", "100", "--actors", "2",
            "--run-dir", str(here / "run"), cwd=here,
        ) as run:  # fmt: skip
            run.until((here / "told").exists, "fault")
            time.sleep(1.0)
            begun = time.monotonic()
            code, out, said = command("stalls", str(here / "run"), "--json", cwd=here)
            found.seconds.append(time.monotonic() - begun)
            found.times += 1
            known = json.loads(out)["stalls"] if code == 0 else {}
            found.expect(code == 0 and "actor" in " ".join(known["blamed"]), f"{fault}: {said or known.get('blamed')}")
            found.expect(
                any("faulty.py" in process["stack"] for process in known.get("processes", ())), f"{fault}: no stack shows the environment"
            )
            os.kill(run.process.pid, signal.SIGUSR1)
            run.until(lambda: "faulty.py" in run.said, "answer on standard error")


# ---- ends -------------------------------------------------------------------------------------------------------------------
def ends(how: str, times: int) -> Callable[[Found, Path], None]:
    def work(found: Found, place: Path) -> None:
        for number in range(times):
            here = place / str(number)
            here.mkdir()
            more = ["--algorithm", list(ALGORITHMS)[number % 2], "--actors", str((2, 2, 0)[number % 3])]
            if how == "update":
                more = ["--algorithm", f"{SIMULATED}:Slow", "--actors", "1"]
            args = SMALL if how == "update" else TINY
            directory = here / "run"
            with living("train", "CartPole-v1", *args, *ENDLESS, *more, "--run-dir", str(directory), cwd=here) as run:
                run.until(lambda: saved(directory), "checkpoint")  # noqa: B023
                time.sleep(1.0)
                begun = time.monotonic()
                run.process.send_signal(signal.SIGINT)
                if how == "twice":
                    time.sleep(0.02)
                    run.process.send_signal(signal.SIGINT)
                code = run.ends()
                found.seconds.append(time.monotonic() - begun)
                run.gone(2.0)
            found.times += 1
            found.expect(code == 130, f"code {code}: {run.said[-200:]}")
            found.expect(not CheckpointDirectory(directory / "checkpoints").newest().warnings, "the checkpoint is damaged")

    return work


ROWS = {
    **{
        f"actor/killed, {algorithm}": Row(
            f"SIGKILL of an actor, every second ({algorithm})", "replaced: median 1 s, p99 3 s at most; the others go on, the ledger balances",
            chaos("kill", 1.0, algorithm, (1.0, 3.0), 15.0 if algorithm == "ppo" else 30.0),
        )
        for algorithm in ALGORITHMS
    },
    **{
        f"actor/stopped, {algorithm}": Row(
            f"SIGSTOP of an actor, every two seconds ({algorithm})", "replaced: median 1 s, p99 3 s at most, from detection",
            chaos("stop", 2.0, algorithm, (1.0, 3.0), 15.0 if algorithm == "ppo" else 30.0),
        )
        for algorithm in ALGORITHMS
    },
    **{
        f"actor/all at once, {algorithm}": Row(
            f"SIGKILL of all actors at once ({algorithm})", "replaced: median 1 s, p99 3 s at most; each death is counted",
            all_at_once(algorithm), (1.0, 3.0),
        )
        for algorithm in ALGORITHMS
    },
    "actor/throughput": Row("SIGKILL of an actor every 5 s, for 10 minutes", "at least 85 % of the throughput without", kept(600.0, 0.85)),
    "actor/woken": Row(
        "SIGSTOP of an actor, SIGCONT 0.3 to 1 s later", "harms nothing", again_and_again("actor", signal.SIGSTOP, 15, "appo", wake=True)
    ),
    "actor/crash loop": Row(
        "SIGKILL of the only actor as often as it comes", f"backs off, code 3 after {DEATHS}, with its last words",
        crash_loop("actor", 3, "every actor died 5 times"),
    ),
    **{
        f"learner/killed, {algorithm}": Row(
            f"SIGKILL of the learner ({algorithm})", "back within 5 s, at the last checkpoint",
            again_and_again("learner", signal.SIGKILL, 8, algorithm), (5.0, 5.0),
        )
        for algorithm in ALGORITHMS
    },
    "learner/stopped": Row(
        "SIGSTOP of the learner", "back within 5 s, from detection", again_and_again("learner", signal.SIGSTOP, 5, "appo"), (5.0, 5.0)
    ),
    "learner/crash loop": Row(
        "SIGKILL of the learner as often as it comes", f"backs off, code 1 after {DEATHS}", crash_loop("learner", 1, "the learner died 5 times")
    ),
    "helper/killed": Row("SIGKILL of the helper process, with all roles", "all are made again", again_and_again("zygote", signal.SIGKILL, 4, "ppo")),
    "helper/crash loop": Row(
        "SIGKILL of the helper process as often as it comes", f"code 1 after {DEATHS}", crash_loop("zygote", 1, "the helper process died 5 times")
    ),
    "supervisor/killed": Row("SIGKILL of the supervisor, with simulators", "nothing is left after 2 s, `resume` works", supervisor, (2.0, 2.0)),
    "numbers/once": Row("rewards of 1e30 in one rollout", "steps skipped and counted, the run goes on", diverging("once", 0)),
    "numbers/for ever": Row("rewards of 1e30 from some moment on", "one roll-back, then code 4", diverging("later", 4)),
    "configuration": Row(
        f"{len(REFUSED)} configurations that cannot be", "code 2 within two seconds, with the key, what is allowed, the nearest name",
        configurations, (2.0, 4.0),
    ),
    "stalls": Row("an environment that hangs in a sleep, and in C", "`shoal stalls` and SIGUSR1 name the actor, with its stack", stalls),
    "ends/once": Row("Ctrl-C", "code 130 and a checkpoint within 3 s, nothing is left", ends("once", 12), (3.0, 3.0)),
    "ends/twice": Row("Ctrl-C twice", "code 130 at once, nothing is left", ends("twice", 6), (1.0, 1.0)),
    "ends/long update": Row("Ctrl-C in an update of ten minutes", "code 130 within 3 s, nothing is left", ends("update", 5), (3.0, 3.0)),
}  # fmt: skip
