"""An actor's process: the words of the supervisor on one side, the actor on the other."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from typing import Any

from shoal.actors.actor import Actor
from shoal.actors.behaviour import LocalPolicy, RemotePolicy
from shoal.engines.beginning import IDLE_SECONDS, Stopped, attach, read_and_close, receive_setup
from shoal.engines.errors_told import describe_error, encoded
from shoal.engines.inference import InferenceClient, MailLayout
from shoal.engines.messages import Kind, Word, to_json
from shoal.errors import EnvironmentFault
from shoal.experience.group_state import from_bytes
from shoal.experience.ring import Ring
from shoal.supervision.channel import Channel, wait
from shoal.supervision.trace import Span
from shoal.supervision.zygote_main import ChildContext
from shoal.types import Activity
from shoal.weights.board import WeightBoard


class ActorProcess:
    """Serves one actor.

    consumes    LEASE, RESTORE, RELEASE, PUBLISHED, CONNECT, STOP
    waits for   words of the supervisor, when it holds no lease; where a server chooses the actions, its answers (engines/inference.py)
    unblocked   by a word, or by the end of the supervisor (its channel closes)
    on failure  an EnvironmentFault is reported as FAULT and the group released; anything else ends the process
    """

    def __init__(self, context: ChildContext) -> None:
        self._channel: Channel = context.channel
        setup = receive_setup(context.channel)
        self._blueprint, ring, board, self._heart, self._trace = attach(context, setup)
        self._client: InferenceClient | None = None
        self._behaviour: LocalPolicy | RemotePolicy = self._choose(ring, board)
        self._actor: Actor = self._blueprint.actor(ring, self._behaviour, context.index, context.incarnation, self._heart)
        self._close_after: int = setup["close_after_lag"]
        self._sync: bool = setup["sync"]
        self._work: deque[tuple[Word, bytes]] = deque()  # leases, restores and releases, in order
        self._newest = -1

    def _choose(self, ring: Ring, board: WeightBoard) -> LocalPolicy | RemotePolicy:
        if not self._blueprint.served:
            return self._blueprint.behaviour(board)
        policy = self._blueprint.policy()
        self._client = InferenceClient(MailLayout.of(ring.schema, policy), self._channel, self._listen)
        return self._blueprint.remote_behaviour(self._client, board, policy)

    def run(self) -> None:
        try:
            while True:
                self._listen(wait_for_work=not self._work)
                if self._work:
                    self._do(*self._work.popleft())
        except Stopped:
            self._actor.close()

    def _listen(self, wait_for_work: bool = False) -> None:
        """Take in every word that is there; with `wait_for_work`, wait until there is something to do."""
        if wait_for_work:
            self._heart.enter(Activity.WAITING_FOR_LEASE)
        while True:
            try:
                received = self._channel.receive_with_fds()
            except EOFError:
                raise Stopped from None
            if received is None:
                if not wait_for_work or self._work:
                    return
                wait([self._channel], IDLE_SECONDS)
                continue
            word = Word.decode(received[0])
            if word.kind is Kind.CONNECT:
                assert self._client is not None
                self._client.connect(received[1][0])
                continue
            state = b"".join(read_and_close(fd) for fd in received[1])
            if word.kind is Kind.STOP:
                raise Stopped
            if word.kind is Kind.PUBLISHED:
                self._newest = max(self._newest, word.value)
            else:
                self._work.append((word, state))

    def _do(self, word: Word, state: bytes) -> None:
        group = word.identity.group
        try:
            if word.kind is Kind.RESTORE:
                begun = time.monotonic()
                lost = self._actor.restore(group, from_bytes(state))
                self._say(Word(Kind.RESTORED, 0, word.identity, len(lost), to_json({"seconds": time.monotonic() - begun})))
            elif word.kind is Kind.RELEASE:
                self._actor.release(group)
            elif word.kind is Kind.LEASE and self._actor.hosts(group):  # else it crossed our FAULT, and is void
                self._fill(word)
        except EnvironmentFault as fault:
            if "paced" in fault.report:
                fault.report["traceback"] = _other_threads()
            self._say(Word(Kind.FAULT, word.slot, word.identity, 0, encoded(describe_error(fault))))
            self._work = deque(entry for entry in self._work if entry[0].identity.group != group)
            self._actor.release(group)  # said first: closing what is broken may hang

    def _fill(self, word: Word) -> None:
        if max(self._newest, word.value) > self._behaviour.version:
            self._refresh()
        if self._sync and self._behaviour.version != word.value:
            raise RuntimeError(f"the board holds version {self._behaviour.version}, the lease says {word.value}")
        special: dict[str, list[Any]] = word.json if word.body else {}
        give_up = [tuple(place) for name in ("give_up", "give_up_steps") for place in special.get(name, ())]
        self._trace.begin(Span.ROLLOUT)
        try:
            self._actor.fill(word.slot, word.identity, None if self._sync else self._between_rows, give_up, special.get("careful", ()))
        finally:
            self._trace.end(word.identity.group, word.identity.sequence)
        self._say(Word(Kind.FILLED, word.slot, word.identity))

    def _refresh(self) -> None:
        self._trace.begin(Span.REFRESH)
        self._trace.end(self._behaviour.refresh())

    def _between_rows(self, first_version: int) -> bool:
        self._listen()
        if self._newest > self._behaviour.version:
            self._refresh()
        return self._behaviour.version - first_version >= self._close_after

    def _say(self, word: Word) -> None:
        try:
            while not self._channel.send(word.encode()):
                wait([], 0.01, writable=[self._channel])
        except EOFError:
            raise Stopped from None


def _other_threads() -> str:
    """Where the threads of this process stand, but for the one that asks: one of them is in the step that hangs."""
    frames, mine = sys._current_frames(), threading.get_ident()
    return "\n".join("".join(traceback.format_stack(frame)) for ident, frame in frames.items() if ident != mine)
