"""What the rows of speed.py are read from: a run's own record, the clock on the wall, and the kernel's account of memory."""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median

from rows import ROOT, SHOAL, CommandError

from shoal.monitoring.store import MetricPoint, RunReader

WARM_UP_SECONDS = 5.0
ENDS_SECONDS = 25.0


# ---- speed -----------------------------------------------------------------------------------------------------------
def steady_rate(run: Path) -> float:
    """Env steps per second between two updates: the first after the warm-up, and the last."""
    with RunReader(run / "run.db") as reader:
        return rate(reader.series("time/total_timesteps"))


def rate(points: Sequence[MetricPoint]) -> float:
    """Env steps per second of a series that was recorded at updates, the last point apart, which is of the run's end."""
    steady = [point for point in points[:-1] if point.seconds >= WARM_UP_SECONDS]
    if len(steady) < 2:
        raise CommandError(f"the run was too short: {len(steady)} points after {WARM_UP_SECONDS:g} s; raise --seconds")
    return (steady[-1].env_steps - steady[0].env_steps) / (steady[-1].seconds - steady[0].seconds)


# ---- starting --------------------------------------------------------------------------------------------------------
def wall_seconds(command: Sequence[str]) -> float:
    """From the prompt to the end of a command. Raises CommandError."""
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return time.monotonic() - begun


def first_update_seconds(arguments: Sequence[str], run: Path) -> float:
    """From the prompt to the first update of a training that makes one."""
    begun = time.time()
    wall_seconds([SHOAL, *arguments, "--run-dir", str(run), "--json"])
    return first_scalars_time(run / "tensorboard") - begun


def first_scalars_time(directory: Path) -> float:
    """Seconds since the epoch at which a run wrote its first numbers, which is at its first update: the wall time of the second event."""
    content = next(directory.glob("events.out.tfevents.*")).read_bytes()
    second = 16 + struct.unpack_from("<Q", content)[0]  # length, its checksum, the event (here the file's version), its checksum
    field, seconds = struct.unpack_from("<Bd", content, second + 12)
    if field != 0x09:  # field 1, a double
        raise CommandError(f"{directory}: the second event does not begin with its wall time")
    return float(seconds)


# ---- memory ----------------------------------------------------------------------------------------------------------
def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, ())
    return found


def memory_mb(pids: Iterable[int]) -> tuple[float, float]:
    """Of these processes together: PSS, and what of it is their own (anonymous, shared without a file, or swapped out), in MB. The rest are mapped
    files, whose part in it falls when another program maps them too, and rises when that one ends. The dead count as 0."""
    pss = own = 0
    for pid in pids:
        try:
            words = [text.split() for text in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]]
        except OSError:
            continue
        kib = {name: int(number) for name, number, _ in words}
        pss += kib.get("Pss:", 0)
        own += sum(kib.get(name, 0) for name in ("Pss_Anon:", "Pss_Shmem:", "SwapPss:"))
    return pss * 1024 / 1e6, own * 1024 / 1e6


def memory_of(arguments: Sequence[str], run: Path, seconds: float, every_seconds: float) -> list[tuple[float, float, float]]:
    """(seconds since the prompt, `memory_mb` of the whole tree of processes) of a training while it lives, which is then ended."""
    with training(arguments, run) as process:
        samples = []
        for elapsed in _ticks(seconds, every_seconds):
            if process.poll() is not None:
                raise CommandError(f"the training ended after {elapsed:.0f} s by itself: {(run.parent / 'log').read_text()[-2000:]}")
            samples.append((elapsed, *memory_mb(tree(process.pid))))
        return samples


@contextlib.contextmanager
def training(arguments: Sequence[str], run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`shoal train` while it goes on; ended by Ctrl-C, and by force after a while."""
    with (run.parent / "log").open("wb") as log:
        process = subprocess.Popen([SHOAL, *arguments, "--run-dir", str(run), "--json"], cwd=ROOT, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ticks(seconds: float, every_seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[float]:
    begun = clock()
    for k in range(1, int(seconds / every_seconds) + 1):
        time.sleep(max(0.0, begun + k * every_seconds - clock()))
        yield clock() - begun


def growth_mb(samples: Sequence[tuple[float, float]], begin_seconds: float) -> tuple[float, float, float]:
    """Memory from `begin_seconds` on and at the end (medians over ENDS_SECONDS of samples there), and their difference, in MB. Raises CommandError:
    it was shorter."""
    last = samples[-1][0]
    if last < begin_seconds + ENDS_SECONDS:
        raise CommandError(f"{last:.0f} s of memory are too few for its growth; raise --memory-seconds")
    begin = median(mb for at, mb in samples if begin_seconds - 0.5 <= at < begin_seconds + ENDS_SECONDS)
    end = median(mb for at, mb in samples if at > last - ENDS_SECONDS)
    return begin, end, end - begin


def mb_per_hour(samples: Sequence[tuple[float, float]]) -> float:
    """How memory grows over the second half of the samples, in MB an hour: the median of the slopes between any two of them (Sen 1968,
    doi:10.1080/01621459.1968.10480934), which neither a peak while a checkpoint is written nor one allocation tilts. Raises CommandError: too few."""
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        raise CommandError(f"{len(samples)} samples of memory are too few for a slope; raise --memory-seconds")
    return 3600.0 * median((b_mb - a_mb) / (b - a) for (a, a_mb), (b, b_mb) in combinations(late, 2))
