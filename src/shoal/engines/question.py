"""A question about an environment, answered by a process of its own: whatever the environment does there, the asker goes on.

The process tells each call of the environment before it makes it (`Answerer`), and ends with an answer of any length.

    consumes    what the process tells, and its exit
    waits for   its next word: at most `limit_seconds` while it is in a call of the environment, else OTHER_SECONDS
    unblocked   by a word, by its death, or by the time
    on failure  a process that hangs, is stopped or dies is killed, and is an EnvironmentFault with the call, the episode and the stack
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.engines.watch import STOPPED_SECONDS
from shoal.errors import EnvironmentFault, ProcessError
from shoal.supervision.channel import MAX_MESSAGE_BYTES, Channel, HasFileno, wait
from shoal.supervision.memory import anonymous_file
from shoal.supervision.processes import process_state
from shoal.supervision.zygote import Exited, Forked, Lost, Zygote

if TYPE_CHECKING:
    from shoal.environments.faults import FaultKind

POLL_SECONDS = 0.25
TELL_SECONDS = 0.02  # between two words about calls of the same name
OTHER_SECONDS = 120.0  # for what is no call of the environment: imports on a slow disk, building a policy
_STACK_SECONDS = 1.0  # for a process to write down where it is
_LOG_CHARACTERS = 6_000

Episode = tuple[int | None, list[Any]]  # seed, and the actions since


class Answerer:
    """The answering process's end of the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._told, self._told_at = "", 0.0

    def tell(self, call: str, /, **facts: Any) -> None:
        """The environment is asked for `call` now ("": for nothing). See environments.probe.Tell."""
        message = json.dumps({"call": call, **facts}).encode()
        self._send(message if len(message) <= MAX_MESSAGE_BYTES else json.dumps({"call": call}).encode())

    def tell_now_and_then(self, call: str, /, **facts: Any) -> None:
        """`tell`, for calls that come by the thousand: one after another of the same name is passed over for TELL_SECONDS."""
        if call != self._told or time.monotonic() - self._told_at > TELL_SECONDS:
            self._told, self._told_at = call, time.monotonic()
            self.tell(call, **facts)

    def answer(self, facts: dict[str, Any], last: bool = True) -> None:
        """An answer; those before the last say what would be lost if the environment took this process along."""
        with os.fdopen(anonymous_file("shoal-answer"), "wb") as file:
            file.write(json.dumps(facts, default=str).encode())
            file.flush()
            self._send(json.dumps({"answer": last}).encode(), file.fileno())

    def _send(self, message: bytes, *fds: int) -> None:
        while not self._channel.send_with_fds(message, fds):
            wait([], 0.1, writable=[self._channel])


class Played:
    """Listens to what an environment is asked for (environments.probe.Tell): the call that it is in with its facts, and the last two episodes."""

    def __init__(self) -> None:
        self.call = ""
        self.facts: dict[str, Any] = {}
        self.episodes: list[Episode] = []

    def __call__(self, call: str, /, **facts: Any) -> None:
        self.call, self.facts = call, facts
        if call == "reset()":
            self.episodes = [*self.episodes[-1:], (facts.get("seed"), [])]
        elif call == "step()" and self.episodes:
            self.episodes[-1][1].append(facts.get("action"))


class Question:
    """One question. After `ask`, `played` knows the last episodes, `partial` the last answer that was not the last."""

    def __init__(self, zygote: Zygote, environment: str, limit_seconds: float, log_directory: Path) -> None:
        self._zygote, self._environment, self._limit = zygote, environment, limit_seconds
        self._log_directory = log_directory
        self.played = Played()
        self.partial: dict[str, Any] | None = None
        self._since = 0.0
        self._stopped_since: float | None = None
        self._pid = 0

    def ask(self, target: str, name: str, order: dict[str, Any] | None = None) -> dict[str, Any]:
        """Fork a process that calls `target` ("module:function") and return its answer. `order`: sent to it first.

        Raises:
          EnvironmentFault: the environment hung, stopped or ended that process. ProcessError: the zygote is gone.
        """
        self._log = self._log_directory / f"{name}-0.log"
        self._log_begin = self._log.stat().st_size if self._log.exists() else 0
        ours, theirs = Channel.pair()
        self._zygote.fork(target, name, 0, 0, theirs, log_path=self._log)
        self._since = time.monotonic()
        sources: list[HasFileno] = [ours, self._zygote]
        try:
            if order is not None:
                with suppress(EOFError):  # it is dead already, which is told below
                    ours.send(json.dumps(order).encode())
            while True:
                wait(sources, POLL_SECONDS)
                events = self._zygote.receive()
                answer = self._listen(ours)
                if answer is not None:
                    return answer
                for event in events:
                    if isinstance(event, Lost):
                        raise ProcessError(event.reason)
                    if not isinstance(event, (Forked, Exited)) or event.role.name != name:
                        continue
                    if isinstance(event, Forked):
                        self._pid, self._since = event.pid, time.monotonic()
                    if isinstance(event, Exited):
                        raise self._fault(
                            "died", f"its process ended in {self.played.call or 'no call of it'}: {event.describe()}", "", self._written()
                        )
                self._check_time()
        finally:
            ours.close()

    def _listen(self, channel: Channel) -> dict[str, Any] | None:
        with suppress(EOFError):
            while (received := channel.receive_with_fds()) is not None:
                self._since, self._stopped_since = time.monotonic(), None
                word = json.loads(received[0])
                if "call" in word:
                    self.played(word.pop("call"), **word)
                    continue
                with os.fdopen(received[1][0], "rb") as file:
                    file.seek(0)
                    facts: dict[str, Any] = json.loads(file.read())
                if word["answer"]:
                    return facts
                self.partial = facts
        return None

    def _check_time(self) -> None:
        now = time.monotonic()
        seconds = now - self._since
        if not self._pid or process_state(self._pid) != "T":
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since >= STOPPED_SECONDS:
            self._zygote.kill(self._pid)
            raise self._fault("hang", f"its process was stopped (SIGSTOP) in {self.played.call or 'no call of it'}", "", "")
        if self.played.call and seconds > self._limit:
            stack = stack_of(self._pid, self._log)
            self._zygote.kill(self._pid)
            raise self._fault("hang", f"{self.played.call} has not returned for {seconds:.1f} s", f"at most {self._limit:g} s", stack)
        if not self.played.call and seconds > OTHER_SECONDS:
            raise ProcessError(f"the process that looks at {self._environment} did not answer within {OTHER_SECONDS:g} s; see {self._log}")

    def _written(self) -> str:
        """What the process left in its log: a crash's stack, and what it printed last."""
        time.sleep(0.05)
        return read_log(self._log, self._log_begin)

    def _fault(self, kind: FaultKind, what: str, expected: str, stack: str) -> EnvironmentFault:
        from shoal.environments.faults import environment_fault  # brings gymnasium, which nobody else here needs

        seed, actions = self.played.episodes[-1] if self.played.episodes else (None, [])
        where = {"env": 0, "step": len(actions), "seed": seed or 0} | {
            name: self.played.facts[name] for name in ("env", "step", "seed") if name in self.played.facts
        }
        return environment_fault(
            kind, what, environment=self._environment, group=0, **where,
            last_action=actions[-1] if actions else None, expected=expected, actual=what if expected else "", stack=stack,
        )  # fmt: skip


def read_log(path: Path, begin: int) -> str:
    """The end of what was written into a log after `begin`."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - _LOG_CHARACTERS))
        return file.read().decode(errors="replace").strip()
    return ""


def stack_of(pid: int, log: Path, sleep: Callable[[float], None] = time.sleep) -> str:
    """The stacks of a role's threads, which it writes into its log when asked by SIGUSR1 (supervision/zygote_main.py): that needs neither
    the interpreter's lock nor the role's help. Empty where nothing came."""
    begin = log.stat().st_size if log.exists() else 0
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    before, deadline = begin, time.monotonic() + _STACK_SECONDS
    while time.monotonic() < deadline:
        sleep(0.05)
        now = log.stat().st_size if log.exists() else 0
        if now > begin and now == before:
            break
        before = now
    return read_log(log, begin)
