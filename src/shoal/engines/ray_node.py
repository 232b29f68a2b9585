"""The fleet of one node: actors in processes of that machine, as the local engine has them, and the way between them and a driver elsewhere.

The driver decides all. It says whom to start, to kill and what to make (`say`), and hears what they answer (`hear`); a rollout that is finished goes
along with the word that tells of it. Weights come once per version, and lie in this node's own board for all of its actors. A learner may live here too
(engines/ray_learners.py): the rollouts that it learns from are put into this node's slots before it is told of them.

    consumes    frames of the driver; words of the actors, and of a learner; exits told by the zygote
    waits for   all of them together, POLL_SECONDS at most
    unblocked   by any of them
    on failure  a zygote that is stopped is woken; one that neither forks nor kills in time is killed; one that is lost is told with all of its processes, and
                another one is started; where this thread stands still, `hear` raises; the end of the process that holds the node ends all of them
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal.engines.fleet import Process, flush, tell, tell_with_file, words
from shoal.engines.importing import try_imports
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, from_json, place_of, to_json
from shoal.engines.node_report import report_here
from shoal.engines.ray_node_log import NodeLog
from shoal.engines.ray_saying import LogText, without_secrets
from shoal.engines.ray_words import Frame, Kind, Parts, encode, number_of, part, role_of
from shoal.errors import SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.experience.wire import pack, unpack
from shoal.supervision.channel import Channel, HasFileno, wait
from shoal.supervision.heartbeat import ActivityBoard
from shoal.supervision.memory import SharedMemory
from shoal.supervision.processes import process_state
from shoal.supervision.zygote import Exited, Forked, Lost, Ready, Zygote
from shoal.types import FieldSpec
from shoal.weights.board import WeightBoard

POLL_SECONDS = 0.25
HEAR_SECONDS = 1.0  # an answer comes at least so often, if an empty one
HOLD_SECONDS = (
    0.02  # async: a rollout waits so long for others that are being made here, to go with them: what a message costs is hardly its bytes
)
REPORT_BYTES = 8 << 20  # of one message, but for a single rollout that is larger
RESTART_SECONDS = 1.0  # between two zygotes
READY_SECONDS = 300.0  # a zygote's imports, on a slow disk, or a machine that is busy with other things
ANSWER_SECONDS = 10.0  # a zygote that is there forks or kills within this time, or is given up
MOST_STILL = (
    15  # answers in a row, of HEAR_SECONDS each, that say nothing while the thread that serves made no turn: then this node serves no more
)
PRELOAD = ["torch", "gymnasium", "shoal.engines.mains"]
ACTIVITY = struct.Struct("<Ic3x")  # number_of the process, the kernel's letter; a RECORD follows


@dataclass
class _Hosted(Process):
    """An actor or a learner here, as the driver sees it: what it is making, and how much of its log was told."""

    leases: dict[int, Identity] = field(default_factory=dict)
    log: NodeLog | None = None
    said: LogText = field(default_factory=LogText)

    @property
    def number(self) -> int:
        return number_of(self.name, self.index)


class Node:
    """`say` and `hear` are called from two threads, `look`, `beat` and `close` from any; a third one serves.

    Args:
      setup: JSON: config, fields, sizes and names of packages (see `node_setup` of engines/ray_joining.py).
      pickled: the user's own objects by cloudpickle, which only processes of their own open; None for none.
    """

    def __init__(self, setup: bytes, pickled: bytes | None) -> None:
        facts = from_json(setup)
        self._config, self._pickled, self._run_id = facts["config"], pickled, bytes.fromhex(facts["run_id"])
        self._asynchronous = self._config["mode"] == "async"
        fields = tuple(FieldSpec(f["name"], f["dtype"], tuple(f["shape"]), f["axis"]) for f in facts["fields"])
        schema = Schema(fields, facts["num_rows"], facts["num_envs"])
        self._memory = SharedMemory.create(facts["memory_bytes"])
        self._ring = Ring(schema, facts["num_slots"], self._memory.buffer[: facts["ring_bytes"]])
        self._board = WeightBoard(facts["weights"], self._memory.buffer[facts["ring_bytes"] :])
        self._board.reset()
        self._num_weights: int = facts["weights"]
        self._activities = ActivityBoard.create(facts["num_roles"])
        self._log = NodeLog()
        self._actors: dict[int, _Hosted] = {}  # and a learner, by their numbers
        self._orders: deque[Frame] = deque()
        self._parts = Parts(sys.maxsize)  # the driver is trusted
        self._message, self._told_of = b"", 0  # what is told in parts, and how much of it was
        self._reports: deque[Frame] = deque()
        self._something = threading.Condition()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._failure = self._leaving = ""
        self._packages: list[str] = facts["packages"]
        self._import_error: str | None = None  # not known yet
        self._told_at = self._watched_at = 0.0
        self._patient_until = 0.0  # a zygote is there, or is importing
        self._given_up = ""  # why a zygote was
        self._turns = self._turns_seen = self._still = 0  # of the thread that serves; answers since its last one
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)
        self._thread.start()

    # ---- called by the driver ------------------------------------------------------------------------------------
    def say(self, message: bytes) -> None:
        """Orders, in one message or a part of one; returns once they are taken, not once they are done."""
        if frames := self._parts.take(message):
            self._orders.extend(frames)
            os.eventfd_write(self._wake, 1)

    def hear(self, most_bytes: int = REPORT_BYTES) -> bytes:
        """What happened since the last call, in one message: waits HEAR_SECONDS at most. One of more than `most_bytes` goes in parts, with one call each.
        Raises RuntimeError where this node serves no more."""
        if self._told_of >= len(self._message):
            self._message, self._told_of = self._next_message(), 0
            if len(self._message) <= most_bytes:
                self._told_of = len(self._message)
                return self._message
        elif self._failure:
            raise RuntimeError(self._failure)
        piece = part(self._message, self._told_of, most_bytes)
        self._told_of += most_bytes
        return piece

    def _next_message(self) -> bytes:
        with self._something:
            self._something.wait_for(lambda: self._reports or self._failure, HEAR_SECONDS)
            self._something.wait_for(lambda: self._failure or self._in_a_hurry(), HOLD_SECONDS)
            if self._failure:
                raise RuntimeError(self._failure)
            told: list[Frame] = []
            size = 0
            while self._reports and (not told or size + self._reports[0].size <= REPORT_BYTES):
                told.append(self._reports.popleft())
                size += told[-1].size
        self._check_turns(told)
        return encode(told)

    def _check_turns(self, told: Sequence[Frame]) -> None:
        """Raise RuntimeError where the thread that serves stands still. Answers are counted, not seconds, in which this whole process may have been stopped."""
        moved = told or self._turns != self._turns_seen or self._import_error is None
        self._turns_seen = self._turns
        self._still = 0 if moved else self._still + 1
        if self._still >= MOST_STILL:
            raise RuntimeError(f"the thread that serves it has stood still for {MOST_STILL * HEAR_SECONDS:g} s")

    def _in_a_hurry(self) -> bool:
        idle = [not actor.leases for actor in list(self._actors.values()) if actor.up and actor.name == "actor"]
        return is_urgent(self._reports, idle, asynchronous=self._asynchronous)

    def beat(self) -> None:
        """It is there, whatever else is under way."""

    def look(self) -> bytes:
        """What this node is: a `NodeReport`. Waits until it has imported what the run is made of, or could not."""
        with self._something:
            self._something.wait_for(lambda: self._import_error is not None or self._failure)
        return report_here(self._packages, self._failure or self._import_error or "").to_json()

    def announce(self, why: str) -> None:
        """This node is soon to end: the driver is told, and moves what lives here. May be called from a signal handler."""
        self._leaving = why
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End all processes. Returns when nothing is left."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()

    # ---- the thread that serves ----------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._zygote = self._start_zygote()
            try:
                self._try_imports()
                while not self._closing:
                    self._serve()
            finally:
                self._zygote.close()
        except BaseException as error:  # told to the driver, which gives this node up
            with self._something:
                self._failure = f"{type(error).__name__}: {error}"
                self._something.notify_all()
        finally:
            for actor in self._actors.values():
                actor.ended()
                if actor.log is not None:
                    actor.log.close()
            self._log.close()
            self._memory.close()
            self._activities.close()

    def _try_imports(self) -> None:
        """Before any actor: whether the run's own code can be imported here."""
        env = self._config["env"]
        with tempfile.TemporaryDirectory(prefix="shoal-node-") as place:
            _, error = try_imports(self._zygote, env["id"], env["step_timeout_seconds"], Path(place), READY_SECONDS)
        self._patient_until = time.monotonic()
        if self._zygote.fileno() < 0:  # lost on the way
            self._zygote = self._start_zygote()
        with self._something:
            self._import_error = error
            self._something.notify_all()

    def _start_zygote(self) -> Zygote:
        self._patient_until, self._given_up = time.monotonic() + READY_SECONDS, ""
        return Zygote.start({"config": self._config}, self._pickled, PRELOAD, log_path=self._log.path)

    def _serve(self) -> None:
        for actor in self._actors.values():
            flush(actor)
        channels: list[HasFileno] = [actor.channel for actor in self._actors.values() if actor.channel is not None]
        wait([*channels, self._zygote, _Fd(self._wake)], POLL_SECONDS)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        if self._leaving:
            self._report(Frame(Kind.LEAVING, head=self._leaving.encode()))
            self._leaving = ""
        while self._orders:
            self._obey(self._orders.popleft())
        for actor in self._actors.values():
            self._hear(actor)
        for event in self._zygote.receive():
            self._happened(event)
        self._turns += 1
        if time.monotonic() - self._watched_at >= POLL_SECONDS:
            self._watched_at = time.monotonic()
            self._watch_zygote(self._watched_at)
        if time.monotonic() - self._told_at >= POLL_SECONDS and not self._behind:
            self._told_at = time.monotonic()
            self._tell_activities()

    def _watch_zygote(self, now: float) -> None:
        """One that is stopped is woken; one that neither forks nor kills when it is told to is given up, and with it all processes here: `receive` tells."""
        self._zygote.wake()
        waiting = [
            actor.doomed_at if actor.pid else actor.asked_at
            for actor in self._actors.values()
            if actor.up and (actor.doomed or not actor.pid)
        ]
        if waiting and now - max(min(waiting), self._patient_until) > ANSWER_SECONDS:
            self._given_up = f"it did not answer within {ANSWER_SECONDS:g} s; "
            self._zygote.give_up()

    @property
    def _behind(self) -> bool:
        """Whether what was told last of activities and logs has not been heard yet: on a slow way there is never more of them than that."""
        with self._something:
            return any(frame.kind in (Kind.ACTIVITIES, Kind.LOG) for frame in self._reports)

    def _report(self, *frames: Frame) -> None:
        with self._something:
            self._reports.extend(map(without_secrets, frames))
            self._something.notify_all()

    # ---- orders --------------------------------------------------------------------------------------------------
    def _obey(self, order: Frame) -> None:
        if order.kind is Kind.WEIGHTS:
            (version,) = struct.unpack("<q", order.head)
            if version <= self._board.version:  # the run went back to a checkpoint, and nobody is reading
                self._board.reset()
            self._board.publish(version, np.frombuffer(order.body, np.float32, self._num_weights))
        elif order.kind is Kind.START:
            self._start(order)
        elif order.kind is Kind.ROLLOUT:
            word = Word.decode(order.head)
            unpack(order.body, self._ring.slots[word.slot], self._run_id, word.identity, word.value)
        else:
            actor = self._actors.get(order.index)
            if actor is None or actor.incarnation != order.incarnation or not actor.up:
                return
            if order.kind is Kind.WORD:
                self._pass_on(actor, order)
            elif order.kind is Kind.ORDER:
                tell(actor, order.head)
            elif order.kind is Kind.KILL:
                actor.doomed, actor.doomed_at = actor.doomed or "told to", actor.doomed_at or time.monotonic()
                if actor.pid:
                    self._zygote.kill(actor.pid)
            elif order.kind is Kind.DUMP and actor.pid:
                self._zygote.dump(actor.pid)

    def _start(self, order: Frame) -> None:
        before = self._actors.get(order.index)
        if before is not None and before.up:
            return  # its death is told first; the driver orders no start before it heard of that
        actor = _Hosted(*role_of(order.index), order.incarnation, asked_at=time.monotonic())
        if before is not None:
            actor.log = before.log
        self._actors[order.index] = actor
        try:
            actor.log = actor.log or NodeLog()
            actor.channel, theirs = Channel.pair()
            fds = (self._memory.fd, self._activities.fd)
            target = f"shoal.engines.mains:{actor.name}_main"
            self._zygote.fork(target, actor.name, actor.index, actor.incarnation, theirs, fds, actor.log.path)
        except OSError as error:
            self._report(_exited(actor, None, f"could not be started: {error.strerror or error}"))
            actor.ended()
            return
        tell_with_file(actor, Word(Told.SETUP, body=b"{}").encode() if actor.name == "actor" else b"{}", order.body)

    def _pass_on(self, actor: _Hosted, order: Frame) -> None:
        word = Word.decode(order.head)
        if word.kind is Told.LEASE:
            self._ring.slots[word.slot].envelope["num_rows"] = 0
            actor.leases[word.slot] = word.identity
        if order.body:
            tell_with_file(actor, order.head, order.body)
        else:
            tell(actor, order.head)

    # ---- what happens here ---------------------------------------------------------------------------------------
    def _hear(self, actor: _Hosted) -> None:
        for message in words(actor):
            if actor.name == "learner":
                self._report(Frame(Kind.SAID, actor.number, actor.incarnation, message))
                continue
            body = b""
            try:
                word = Word.decode(message)
                if word.kind is Told.FILLED and actor.leases.pop(word.slot, None) == word.identity:
                    slot = self._ring.slots[word.slot]
                    slot.check_counts()
                    body = pack(slot)
            except (ValueError, SchemaError):
                pass  # the driver sees that it is no word, or that no rollout comes with it
            self._report(Frame(Kind.WORD, actor.index, actor.incarnation, message, body))

    def _happened(self, event: object) -> None:
        if isinstance(event, Lost):
            self._report(Frame(Kind.HAPPENED, head=to_json({"is": "lost", "reason": self._given_up + event.reason})))
            time.sleep(RESTART_SECONDS)
            self._zygote = self._start_zygote()
        if isinstance(event, Ready):
            self._patient_until = time.monotonic()
        if not isinstance(event, (Forked, Exited)) or event.role.name not in ("actor", "learner"):
            return
        actor = self._actors.get(number_of(event.role.name, event.role.index))
        if actor is None or actor.incarnation != event.role.incarnation or not actor.up:
            return
        if isinstance(event, Forked):
            actor.pid = event.pid
            self._report(Frame(Kind.HAPPENED, actor.number, actor.incarnation, to_json({"is": "forked", "pid": event.pid})))
            if actor.doomed:
                self._zygote.kill(event.pid)
            return
        self._hear(actor)
        self._tell_activities()
        self._tell_of_log(actor, actor.said.rest())
        self._tell_remains(actor)
        self._report(_exited(actor, event.status, event.error))
        actor.ended()
        actor.incarnation -= 1  # the driver counts

    def _tell_remains(self, actor: _Hosted) -> None:
        """What an actor was making when it died, so that its steps are counted, and the place where it broke is known."""
        for index, identity in actor.leases.items():
            slot = self._ring.slots[index]
            try:
                if slot.identity == identity and int(slot.envelope["num_rows"]):
                    slot.check_counts()
                    self._report(Frame(Kind.PARTIAL, actor.index, actor.incarnation, struct.pack("<I", index), pack(slot)))
            except SchemaError:
                continue  # it died in the middle of writing its header
        actor.leases.clear()

    def _tell_activities(self) -> None:
        parts = []
        for actor in self._actors.values():
            state = (process_state(actor.pid) or "?") if actor.pid else "?"
            parts.append(
                ACTIVITY.pack(actor.number, state.encode())
                + self._activities.raw(place_of(actor.name, actor.index, self._activities.num_roles))
            )
            self._tell_log(actor)
        if parts:
            self._report(Frame(Kind.ACTIVITIES, head=struct.pack("<q", time.monotonic_ns()), body=b"".join(parts)))

    def _tell_log(self, actor: _Hosted) -> None:
        if actor.log is not None and (written := actor.log.read()):
            self._tell_of_log(actor, actor.said.take(written))

    def _tell_of_log(self, actor: _Hosted, said: bytes) -> None:
        if said:
            self._report(Frame(Kind.LOG, actor.number, actor.incarnation, body=said))


class SignalledNode(Node):
    """A `Node` in a process of its own, whose SIGTERM is a notice: what lives here is to move before the process ends. Made in its main thread."""

    def __init__(self, setup: bytes, pickled: bytes | None) -> None:
        _be_no_nicer_than_ray()
        super().__init__(setup, pickled)
        signal.signal(signal.SIGTERM, lambda number, frame: self.announce("its process got SIGTERM"))


def is_urgent(reports: Collection[Frame], idle: Sequence[bool], *, asynchronous: bool) -> bool:
    """Whether more is told than rollouts, or somebody waits for them: in sync mode the learner, in async mode an actor that has nothing to make.
    idle: of each actor, whether that is so."""
    return not asynchronous or any(idle) or not reports or any(not frame.body or frame.kind is not Kind.WORD for frame in reports)


def _be_no_nicer_than_ray() -> None:
    """Ray has its workers yield to every other program (RAY_worker_niceness, 15): beside a learner, actors would be interrupted at each of its wakes.
    This thread, and all that it starts, gets the priority of the raylet again, where that is permitted."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, os.getppid()))


@dataclass(frozen=True)
class _Fd:
    fd: int

    def fileno(self) -> int:
        return self.fd


def _exited(actor: _Hosted, status: int | None, error: str) -> Frame:
    facts: dict[str, Any] = {"is": "exited", "pid": actor.pid, "status": status, "error": error}
    return Frame(Kind.HAPPENED, actor.number, actor.incarnation, json.dumps(facts).encode())
