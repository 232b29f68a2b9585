"""The second part of `make soak`: kills and disks that refuse while files are written, and what is left after a run's end.

    python benchmarks/soak_files.py                  all of it
    python benchmarks/soak_files.py saves bytes      only these sections (saves, bytes, disk, descriptors, cycles, kills, together)
    python benchmarks/soak_files.py --scale 0.1      a tenth of the cycles and kills
    python benchmarks/soak_files.py cycles --scale 0.25 --add    a quarter more, counted together with those before

Each section says what was injected, how often, what was to come of it and the figure; the table is results/soak_files.md. Exits with 1 where one
did not come out so. `saves` needs strace (it is installed where apt-get may), `disk` a file system that may be mounted; else they are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "src")]

from soak import machine  # noqa: E402

from faults.living import TINY, Living, command, living, saved, small_disk  # noqa: E402
from shoal.errors import CheckpointError  # noqa: E402
from shoal.files import CheckpointDirectory, load_checkpoint  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "soak_files.md"
ROWS = RESULT.with_suffix(".jsonl")
SIMULATED = str(ROOT / "tests" / "faults" / "simulated.py") + ":make"
ENDLESS = [*TINY, "--stop.updates", "1000000", "--checkpoint.every-updates", "2"]
PROMISED_SECONDS = 3.0  # from Ctrl-C to the end
GONE_SECONDS = 2.0
SMALL_KIB, LARGE_KIB = 16_384, 262_144  # of disks; what an environment prints in a minute fills the small one


@dataclass
class Row:
    fault: str
    times: int
    outcome: str
    figure: str
    held: bool = True
    seconds: list[float] = field(default_factory=list)  # of each time, where `--add` may add to them


class Skipped(Exception):
    """This machine does not allow what a section needs."""


# ---- a checkpoint's save ---------------------------------------------------------------------------------------------
SAVE = """
import sys
from pathlib import Path
import numpy as np
from shoal.files import CheckpointDirectory, write_arrays
root, update = Path(sys.argv[1]), int(sys.argv[2])
directory = CheckpointDirectory(root)
with directory.begin(update) as staging:
    staging.write_arrays("coordinator", {"returns": np.arange(50.0) + update})
    staging.write_json("coordinator", {"version": update})
    (staging.path / "policy").mkdir()
    write_arrays(staging.path / "policy" / "policy.safetensors", {"w": np.full(500, update, np.float32)})
    staging.commit()
directory.sweep(2)
"""
CALLS = "openat,mkdir,write,fsync,rename,unlink,unlinkat,rmdir,ftruncate,mmap,close,read,lseek,newfstatat,getdents64"


def saves(scale: float) -> Iterator[Row]:
    """SIGKILL at the n-th of every kind of system call of a save, for every n; then at random moments."""
    yield kill_at_every_call()
    yield kill_at_random(round(200 * scale))


def kill_at_every_call() -> Row:
    need_strace()
    killed, loaded = 0, {"the newest": 0, "the one before": 0}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "checkpoints"
        python(SAVE, root, 1)
        trace = Path(place) / "trace"
        python(SAVE, root, 2, prefix=["strace", "-f", "-y", "-e", f"trace={CALLS}", "-o", str(trace)])
        lines = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
        counted: dict[str, int] = {}
        wanted: list[tuple[str, int]] = []
        inside = False
        for line in lines:
            call = line.partition("(")[0]
            if call not in CALLS.split(","):
                continue
            counted[call] = counted.get(call, 0) + 1
            inside = inside or str(root) in line
            if inside:
                wanted.append((call, counted[call]))
        update = 2
        for call, number in wanted:
            prefix = ["strace", "-f", "-qq", "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}", "-o", "/dev/null"]
            code = python(SAVE, root, update + 1, prefix=prefix, check=False)
            newest = CheckpointDirectory(root).newest()
            assert not newest.warnings, newest.warnings
            assert newest.update in (update, update + 1), (call, number, newest.update, update)
            version = newest.json("coordinator")["version"]
            assert version == newest.update, (version, newest.update)
            if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
                killed += 1
                loaded["the newest" if newest.update == update + 1 else "the one before"] += 1
            CheckpointDirectory(root).sweep(2)
            litter = [name for name in os.listdir(root) if not name.startswith("update-")]
            assert not litter, (call, number, litter)
            update = newest.update
    assert killed > 50, f"only {killed} kills"
    return Row(
        "SIGKILL at every system call of a save", killed, "the newest or the one before is whole, the litter is swept",
        f"{loaded['the newest']} times the newest, {loaded['the one before']} the one before, 0 lost",
    )  # fmt: skip


def kill_at_random(kills: int) -> Row:
    rng, newest_taken, litter_seen = random.Random(3), 0, 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "checkpoints"
        begun = time.monotonic()
        python(SAVE, root, 1)
        span, update = time.monotonic() - begun, 1
        for _ in range(kills):
            process = start_python(SAVE, root, update + 1)
            time.sleep(span * rng.uniform(0.6, 1.1))
            process.kill()
            process.wait()
            litter_seen += any(name.startswith(".") for name in os.listdir(root))
            newest = CheckpointDirectory(root).newest()
            assert not newest.warnings
            assert newest.update in (update, update + 1)
            newest_taken += newest.update == update + 1
            update = newest.update
            CheckpointDirectory(root).sweep(2)
            assert all(name.startswith("update-") for name in os.listdir(root))
    return Row(
        "SIGKILL at a random moment of a save", kills, "the newest or the one before is whole, the litter is swept",
        f"{newest_taken} times the newest, {litter_seen} times a half-made one was left and swept, 0 lost",
    )  # fmt: skip


def python(script: str, *args: object, prefix: list[str] | None = None, check: bool = True) -> int:
    process = start_python(script, *args, prefix=prefix)
    code = process.wait(120)
    assert code == 0 or not check, code
    return code


def start_python(script: str, *args: object, prefix: list[str] | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([*(prefix or []), sys.executable, "-c", script, *map(str, args)], env=environment, stderr=subprocess.DEVNULL)


def need_strace() -> None:
    if shutil.which("strace") is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "strace"], capture_output=True, check=False)
    if shutil.which("strace") is None:
        raise Skipped("strace is not installed, and apt-get may not install it")
    if subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        raise Skipped("no process may be traced here")


# ---- damaged bytes -----------------------------------------------------------------------------------------------------
def damaged(scale: float) -> Iterator[Row]:
    """Every byte of a checkpoint that a run made flipped, every file cut to every length."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        code, _, said = command(
            "train", "CartPole-v1", *TINY, "--policy.hidden-sizes", "2", "--sampling.groups", "1", "--sampling.group-size", "1",
            "--algorithm.minibatch-size", "16", "--actors", "0", "--stop.updates", "2", "--checkpoint.every-updates", "1", "--run-dir", str(run),
            cwd=Path(place),
        )  # fmt: skip
        assert code == 0, said
        directory = CheckpointDirectory(run / "checkpoints")
        newest, before = directory.paths()[-1], directory.paths()[-2]
        flips = cuts = size = 0
        for file in sorted(path for path in newest.rglob("*") if path.is_file()):
            content = file.read_bytes()
            size += len(content)
            step = max(1, round(1 / scale))
            for at in range(0, len(content), step):
                file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
                refused(newest)
                flips += 1
            for length in range(0, len(content), step):
                file.write_bytes(content[:length])
                refused(newest)
                cuts += 1
            loaded = directory.newest()
            assert loaded.path == before
            assert len(loaded.warnings) == 1
            file.write_bytes(content)
            assert directory.newest().path == newest
    yield Row(
        "a byte of a checkpoint flipped",
        flips,
        "detected before use, the one before is taken with a warning",
        f"{flips} of {flips} detected",
    )
    yield Row(
        "a file of a checkpoint cut short",
        cuts,
        "detected before use, the one before is taken with a warning",
        f"{cuts} of {cuts}; {size:,} bytes in all",
    )


def refused(path: Path) -> None:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return
    raise AssertionError(f"{path} was taken as whole")


# ---- disks and descriptors ---------------------------------------------------------------------------------------------
def disk(scale: float) -> Iterator[Row]:
    """Full while the run goes on, again and again, in both engines."""
    with tempfile.TemporaryDirectory() as place:
        for actors, environment in (("0", "CartPole-v1"), ("1", str(ROOT / "tests" / "faults" / "chatty.py") + ":make")):
            times = max(1, round(10 * scale))
            with mounted(Path(place) / f"disk{actors}", LARGE_KIB if "chatty" in environment else SMALL_KIB) as small:
                run_directory = small.path / "run"
                with living("train", environment, *ENDLESS, "--actors", actors, "--run-dir", str(run_directory), cwd=Path(place)) as run:
                    run.until(lambda: len(saved(run_directory)) > 1, "checkpoint")  # noqa: B023
                    for _ in range(times):
                        alarms = run.said.count("no checkpoint could be saved")
                        small.fill()
                        run.until(lambda: run.said.count("no checkpoint could be saved") > alarms, "alarm")  # noqa: B023
                        CheckpointDirectory(run_directory / "checkpoints").newest()
                        before = saved(run_directory)
                        small.free()
                        run.until(lambda: saved(run_directory) and saved(run_directory)[-1] > before[-1], "checkpoint")  # noqa: B023
                        time.sleep(1.1)  # so that the next failing is said again
                    run.process.send_signal(signal.SIGINT)
                    assert run.ends() == 130, run.said[-2000:]
                yield Row(
                    f"disk full under a living run (checkpoint, run.db, TensorBoard, logs), {actors} actors", times,
                    "training goes on with an alarm, checkpoints stay whole and are made again once there is room", f"{times} of {times}",
                )  # fmt: skip


@contextlib.contextmanager
def mounted(path: Path, size_kib: int) -> Iterator[object]:
    import _pytest.outcomes

    try:
        with small_disk(path, size_kib) as small:
            yield small
    except _pytest.outcomes.Skipped as reason:
        raise Skipped(str(reason)) from None


def descriptors(scale: float) -> Iterator[Row]:
    """Too few file descriptors from the beginning: whatever the number, the run works or says so in a few lines, and nothing is left."""
    worked = refused_runs = 0
    limits = [*range(4, 64, max(4, round(4 / scale))), 96, 128]
    with tempfile.TemporaryDirectory() as place:
        for actors in ("0", "2"):
            for limit in limits:
                args = ["train", "CartPole-v1", *TINY, "--actors", actors, "--stop.updates", "3", "--run-dir", f"run-{actors}-{limit}"]
                run = Living([*args, "--view", "silent"], Path(place), f"fds{limit}", ["prlimit", f"--nofile={limit}:{limit}"])
                try:
                    code = run.ends()
                    run.gone(2.0)
                    worked += code == 0
                    refused_runs += code != 0
                    assert code == 0 or limit < 64, (limit, run.said[-2000:])
                finally:
                    run.close()
    yield Row(
        "4 to 128 file descriptors for all processes", worked + refused_runs, "the run works, or ends with an error; nothing hangs or is left",
        f"{worked} worked, {refused_runs} ended with an error",
    )  # fmt: skip


# ---- ends ----------------------------------------------------------------------------------------------------------------
def cycles(scale: float) -> Iterator[Row]:
    """Start, train, Ctrl-C; every fifth with simulators of the environment's own."""
    times, before, seconds = max(2, round(200 * scale)), in_shared_memory(), []
    semaphores = semaphore_sets()
    with tempfile.TemporaryDirectory() as place:
        for number in range(times):
            environment = SIMULATED if number % 5 == 0 else "CartPole-v1"
            run_directory = Path(place) / f"run{number}"
            with living("train", environment, *ENDLESS, "--actors", "2", "--run-dir", str(run_directory), cwd=Path(place)) as run:
                run.until(lambda: len(saved(run_directory)) > 1, "checkpoint")  # noqa: B023
                begun = time.monotonic()
                run.process.send_signal(signal.SIGINT)
                assert run.ends() == 130, run.said[-2000:]
                seconds.append(round(time.monotonic() - begun, 3))
                run.gone(GONE_SECONDS)
            assert not CheckpointDirectory(run_directory / "checkpoints").newest().warnings
            shutil.rmtree(run_directory)
    assert in_shared_memory() <= before
    assert semaphore_sets() <= semaphores
    yield cycles_row(seconds)


def cycles_row(seconds: list[float]) -> Row:
    late = sum(one > PROMISED_SECONDS for one in seconds)
    return Row(
        "start, train, Ctrl-C", len(seconds),
        f"code 130 and a checkpoint within {PROMISED_SECONDS:g} s; no process, /dev/shm entry or semaphore is left",
        f"p50 {percentile(seconds, 50):.2f} s, p99 {percentile(seconds, 99):.2f} s, {late} over {PROMISED_SECONDS:g} s",
        late <= len(seconds) // 100, seconds,
    )  # fmt: skip


def kills(scale: float) -> Iterator[Row]:
    """kill -9 of the parent at any moment, from its first line on; simulators included."""
    times, before, rng, seconds = max(2, round(50 * scale)), in_shared_memory(), random.Random(), []
    semaphores = semaphore_sets()
    with tempfile.TemporaryDirectory() as place:
        for number in range(times):
            run_directory = Path(place) / f"run{number}"
            with living("train", SIMULATED, *ENDLESS, "--actors", "2", "--run-dir", str(run_directory), cwd=Path(place)) as run:
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 4)
                else:
                    run.until(lambda: len(saved(run_directory)) > 0, "checkpoint")  # noqa: B023
                    time.sleep(rng.random())
                begun = time.monotonic()
                run.process.kill()
                run.process.wait()
                run.gone(GONE_SECONDS)
                seconds.append(round(time.monotonic() - begun, 3))
            if saved(run_directory):
                newest = CheckpointDirectory(run_directory / "checkpoints").newest()
                if number % 5 == 0:
                    code, _, said = command("resume", str(run_directory), "--stop.updates", str(newest.update + 1), cwd=Path(place))
                    assert code == 0, said
    assert in_shared_memory() <= before
    assert semaphore_sets() <= semaphores
    yield kills_row(seconds)


def kills_row(seconds: list[float]) -> Row:
    return Row(
        "kill -9 of the parent, with simulators", len(seconds), f"nothing is left after {GONE_SECONDS:g} s; `resume` works, where there is a checkpoint",
        f"gone after p50 {percentile(seconds, 50):.2f} s, at most {max(seconds):.2f} s; every fifth resumed", seconds=seconds,
    )  # fmt: skip


def together(scale: float) -> Iterator[Row]:
    """Ten runs at once, in directories that are named after the same second: each ends with the weights that it has alone."""
    args = ["train", "CartPole-v1", *TINY, "--actors", "1", "--stop.updates", "10", "--json", "--view", "silent"]
    with tempfile.TemporaryDirectory() as place:
        _, out, _ = command(*args, cwd=Path(place))
        alone = json.loads(out)["weights_sha256"]
        runs = [Living(args, Path(place), f"together{n}") for n in range(10)]
        results = []
        for run in runs:
            out, _ = run.process.communicate(timeout=600)
            results.append(json.loads(out))
            run.gone(2.0)
        assert len({result["run"] for result in results}) == 10
        same = sum(result["weights_sha256"] == alone for result in results)
    yield Row("ten runs at once", 10, "each ends with the weights that it has alone", f"{same} of 10", same == 10)


def in_shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def semaphore_sets() -> set[str]:
    """System V semaphores; named POSIX ones are files in /dev/shm."""
    path = Path("/proc/sysvipc/sem")
    return {line.split()[1] for line in path.read_text().splitlines()[1:]} if path.exists() else set()


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# ---- the table -----------------------------------------------------------------------------------------------------------
SECTIONS: dict[str, Callable[[float], Iterator[Row]]] = {
    "saves": saves, "bytes": damaged, "disk": disk, "descriptors": descriptors, "cycles": cycles, "kills": kills, "together": together,
}  # fmt: skip
ADDED: dict[str, Callable[[list[float]], Row]] = {"cycles": cycles_row, "kills": kills_row}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--add", action="store_true", help=f"count what was measured before, too ({', '.join(ADDED)})")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    failed = False
    for name in options.sections or SECTIONS:
        begun, rows = time.monotonic(), list[Row]()
        try:
            for row in SECTIONS[name](options.scale):
                if options.add and name in ADDED:
                    row = ADDED[name]([*earlier(name), *row.seconds])
                rows.append(row)
                print(f"{name}: {row.fault}: {row.figure}", flush=True)
        except Skipped as reason:
            rows.append(Row(name, 0, f"skipped: {reason}", ""))
        except (AssertionError, CheckpointError, subprocess.TimeoutExpired) as error:
            first = re.sub(r"\s+", " ", str(error))[:300]
            rows.append(Row(name, 0, f"**failed**: {first}", "", held=False))
            print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
        keep(name, rows, f"{datetime.now(UTC):%Y-%m-%d %H:%M}")
        failed |= not all(row.held for row in rows)
    write()
    return int(failed)


def kept() -> dict[str, list[dict[str, object]]]:
    """Rows of every section's last run."""
    return dict(json.loads(line) for line in ROWS.read_text().splitlines()) if ROWS.exists() else {}


def earlier(section: str) -> list[float]:
    return [float(one) for row in kept().get(section, ()) for one in row.get("seconds", ())]  # type: ignore[attr-defined]


def keep(section: str, rows: list[Row], at: str) -> None:
    found = kept() | {section: [{**asdict(row), "at": at, "machine": machine(), "load": round(os.getloadavg()[0])} for row in rows]}
    RESULT.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps([name, found[name]]) + "\n" for name in SECTIONS if name in found))


def write() -> None:
    rows = [row for section in kept().values() for row in section]
    head = [
        "# Soak: files that cannot be written, and what is left at the end",
        "",
        "`make soak` (benchmarks/soak_files.py). Machine: "
        + "; ".join(sorted({f"{row['machine']}, load {row['load']}" for row in rows})) + ".",
        "",
        "| fault | times injected | outcome wanted | figure | held | ended, UTC |",
        "| --- | ---: | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines = [
        f"| {row['fault']} | {row['times']:,} | {row['outcome']} | {row['figure']} | {'no' if not row['held'] else 'yes' if row['times'] else '-'} | {row['at']} |"
        for row in rows
    ]
    RESULT.write_text("\n".join([*head, *lines]) + "\n")
    print(f"{RESULT.relative_to(ROOT)} is written")


if __name__ == "__main__":
    sys.exit(main())
