"""Sections of soak_files.py: kills while a checkpoint is saved, and checkpoints whose bytes are damaged."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from endured import ROOT, Row, Skipped  # first: it finds the tests' helpers

from faults.living import TINY, command
from shoal.errors import CheckpointError
from shoal.files import CheckpointDirectory, load_checkpoint

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
