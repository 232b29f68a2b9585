"""What the kernel says of processes (Linux: /proc and prctl; elsewhere these functions know nothing and do nothing)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
NAME_BYTES = 15  # of a process's name, as far as the kernel keeps it
ROLES = ("actor", "learner", "inference")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform != "linux":
        return
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if _libc().prctl(option, argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def signal_me_when_parent_dies(number: int, parent_pid: int) -> None:
    """Have the kernel send `number` (0: nothing) when the thread that made this process ends.

    The parent may have died before the call took effect: where it is no longer `parent_pid`, the signal is sent now.
    """
    _prctl(PR_SET_PDEATHSIG, number)
    if number and os.getppid() != parent_pid:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Descendants whose own parent dies become children of this process, not of init (not inherited by children)."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def name_process(name: str) -> None:
    """Show `name` (cut to NAME_BYTES) in ps and top."""
    _prctl(PR_SET_NAME, name.encode()[:NAME_BYTES])


def role_name(role: str, index: int) -> str:
    """What the process of a role is shown as: `shoal:actor-0`. Where that is too long for the kernel, the role is cut and the index stays whole
    (`shoal:learne-10`), but for the first of a role (`shoal:inference`)."""
    number = f"-{index}"
    return f"shoal:{role}-0"[:NAME_BYTES] if not index else f"shoal:{role}"[: NAME_BYTES - len(number)] + number


def role_of(name: str) -> tuple[str, int] | None:
    """The inverse of `role_name`: role and index, None for what is no role of ROLES."""
    number = name.rpartition("-")[2]
    index = int(number) if number.isdecimal() else 0
    return next(((role, index) for role in ROLES if role_name(role, index) == name), None)


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on (state, ppid, pgrp, session ...); None where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def process_state(pid: int) -> str | None:
    """One letter: R running, S sleeping, D in the kernel, T stopped, Z dead but not reaped; None: no such process."""
    fields = _stat_fields(pid)
    return fields[0] if fields else None


# Numbers of kill, tkill and tgkill, and which of their arguments is the signal.
_KILLS = {"x86_64": {62: 2, 200: 2, 234: 3}, "aarch64": {129: 2, 130: 2, 131: 3}}


def stopped_itself(pid: int) -> bool:
    """Whether a process that is stopped sent the SIGSTOP itself: one of its threads stands in that call. False where the kernel does not say."""
    signal_at = _KILLS.get(os.uname().machine, {})
    with contextlib.suppress(OSError, ValueError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            call, *arguments = Path(f"/proc/{pid}/task/{thread}/syscall").read_text(encoding="ascii").split()
            place = signal_at.get(int(call)) if arguments else None  # `running` has none
            if place is not None and int(arguments[place - 1], 16) == signal.SIGSTOP:
                return True
    return False


def all_pids() -> list[int]:
    try:
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return []


def children_of_this_process() -> list[int]:
    """Pids of the direct children, adopted orphans and zombies included (a single-threaded process)."""
    pid = os.getpid()
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return [child for child in all_pids() if (fields := _stat_fields(child)) and int(fields[1]) == pid]


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes together, shared pages counted once in all (proportional set size); the dead count as 0.

    Costs about 8 ms per process with torch: for a figure every few seconds, not for a loop.
    """
    total_kib = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        total_kib += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total_kib * 1024


def kill_quietly(kill: Callable[[int, int], None], pid: int) -> None:
    """`os.kill` or `os.killpg` with SIGKILL; a process that is gone, or is another user's, is none of ours."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        kill(pid, signal.SIGKILL)


def marked_processes(mark: str, session: int) -> list[int]:
    """Living processes that carry `mark` (NAME=value) in the environment they were exec'd with, or belong to the session.

    Forked processes show the environment of the exec before them, so that every descendant of a marked process is found, also one that
    called setsid; what escapes is one that did so and was exec'd with an environment made anew.
    """
    needle = mark.encode()
    found = []
    for pid in all_pids():
        fields = _stat_fields(pid)
        if fields is None or fields[0] in "ZX" or pid == os.getpid():
            continue
        try:
            marked = needle in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            marked = False
        if marked or int(fields[3]) == session:
            found.append(pid)
    return found


def kill_marked_processes(mark: str, session: int, timeout_seconds: float) -> list[int]:
    """Kill until `marked_processes` finds none, or the time is over; returns those that are left then."""
    deadline = time.monotonic() + timeout_seconds
    while left := marked_processes(mark, session):
        for pid in left:
            kill_quietly(os.kill, pid)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left
