"""What the nodes of a cluster say, taken in: words until the supervisor hears them, rollouts until their words are heard, deaths, what actors do, and logs.

consumes    frames of links (`take_in`), which the functions of ray_heard.py read
waits for   nothing
unblocked   by nothing: a frame is taken in, or passed over where it is of an actor that is gone, or of a slot that is not leased to it
on failure  a node that says what no node says has its link marked as lost; RayFleet gives it up
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

from shoal.engines.fleet import Death, Process
from shoal.engines.messages import NOBODY, Word, check_word, place_of
from shoal.engines.messages import Kind as Told
from shoal.engines.ray_channel import NodeChannel
from shoal.engines.ray_heard import Forked, HelperLost, check_head, check_said, read_activities, read_happened, read_slot
from shoal.engines.ray_learners import LearnerChannel
from shoal.engines.ray_link import NodeLink
from shoal.engines.ray_saying import Allowance, BoundedLog, LogText, without_secrets
from shoal.engines.ray_words import Frame, Kind, number_of, role_of
from shoal.errors import SchemaError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring, Slot
from shoal.experience.schema import Schema
from shoal.experience.wire import unpack, unpack_part
from shoal.supervision.heartbeat import ActivityBoard
from shoal.supervision.zygote import Exited, Lost, Role

_TIMES = ("begun_ns", "finished_ns")


class RemoteChannel(NodeChannel):
    """The way to an actor on a node.

    leases: of all actors, by slot; those that are told here are written there.
    """

    def __init__(self, link: NodeLink, index: int, incarnation: int, leases: dict[int, tuple[RemoteChannel, Identity]]) -> None:
        super().__init__(link)
        self._index, self._incarnation, self._leases = index, incarnation, leases

    def send(self, message: bytes) -> bool:
        return self.send_with_fds(message, ())

    def send_with_fds(self, message: bytes, fds: Sequence[int]) -> bool:
        """Always room: what the supervisor says is bounded by the slots that there are. The content of a file travels, not its descriptor."""
        self.check_there()
        word = Word.decode(message)
        if word.kind is Told.LEASE:
            self._leases[word.slot] = self, word.identity
        body = b"".join(os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds)
        self._link.post(Frame(Kind.WORD, self._index, self._incarnation, message, body))
        return True


class House(Protocol):
    """Whose processes they are: as much of a `RayFleet` as is asked here."""

    actors: list[Process]
    learners: list[Process]

    def home_of(self, number: int) -> NodeLink | None:
        """The node where the process of this number (`number_of`) lives, or is to live; None: on none."""

    def log_of(self, process: Process) -> Path: ...

    def notice(self, link: NodeLink, notice: str) -> None:
        """A node says that it is soon to end."""


class Hearing:
    """What was taken in, of all nodes. Processes go by their numbers (`number_of`).

    Args:
      told: of what is worth an event, as `Observer.event`.
    Attributes:
      events: deaths, until the supervisor is told.
      arrived: rollouts by slot, until their word is heard.
      leases: what each slot was leased for last, until its rollout is here.
      states: the kernel's letters, of each process. seen_at: when its node last said what it does (monotonic clock).
    """

    def __init__(self, run_id: bytes, house: House, told: Callable[..., None]) -> None:
        self._run_id, self._house, self._told = run_id, house, told
        self._since_ns = time.monotonic_ns()  # before anything was made
        self._ring: Ring | None = None
        self._activities: ActivityBoard | None = None
        self.events: list[Death | Lost] = []
        self.arrived: dict[int, tuple[Identity, bytes]] = {}
        self.leases: dict[int, tuple[RemoteChannel, Identity]] = {}
        self.states: dict[int, str] = {}
        self.seen_at: dict[int, float] = {}
        self._clocks = WeakKeyDictionary[NodeLink, int]()  # ns to add to a node's monotonic clock
        self._logs: dict[int, BoundedLog] = {}
        self._allowances = WeakKeyDictionary[NodeLink, Allowance]()

    def begin(self, ring: Ring, activities: ActivityBoard) -> None:
        """Where rollouts, and what processes do, are written."""
        self._ring, self._activities = ring, activities

    def forget(self) -> None:
        """Nobody is at work any more, and no slot is anybody's."""
        self.arrived.clear()
        self.leases.clear()

    def take_in(self, link: NodeLink) -> None:
        """Hear what a node said. `link.lost` says what is wrong with one that says what no node says."""
        for frame in link.take():
            try:
                check_head(frame)
                self._take(link, without_secrets(frame))
            except ValueError as error:
                link.lost = link.lost or f"it said what no node says ({frame.kind.name}: {error})"
                break

    def deaths(self) -> list[Death | Lost]:
        """Those since the last call."""
        events, self.events = self.events, []
        return events

    def died(self, process: Process, exited: Exited) -> None:
        number = number_of(process.name, process.index)
        if (log := self._logs.pop(number, None)) is not None:
            self._write(process, log.end(time.monotonic()))
        crashed = exited.crashed and not process.doomed
        self.states.pop(number, None)  # of the next one, perhaps on another node, nothing was seen yet
        self.seen_at.pop(number, None)
        record = self._board.record(place_of(process.name, process.index, self._board.num_roles))
        self.events.append(Death(process, exited.describe(), process.doomed, crashed, record))

    def collect(self, link: NodeLink, word: Word, newest_version: int) -> None:
        """Put the rollout that came with a word into its slot, which is leased to an actor of that node; those of this machine write there themselves.
        Raises SchemaError: none came, or what came does not stand its checks."""
        identity, body = self.arrived.pop(word.slot, (word.identity, b""))
        self.leases.pop(word.slot, None)
        slot = self._slot(word.slot)
        if not link.own:
            unpack(body if identity == word.identity else b"", slot, self._run_id, word.identity, newest_version)
        link.env_steps += int(slot.envelope["num_env_steps"])
        if link.own:
            return
        for name in _TIMES:
            there_ns = int(slot.envelope[name]) + self._clocks.get(link, 0)
            slot.envelope[name] = min(max(there_ns, self._since_ns), time.monotonic_ns())

    # ---- frames ----------------------------------------------------------------------------------------------------
    def _take(self, link: NodeLink, frame: Frame) -> None:
        if frame.kind is Kind.ACTIVITIES:
            self._take_activities(link, frame)
        elif frame.kind is Kind.LEAVING:
            self._house.notice(link, frame.head.decode(errors="replace"))
        elif frame.kind is Kind.HAPPENED:
            self._take_happened(link, frame)
        elif (process := self._process_of(link, frame)) is None:
            return
        elif frame.kind is Kind.SAID:
            self._take_said(process, frame)
        elif frame.kind is Kind.WORD:
            self._take_word(process, frame)
        elif frame.kind is Kind.PARTIAL:
            self._take_part(process, frame)
        elif frame.kind is Kind.LOG:
            log = self._logs.get(frame.index)
            if log is None or log.allowance is not self._allowance(link):
                log = self._logs[frame.index] = BoundedLog(self._allowance(link), link.name, LogText())
            self._write(process, log.take(frame.body, time.monotonic()))

    def _allowance(self, link: NodeLink) -> Allowance:
        return self._allowances.setdefault(link, Allowance())

    def _write(self, process: Process, said: bytes) -> None:
        if said:
            with self._house.log_of(process).open("ab") as log:
                log.write(said)

    def _process_of(self, link: NodeLink, frame: Frame) -> Process | None:
        """The living process that a frame is of; None where it is of an earlier incarnation, or lives elsewhere by now."""
        if self._house.home_of(frame.index) is not link:
            return None
        name, index = role_of(frame.index)
        process = (self._house.actors if name == "actor" else self._house.learners)[index]
        return process if process.up and process.incarnation == frame.incarnation else None

    def _take_happened(self, link: NodeLink, frame: Frame) -> None:
        said = read_happened(frame.head)
        if isinstance(said, HelperLost):
            self._told("warning", message=f"node {link.name}: {said.reason.partition(chr(10))[0]}; it is started again")
        elif (process := self._process_of(link, frame)) is None:
            return
        elif isinstance(said, Forked):
            process.pid = said.pid
        else:
            self.died(process, Exited(said.pid, Role(process.name, process.index, process.incarnation), said.status, said.error))

    @staticmethod
    def _take_said(process: Process, frame: Frame) -> None:
        check_said(frame.head)
        if not isinstance(process.channel, LearnerChannel):
            raise ValueError("only a learner says that")
        process.channel.said.append(frame.head)

    def _take_word(self, process: Process, frame: Frame) -> None:
        if not isinstance(process.channel, RemoteChannel):
            raise ValueError("only an actor says that")
        word = Word.decode(frame.head)
        check_word(word, self._schema.num_envs, self._schema.num_rows)
        if frame.body and self.is_leased(process, word.slot, word.identity):
            self.arrived[word.slot] = word.identity, frame.body
        process.channel.said.append(frame.head)

    def _take_part(self, process: Process, frame: Frame) -> None:
        """What an actor was making when it died, if it is what it held a lease for."""
        index = read_slot(frame.head)
        leased_to, identity = self.leases.get(index, (None, NOBODY))
        if leased_to is not process.channel:
            return  # it is too late, or of what the actor gave up before
        try:
            unpack_part(frame.body, self._slot(index), self._run_id, identity)
        except SchemaError as error:
            self._told("warning", message=f"what actor-{process.index} was making when it died cannot be read: {error}")

    def is_leased(self, process: Process, slot: int, identity: Identity) -> bool:
        return self.leases.get(slot) == (process.channel, identity)

    def _take_activities(self, link: NodeLink, frame: Frame) -> None:
        now_ns, doing = read_activities(frame)
        offset = time.monotonic_ns() - now_ns  # what the way took is in it, which the least of all hardly has
        self._clocks[link] = offset = min(offset, self._clocks.get(link, offset))
        for each in doing:
            if self._house.home_of(each.index) is not link:
                continue
            each.record["since_ns"] += offset
            self._board.put(place_of(*role_of(each.index), self._board.num_roles), each.record)
            self.states[each.index] = each.letter
            self.seen_at[each.index] = time.monotonic()

    @property
    def _board(self) -> ActivityBoard:
        assert self._activities is not None
        return self._activities

    @property
    def _schema(self) -> Schema:
        assert self._ring is not None
        return self._ring.schema

    def _slot(self, index: int) -> Slot:
        assert self._ring is not None
        return self._ring.slots[index]
