"""Whoever kills the processes of a run with SIGKILL, at random moments.

A moment is an update, and a random time after it that ends within a few updates. Since a run with killers waits after every update (tests/held.py) until they have looked at it,
every kill hits, on a fast machine as on a slow one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from held import Line

POLL_SECONDS = 0.02  # a look at all processes of a machine takes some milliseconds itself
TIMEOUT_SECONDS = 1800.0  # of one part of a run: generous, it only ends what hangs
ROLES = ("shoal:actor", "shoal:learner", "shoal:inference")
UPDATES_OF_PATIENCE = 2


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


def wait_a_moment(line: Line, rng: random.Random, at_most_seconds: float) -> None:
    """As long as a part of an update, or longer: into the restart of what was killed before, or until the run waits again."""
    time.sleep(rng.random() * rng.choice((line.seconds, at_most_seconds)))


@dataclass
class Killer:
    """Kills one living role whose name begins with `prefix`, once the next of `moments` (updates) was reached, and a bit later.

    It lets every role live until progress was made after its `patience` latest kills, since a role that dies again and again without any
    progress is rightly given up.
    """

    prefix: str
    moments: list[int]
    rng: random.Random
    patience: int = 3
    together: bool = False  # all of them at once
    sent: list[tuple[int, str]] = field(default_factory=list)  # (newest update then, role)
    seen: set[int] = field(default_factory=set)
    learners: set[str] = field(default_factory=set)  # names of all that were ever there

    @classmethod
    def of(cls, prefix: str, kills: int, updates: int, seed: int) -> Killer:
        rng = random.Random(f"{prefix} {kills} {updates} {seed}")
        last = int(updates * 0.6)  # the end of the run is whole: what was lost last is made again
        return cls(prefix, sorted(rng.randint(0, last) for _ in range(kills)), rng, patience=3 if "actor" in prefix else 2)

    def tick(self, root: int, line: Line) -> None:
        """Kill, if it is time and somebody is there. The run has been let go on, and comes to its next update at most."""
        if not self.moments or line.update < self.moments[0]:
            return
        if len(self.sent) >= self.patience and line.update < self.sent[-self.patience][0] + UPDATES_OF_PATIENCE:
            return
        if not self._victims(root):
            return
        wait_a_moment(line, self.rng, 0.15)
        victims = self._victims(root)
        if not victims:
            return
        victim = self.rng.choice(victims)
        killed = [p.pid for p in victims] if self.together else [victim.pid]
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.seen.add(pid)
        while any(map(alive, killed)):
            time.sleep(0.001)
        self.sent.append((line.update, victim.name))
        self.moments.pop(0)

    def _victims(self, root: int) -> list[Proc]:
        """Roles that were not killed yet; of `together`, only where there are several. None while a learner is dead: the run itself ends the others
        then, and would not notice."""
        roles = [p for p in descendants(root) if p.name.startswith(ROLES)]
        learners = {p.name for p in roles if p.name.startswith("shoal:learn")}
        self.learners |= learners
        if not learners or learners < self.learners:
            return []
        found = [p for p in roles if p.name.startswith(self.prefix) and p.pid not in self.seen]
        return found if not self.together or len({p.name for p in found}) > 1 else []

    def assert_all_hit(self, deaths: list[str]) -> None:
        """deaths: roles that the run saw killed."""
        assert not self.moments, f"kills of {self.prefix} at {self.moments} were not sent"
        assert any(role.startswith(self.prefix.partition(":")[2]) for role in deaths), f"no kill of {self.prefix} hit the run"


def attend(process: subprocess.Popen[str], line: Line | None, killers: tuple[Killer, ...]) -> None:
    """Until the run ends, or has taken far too long. Without a line it is only waited for."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    if line is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TIMEOUT_SECONDS)
        return
    while process.poll() is None and time.monotonic() < deadline:
        if line.hear(POLL_SECONDS):
            line.go_on(for_good=not any(killer.moments for killer in killers))
        for killer in killers:
            killer.tick(process.pid, line)


def kill_whole(process: subprocess.Popen[str], line: Line, moment: int, rng: random.Random, log: Path, *, all_of_it: bool) -> list[int]:
    """Wait until the run has made `moment` updates and has a learner, and a bit longer, then kill its supervisor alone, or (`all_of_it`) every process of
    it in random order. Returns the pids of all its processes."""
    line.reach(moment, process, log)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(p.name.startswith("shoal:learner") for p in descendants(process.pid)):
        assert process.poll() is None, f"ended before it was killed, with {process.returncode}: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, "no learner"
        time.sleep(POLL_SECONDS)
    if line.waits:
        line.go_on()  # it comes to its next update at most
    wait_a_moment(line, rng, 0.4)
    below = descendants(process.pid)
    victims = [process.pid]
    if all_of_it:
        victims += [p.pid for p in below]
        rng.shuffle(victims)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return [p.pid for p in below]
