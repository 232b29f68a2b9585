"""The supervisor's side of the zygote: start it, fork roles from it, kill them, and hear what became of them. No torch here.

Everything is asynchronous: `start` and `fork` return at once, and `receive` tells what happened, in order:
`Ready` (imports done) · `Forked` (one per `fork`) · `Exited` (dead, reaped, and what it left behind killed) · `Lost` (the zygote itself
is gone, and with it all roles, for each of which an `Exited` comes before; start another one).

A role's number (pid) is the zygote's child until its `Exited` was sent, so that `kill` cannot hit a stranger.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import ProcessError
from shoal.supervision.channel import Channel, wait
from shoal.supervision.memory import anonymous_file
from shoal.supervision.processes import kill_marked_processes, process_state

MARK = "SHOAL_ZYGOTE"
SWEEP_SECONDS = 2.0  # for what a zygote that was killed left, until all of it is dead: longer than that takes
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
PASSIVE_THREADS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_SECRETS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_BOOTSTRAP = """
import json, os, sys
startup = os.fdopen(int(sys.argv[1]), "rb")
head = json.loads(startup.readline())
sys.path[:] = head["sys_path"]
from shoal.supervision.zygote_main import main
main(head, startup, int(sys.argv[2]))
"""


@dataclass(frozen=True)
class Ready:
    """The zygote's imports are done. More than one thread means that forks are not safe (its log names them)."""

    import_seconds: float
    num_threads: int


@dataclass(frozen=True)
class Role:
    """Who a process is: name and index, and the incarnation that counts its restarts."""

    name: str
    index: int
    incarnation: int


@dataclass(frozen=True)
class Forked:
    """A role's process exists. `request` is what `fork` returned."""

    request: int
    pid: int
    role: Role
    fork_seconds: float


@dataclass(frozen=True)
class Exited:
    """A role is dead, and nothing of its process group is left. `pid` 0: it could never be forked.

    status: as os.waitpid gives it; None where nobody could reap it, and `error` says why.
    """

    pid: int
    role: Role
    status: int | None
    error: str = ""

    @property
    def exit_code(self) -> int | None:
        """What it returned; None where a signal killed it."""
        return os.WEXITSTATUS(self.status) if self.status is not None and os.WIFEXITED(self.status) else None

    @property
    def crashed(self) -> bool:
        """It ended by its own doing: an exit, or a signal that a fault of its code brings, and nobody sends."""
        return self.status is not None and (os.WIFEXITED(self.status) or os.WTERMSIG(self.status) in _CRASHES)

    def describe(self) -> str:
        """`exit code 3`, `killed by SIGKILL`, or the error."""
        return describe_status(self.status) if self.status is not None else self.error


@dataclass(frozen=True)
class Lost:
    """The zygote is gone, and all that descended from it is killed. `reason` holds the traceback where an import failed."""

    reason: str


Event = Ready | Forked | Exited | Lost


class Logs(Protocol):
    """Who writes the logs, where roles do not write into them themselves."""

    def open(self, path: Path) -> Path:
        """What whoever is to write into the log at `path` opens instead."""

    def ended(self, path: Path) -> None:
        """Whoever wrote there is dead: the log is whole when this returns."""


def describe_status(status: int) -> str:
    """Words for a status of os.waitpid."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"killed by {signal.Signals(number).name}"
        except ValueError:
            return f"killed by signal {number}"
    return f"exit code {os.WEXITSTATUS(status)}"


class _Watch:
    """One descriptor that is ready when the zygote says something or is dead.

    Its channel alone does not tell: a role that was stopped in the moment of its fork still holds the zygote's end.
    """

    def __init__(self, control_fd: int, pid: int) -> None:
        self._fds: list[int] = []
        self._fd = control_fd
        if sys.platform == "linux":
            self._poll = select.epoll()
            self._fd, pid_fd = self._poll.fileno(), os.pidfd_open(pid)
            self._fds = [pid_fd]
            self._poll.register(control_fd, select.EPOLLIN)
            self._poll.register(pid_fd, select.EPOLLIN)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fds:
            self._poll.close()
            os.close(self._fds.pop())
        self._fd = -1


def _without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in _SECRETS}


class Zygote:
    """See the module. For one thread, which outlives the start: until `Ready`, the zygote dies with the thread that started it."""

    def __init__(self, process: subprocess.Popen[bytes], control: Channel, mark: str, log_directory: Path, logs: Logs | None) -> None:
        self.pid = process.pid
        self._process = process
        self._control = control
        self._watch = _Watch(control.fileno(), process.pid)
        self._mark = mark
        self._log_directory, self._logs = log_directory, logs
        self._log_paths: dict[Role, Path] = {}  # of living roles, where `logs` writes them
        self._num_requests = 0
        self._pending: dict[int, Role] = {}
        self._living: dict[int, Role] = {}
        self._failure = ""
        self._swept = False
        self._ready = False

    @classmethod
    def start(
        cls,
        payload: Mapping[str, Any],
        pickled: bytes | None = None,
        preload: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        log_path: str | os.PathLike[str] = os.devnull,
        logs: Logs | None = None,
    ) -> Zygote:
        """Exec the helper and return at once.

        Args:
          payload: JSON-able; every role gets it.
          pickled: the user's own objects by cloudpickle; every role gets the bytes, the zygote does not open them.
          preload: modules to import before the first fork.
          environ: of the zygote and so of every role (default: this process's own); thread counts are set to 1 and passive in any case, and
            token, key and certificates of a cluster are left out, since roles run the user's code and ask no cluster.
          log_path: appended to; the roles' logs lie beside it unless `fork` says otherwise. Its directory must exist.
          logs: writes the logs, that of the zygote too (default: each process its own).
        Raises:
          ProcessError: the helper could not be executed.
        """
        mark = secrets.token_hex(8)
        with ExitStack() as mine:
            try:
                parent_end, child_end = Channel.pair()
                mine.callback(child_end.close)
                unless_started = mine.enter_context(ExitStack())
                unless_started.callback(parent_end.close)
                startup_fd = anonymous_file("shoal-start")
                mine.callback(os.close, startup_fd)
                _write_startup(startup_fd, payload, pickled, preload, Path(log_path))
                with open(log_path if logs is None else logs.open(Path(log_path)), "ab") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-c", _BOOTSTRAP, str(startup_fd), str(child_end.fileno())],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env={**_without_secrets(os.environ if environ is None else environ), **PASSIVE_THREADS, MARK: mark},
                        pass_fds=(startup_fd, child_end.fileno()),
                        start_new_session=True,
                    )
                unless_started.callback(process.wait)
                unless_started.callback(process.kill)
                started = cls(process, parent_end, f"{MARK}={mark}", Path(log_path).absolute().parent, logs)
                unless_started.pop_all()
                return started
            except OSError as error:
                raise ProcessError(f"cannot start the helper process {sys.executable}: {error}") from error

    def fileno(self) -> int:
        """For `wait`: ready when `receive` has something to tell; -1 once lost or closed."""
        return self._watch.fileno()

    def fork(
        self,
        target: str,
        name: str,
        index: int,
        incarnation: int,
        channel_end: Channel,
        memory_fds: Sequence[int] = (),
        log_path: str | os.PathLike[str] | None = None,
    ) -> int:
        """Ask for a new process that calls `target` ("module:function") with a ChildContext. May be called before `Ready`.

        Takes `channel_end` over (it is closed here: the child's is then the only copy, so that its death is seen on the other end); memory
        descriptors stay the caller's. Standard output and error go to `log_path`, by default NAME-INDEX.log beside the zygote's log.

        Returns:
          The number that the `Forked` for it (or an `Exited` with pid 0) carries as `request`.
        Raises:
          ProcessError: the loss of the zygote was told already, or it has not read for thousands of requests. One that is dead and was not
            told yet takes the request: `receive` tells `Exited` and `Lost`.
        """
        self._num_requests += 1
        role = Role(name, index, incarnation)
        if self._logs is not None:
            self._log_paths[role] = Path(log_path or self._log_directory / f"{name}-{index}.log")
            log_path = self._logs.open(self._log_paths[role])
        fds = (channel_end.fileno(), *memory_fds)
        request = {
            "do": "fork",
            "request": self._num_requests,
            "num_fds": len(fds),
            "target": target,
            "name": name,
            "index": index,
            "incarnation": incarnation,
            "log_path": None if log_path is None else os.fspath(log_path),
        }
        self._request(request, fds)
        channel_end.close()
        self._pending[self._num_requests] = role
        return self._num_requests

    def kill(self, pid: int) -> None:
        """SIGKILL a role and its process group, stopped or not; its `Exited` follows. One that is dead already is left alone.

        Raises:
          ProcessError: as `fork`.
        """
        self._request({"do": "kill", "pid": pid}, ())

    def dump(self, pid: int) -> None:
        """Have a role write its stacks into its log, whatever it does, but for one that is stopped (faulthandler, SIGUSR1).

        Raises:
          ProcessError: as `fork`.
        """
        self._request({"do": "dump", "pid": pid}, ())

    def dump_own(self) -> None:
        """The same of the zygote itself, once it is ready."""
        self._process.send_signal(signal.SIGUSR1)

    def wake(self) -> bool:
        """Continue the zygote if somebody stopped it; says whether it was."""
        stopped = process_state(self.pid) == "T"
        if stopped:
            self._process.send_signal(signal.SIGCONT)
        return stopped

    def give_up(self) -> None:
        """SIGKILL it, since it does not do its work; all roles die with it, and `receive` tells."""
        self._process.kill()

    def receive(self) -> list[Event]:
        """What happened since the last call; never blocks (but for a moment when the zygote is lost, to kill what it left)."""
        if self._control.fileno() < 0:
            return []
        events: list[Event] = []
        try:
            ended = self._process.poll() is not None  # asked first, so that its last words are read
            while (message := self._control.receive()) is not None:
                events += self._decode(message)
            if ended:
                raise EOFError("a role that was stopped as it was forked holds the other end")
        except EOFError:
            events += self._lose()
        for event in events:
            if isinstance(event, Exited) and self._logs is not None and (path := self._log_paths.pop(event.role, None)) is not None:
                self._logs.ended(path)
        return events

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Kill all roles and all they started, and the zygote. Returns when nothing is left; may be called twice."""
        self._control.close()
        self._watch.close()
        self._finish(timeout_seconds if self._ready else 0.0)  # while it imports it hears nothing

    def _request(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        if self._control.fileno() < 0:
            raise ProcessError("the helper process is gone: start another one")
        try:
            if self._control.send_with_fds(json.dumps(request).encode(), fds):
                return
        except EOFError:
            return  # it is dead, and all roles with it; `receive` tells
        raise ProcessError(f"the helper process {self.pid} does not read its requests; is it stopped?")

    def _decode(self, message: bytes) -> list[Event]:
        try:
            return self._event(json.loads(message))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProcessError(f"the helper process {self.pid} sent what is no event: {message[:200]!r}") from error

    def _event(self, event: dict[str, Any]) -> list[Event]:
        kind = event["event"]
        if kind == "ready":
            self._ready = True
            return [Ready(event["import_seconds"], event["num_threads"])]
        if kind == "failed":
            self._failure = event["error"]
            return []
        if kind == "forked":
            role = self._pending.pop(event["request"])
            if event["pid"] == 0:
                return [Exited(0, role, None, f"could not be forked: {event['error']}")]
            self._living[event["pid"]] = role
            return [Forked(event["request"], event["pid"], role, event["fork_seconds"])]
        return [Exited(event["pid"], self._living.pop(event["pid"]), event["status"])]

    def _lose(self) -> list[Event]:
        self._control.close()
        self._watch.close()
        status = self._finish(timeout_seconds=1.0)
        error = "died with the helper process"
        exited = [Exited(pid, role, None, error) for pid, role in self._living.items()]
        exited += [Exited(0, role, None, error) for role in self._pending.values()]
        self._living.clear()
        self._pending.clear()
        ending = f"was {status}" if status.startswith("killed") else f"ended with {status}"
        return [*exited, Lost(f"the helper process {self.pid} {ending}" + (f":\n{self._failure}" if self._failure else ""))]

    def _finish(self, timeout_seconds: float) -> str:
        """Wait for the zygote's own end, force it, and kill what is left of its descendants; says how it ended."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        code = self._process.returncode
        if code != 0 and not self._swept:
            self._swept = True
            kill_marked_processes(self._mark, self.pid, SWEEP_SECONDS)
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _write_startup(fd: int, payload: Mapping[str, Any], pickled: bytes | None, preload: Sequence[str], log_path: Path) -> None:
    head = {
        "sys_path": [os.path.abspath(entry) if entry == "" else entry for entry in sys.path],
        "parent_pid": os.getpid(),
        "preload": list(preload),
        "pickled_bytes": None if pickled is None else len(pickled),
        "log_directory": os.fspath(log_path.absolute().parent),
    }
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + json.dumps(payload).encode() + b"\n" + (pickled or b""))
    os.lseek(fd, 0, os.SEEK_SET)


def wait_until_ready(zygote: Zygote, timeout_seconds: float) -> list[Event]:
    """Wait for `Ready`; returns it and whatever else was told meanwhile.

    Raises:
      ProcessError: the zygote was lost (with the failing import's traceback), or the time ran out.
    """
    deadline = time.monotonic() + timeout_seconds
    events: list[Event] = []
    while (left := deadline - time.monotonic()) > 0:
        wait([zygote], left)
        events += zygote.receive()
        for event in events:
            if isinstance(event, Lost):
                raise ProcessError(event.reason)
            if isinstance(event, Ready):
                return events
    raise ProcessError(f"the helper process {zygote.pid} was not ready within {timeout_seconds} s; see its log")
