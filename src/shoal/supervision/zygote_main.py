"""The helper process that roles are forked from, and what a forked role starts with.

It is exec'd once per run (see zygote.py), imports what all roles need (torch), and then forks: tens of milliseconds per role, not seconds.
It never imports the user's `__main__`, never unpickles, holds one thread, and outlives nobody: its children die with it
(PR_SET_PDEATHSIG), and it ends, with all of its descendants, when the supervisor's end of the control channel closes or the
supervisor's process is gone.

Whose is an orphan? Every role adopts the orphans among its own descendants (PR_SET_CHILD_SUBREAPER) for as long as it lives. What the
zygote gets as a child without having forked it therefore belonged to a role that is dead, and is killed at sight, however it called itself
(setpgid, setsid, a double fork).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from shoal.supervision.channel import Channel
from shoal.supervision.processes import (
    adopt_orphans,
    children_of_this_process,
    kill_quietly,
    name_process,
    role_name,
    signal_me_when_parent_dies,
)

SHUTDOWN_SECONDS = 5.0  # for processes that the kernel cannot end at once (uninterruptible input/output)


@dataclass(frozen=True)
class ChildContext:
    """What a forked role's target is called with.

    Attributes:
      name, index, incarnation: as the supervisor gave them.
      channel: this role's end; the supervisor holds the other.
      memory_fds: descriptors for `SharedMemory.attach`, in the order that they were passed.
      payload: what `Zygote.start` was given (JSON).
      pickled: the user's own objects (cloudpickle), or None; see `unpickle`.
    """

    name: str
    index: int
    incarnation: int
    channel: Channel
    memory_fds: tuple[int, ...]
    payload: dict[str, Any]
    pickled: bytes | None

    def unpickle(self) -> Any:
        """The user's own objects. The bytes came from the user's process through an inherited descriptor, never from a file or socket."""
        return None if self.pickled is None else pickle.loads(self.pickled)


def main(head: dict[str, Any], startup: BinaryIO, control_fd: int) -> NoReturn:
    """Import, say ready, serve, and end with nothing left.

    Args:
      head: first line of the start-up file: parent_pid, preload, pickled_bytes, log_directory.
      startup: the rest of it: one line of payload (JSON), then the pickled bytes.
      control_fd: this end of the supervisor's channel.
    """
    signal_me_when_parent_dies(signal.SIGKILL, head["parent_pid"])
    name_process("shoal:zygote")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides when to end, and its end is seen
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    control = Channel(control_fd)
    with startup:
        payload = json.loads(startup.readline())
        pickled = startup.read(head["pickled_bytes"]) if head["pickled_bytes"] is not None else None
    begun = time.monotonic()
    try:
        _preload(head["preload"])
    except BaseException:
        trace = traceback.format_exc()
        print(trace, file=sys.stderr, flush=True)
        _send(control, {"event": "failed", "error": trace[-8000:]})
        os._exit(1)
    zygote = _Zygote(head, control, payload, pickled)
    zygote.serve(import_seconds=time.monotonic() - begun)
    os._exit(0)


def _preload(modules: list[str]) -> None:
    """Without the collector, which finds nothing in what is imported and takes a tenth of the time."""
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.enable()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _num_threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def _send(control: Channel, message: dict[str, Any]) -> bool:
    return control.send(json.dumps(message).encode())


class _Zygote:
    """Serves FORK, KILL and DUMP, reaps, reports.

    Consumes requests of the control channel and SIGCHLD; waits for those two and for the end of the supervisor's process;
    unblocked by any of them. A fork that fails is told as an event; whatever else raises ends the zygote, and its roles with it.
    """

    def __init__(self, head: dict[str, Any], control: Channel, payload: dict[str, Any], pickled: bytes | None) -> None:
        self._parent_pid: int = head["parent_pid"]
        self._log_directory: str = head["log_directory"]
        self._control = control
        self._payload = payload
        self._pickled = pickled
        self._pid = os.getpid()
        self._children: set[int] = set()
        self._outbox: deque[dict[str, Any]] = deque()
        self._wake_fd, self._wake_write_fd = os.pipe()
        self._parent_fd = -1

    def serve(self, import_seconds: float) -> None:
        """Until the supervisor is gone; then kill everything and return."""
        adopt_orphans()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(self._wake_write_fd, False)
        signal.set_wakeup_fd(self._wake_write_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if hasattr(os, "pidfd_open"):
            self._parent_fd = os.pidfd_open(self._parent_pid)
        # A stopped zygote is to notice the supervisor's end too.
        signal_me_when_parent_dies(signal.SIGCONT, self._parent_pid)
        num_threads = _num_threads()
        if num_threads > 1:
            names = [thread.name for thread in threading.enumerate()]
            print(f"warning: {num_threads} threads before the first fork (Python's: {names}); their locks stay locked in children")
        gc.collect()
        gc.freeze()
        self._report({"event": "ready", "import_seconds": import_seconds, "num_threads": num_threads})
        if os.getppid() == self._parent_pid:
            while self._serve_once():
                pass
        self._kill_everything()

    def _serve_once(self) -> bool:
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN | (select.POLLOUT if self._outbox else 0))
        poll.register(self._wake_fd, select.POLLIN)
        if self._parent_fd >= 0:
            poll.register(self._parent_fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if self._wake_fd in ready:
            self._reap()
        if self._parent_fd in ready:
            return False
        try:
            self._flush()
            while (received := self._control.receive_with_fds()) is not None:
                self._obey(*received)
        except EOFError:
            return False
        return True

    def _obey(self, message: bytes, fds: list[int]) -> None:
        try:
            request = json.loads(message)
            if request["do"] == "fork":
                self._fork(request, fds)
            elif request["pid"] not in self._children:
                pass  # it is dead, and its number may be another's
            elif request["do"] == "dump":
                os.kill(request["pid"], signal.SIGUSR1)
            else:
                self._kill(request["pid"])
        finally:
            for fd in fds:
                os.close(fd)

    def _fork(self, request: dict[str, Any], fds: list[int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        begun = time.monotonic_ns()
        try:
            if len(fds) != request["num_fds"]:
                raise OSError(f"{request['num_fds']} descriptors were sent, {len(fds)} arrived: too many open files")
            pid = os.fork()
        except OSError as error:
            self._report({"event": "forked", "request": request["request"], "pid": 0, "error": str(error)})
            return
        if pid == 0:
            self._become_child(request, fds)
        self._children.add(pid)
        with contextlib.suppress(OSError):  # the child was faster, and has exec'd or died
            os.setpgid(pid, pid)
        fork_seconds = (time.monotonic_ns() - begun) / 1e9
        self._report({"event": "forked", "request": request["request"], "pid": pid, "fork_seconds": fork_seconds})

    def _become_child(self, request: dict[str, Any], fds: list[int]) -> NoReturn:
        code = 70
        try:
            os.setpgid(0, 0)
            signal_me_when_parent_dies(signal.SIGKILL, self._pid)
            adopt_orphans()
            name_process(role_name(request["name"], request["index"]))
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            self._control.close()
            for fd in (self._wake_fd, self._wake_write_fd, self._parent_fd):
                if fd >= 0:
                    os.close(fd)
            code = _run_child(request, fds, self._log_directory, self._payload, self._pickled)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _kill(self, pid: int) -> None:
        kill_quietly(os.kill, pid)
        kill_quietly(os.killpg, pid)

    def _reap(self) -> None:
        """Reap what has died, and kill what it left: its group (before its number is free for others) and its orphans."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_fd, 4096):
                pass
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            pid = dead.si_pid
            if pid in self._children:
                kill_quietly(os.killpg, pid)
            _, status = os.waitpid(pid, 0)
            self._kill_orphans()
            if pid in self._children:
                self._children.discard(pid)
                self._report({"event": "exited", "pid": pid, "status": status})

    def _kill_orphans(self) -> None:
        for pid in children_of_this_process():
            if pid not in self._children:
                kill_quietly(os.kill, pid)

    def _kill_everything(self) -> None:
        """Children, their groups, and generation after generation of orphans, until this process has no child."""
        self._outbox.clear()
        self._control.close()
        for pid in list(self._children):
            self._kill(pid)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while time.monotonic() < deadline:
            self._reap()
            children = children_of_this_process()
            if not children:
                return
            for pid in children:
                kill_quietly(os.kill, pid)
            select.select([self._wake_fd], [], [], 0.02)
        print(f"error: still there after SIGKILL: {children_of_this_process()}", flush=True)

    def _report(self, event: dict[str, Any]) -> None:
        self._outbox.append(event)
        if self._control.fileno() >= 0:
            with contextlib.suppress(EOFError):  # seen again by the loop, which ends
                self._flush()

    def _flush(self) -> None:
        while self._outbox and _send(self._control, self._outbox[0]):
            self._outbox.popleft()


class _Log(io.FileIO):
    """Standard output and error of a role. A disk that takes nothing more must not make `print` in an environment fail."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text) or 0
        except OSError:
            return len(text)


def _log_to(path: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        log_fd = os.open(path, flags, 0o644)
    except OSError:  # the role can do its work without
        log_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for fd in (1, 2):
        os.dup2(log_fd, fd)
    os.close(log_fd)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(_Log(fd, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True) for fd in (1, 2)
    )


def _run_child(request: dict[str, Any], fds: list[int], log_directory: str, payload: dict[str, Any], pickled: bytes | None) -> int:
    """The rest of a role's life; returns its exit code. Errors are in its log, with traceback."""
    log_path = request["log_path"] or os.path.join(log_directory, f"{request['name']}-{request['index']}.log")
    _log_to(log_path)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # else all roles would go on with the zygote's global stream
    try:
        channel = Channel(fds[0])
        os.register_at_fork(after_in_child=channel.close)  # what an environment forks is not this role, and cannot speak for it
        context = ChildContext(
            name=request["name"],
            index=request["index"],
            incarnation=request["incarnation"],
            channel=channel,
            memory_fds=tuple(fds[1:]),
            payload=payload,
            pickled=pickled,
        )
        module, _, function = request["target"].partition(":")
        result = getattr(importlib.import_module(module), function)(context)
        return result if isinstance(result, int) else 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
