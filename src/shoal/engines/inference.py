"""Inference for all actors in one process: each actor asks it once a row, and is answered through memory that the two share.

The observations and the noise of a row lie in the actor's mailbox, and so does the answer; a word of two numbers through a channel of
their own tells the one of the question and the other of the answer, and orders the memory. The actor makes the mailbox anew for every
connection, so what an older server still writes reaches nobody. There is one question of an actor at a time.

In sync mode each group is answered alone: the numbers of a forward pass depend on how many rows it has, and so would the run on who asked
together. In async mode all who have asked are answered by one pass.

Legend: B environments of a group, N rows of a pass.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.actors.behaviour import PolicyCopy
from shoal.experience.schema import Schema, numpy_dtype
from shoal.networks.acting import Acting
from shoal.supervision.channel import Channel, wait
from shoal.supervision.memory import SharedMemory
from shoal.supervision.trace import Span, Tracer
from shoal.types import Activity, ActivityRecorder, Array, Arrays
from shoal.weights.board import WeightBoard

GATHER_SECONDS = 0.001  # async: the first who asked waits this long for others
GATHER_SHARE = 0.5  # async: of all actors; when so many have asked, nobody waits for more
_IDLE_SECONDS = 1.0
_WORD = struct.Struct("<qq")  # number of the question, version of the answer
_ALIGNMENT = 64


@dataclass(frozen=True)
class MailLayout:
    """What lies in a mailbox, for one group of B: (name, dtype, shape), in this order."""

    questions: tuple[tuple[str, str, tuple[int, ...]], ...]  # observations, mask, `noise`, and the recurrent state before
    answers: tuple[tuple[str, str, tuple[int, ...]], ...]  # `action`, what else the policy emits, and the recurrent state after
    states: tuple[str, ...]  # names of the recurrent state

    @classmethod
    def of(cls, schema: Schema, policy: Acting) -> MailLayout:
        shown = [(f.name, f.dtype, (schema.num_envs, *f.shape)) for f in schema.fields if f.axis == "T+1"]
        emitted = [(f.name, f.dtype, (schema.num_envs, *f.shape)) for f in policy.fields() if f.axis == "T"]
        states = [(f.name, f.dtype, (schema.num_envs, *f.shape)) for f in policy.fields() if f.axis == "B"]
        noise = ("noise", "float32", (schema.num_envs, policy.noise.size))
        return cls((*shown, noise, *states), (*emitted, *states), tuple(name for name, _, _ in states))

    @property
    def size_bytes(self) -> int:
        return sum(_room(dtype, shape) for _, dtype, shape in (*self.questions, *self.answers))

    def views(self, buffer: Array) -> tuple[Arrays, Arrays]:
        """(questions, answers) as views of `buffer` (uint8 [size_bytes])."""
        found: list[Arrays] = []
        at = 0
        for fields in (self.questions, self.answers):
            views: Arrays = {}
            for name, dtype, shape in fields:
                num_bytes = math.prod(shape) * numpy_dtype(dtype).itemsize
                views[name] = buffer[at : at + num_bytes].view(numpy_dtype(dtype)).reshape(shape)
                at += _room(dtype, shape)
            found.append(views)
        return found[0], found[1]


def _room(dtype: str, shape: Sequence[int]) -> int:
    num_bytes = math.prod(shape) * numpy_dtype(dtype).itemsize
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


# ---- the actor's side ------------------------------------------------------------------------------------------------
class InferenceClient:
    """Asks the server.

    waits for   the answer
    unblocked   by the answer, or by a word of the supervisor: `listen` hears it, and raises where this role is to end
    on failure  a server that dies closes its channel; the supervisor sends one to the next server, which is asked again
    """

    def __init__(self, layout: MailLayout, supervisor: Channel, listen: Callable[[], None]) -> None:
        self._layout, self._supervisor, self._listen = layout, supervisor, listen
        self._channel: Channel | None = None
        self._number = 0

    def connect(self, fd: int) -> None:
        """Ask this server from now on; `fd` is our end of a channel to it, and taken over."""
        self._close()
        self._channel = Channel(fd)
        memory = SharedMemory.create(self._layout.size_bytes, "shoal-inference")
        self._questions, self._answers = self._layout.views(memory.buffer)
        self._send(_WORD.pack(0, 0), [memory.fd])
        memory.close()  # the views keep it mapped

    def ask(self, observation: Arrays, state: Arrays, noise_B: Array) -> tuple[Array, Arrays, Arrays, int]:
        """See actors.behaviour.Inference."""
        self._number += 1
        asked: Channel | None = None
        while True:
            if self._channel is not None and self._channel is not asked:
                asked = self._channel
                self._write({**observation, **state}, noise_B)
            if (version := self._answered()) is not None:
                outputs = dict(self._answers)
                after = {name: outputs.pop(name) for name in self._layout.states}
                return outputs.pop("action"), outputs, after, version
            ready = wait([self._supervisor, *([] if self._channel is None else [self._channel])], _IDLE_SECONDS)
            if self._supervisor in ready:
                self._listen()

    def _write(self, shown: Arrays, noise_B: Array) -> None:
        for name, array in shown.items():
            self._questions[name][:] = array
        self._questions["noise"][:] = noise_B
        self._send(_WORD.pack(self._number, 0))

    def _answered(self) -> int | None:
        try:
            while self._channel is not None and (message := self._channel.receive()) is not None:
                number, version = _WORD.unpack(message)
                if number == self._number:
                    return int(version)
        except EOFError:
            self._close()
        return None

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        assert self._channel is not None
        try:
            self._channel.send_with_fds(message, fds)  # there is room: one question at a time
        except EOFError:
            self._close()

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


# ---- the server's side -----------------------------------------------------------------------------------------------
class _Asker:
    """An actor as the server sees it."""

    def __init__(self, actor: int, channel: Channel, layout: MailLayout) -> None:
        self.actor = actor
        self._channel, self._layout = channel, layout
        self._number = 0
        self.questions: Arrays = {}
        self._answers: Arrays = {}

    def fileno(self) -> int:
        return self._channel.fileno()

    def asks(self) -> bool:
        """Whether it asked something since. Raises EOFError: it is gone."""
        asked = False
        while (received := self._channel.receive_with_fds()) is not None:
            message, fds = received
            for fd in fds:
                memory = SharedMemory.attach(fd, self._layout.size_bytes)
                self.questions, self._answers = self._layout.views(memory.buffer)
                memory.close()
            self._number, _ = _WORD.unpack(message)
            asked = self._number > 0
        return asked

    def answer(self, arrays: Arrays, version: int) -> None:
        """Raises EOFError: it is gone."""
        for name, array in arrays.items():
            self._answers[name][:] = array
        self._channel.send(_WORD.pack(self._number, version))

    def close(self) -> None:
        self._channel.close()


class InferenceServer:
    """Chooses the actions of all actors.

    consumes    questions of actors, and new weights, before each pass
    waits for   a question; with `batches`, a moment longer for others
    unblocked   by a question, a word of the supervisor (`listen` hears it), or the time
    on failure  an actor that is gone is forgotten; anything else ends the process, another one is started and asked again
    """

    def __init__(
        self,
        copy: PolicyCopy,
        board: WeightBoard,
        layout: MailLayout,
        supervisor: Channel,
        listen: Callable[[], None],
        *,
        batches: bool,
        recorder: ActivityRecorder,
        trace: Tracer,
    ) -> None:
        self._copy, self._board, self._layout = copy, board, layout
        self._supervisor, self._listen = supervisor, listen
        self._batches = batches
        self._recorder, self._trace = recorder, trace
        self._askers: dict[int, _Asker] = {}  # by actor

    def connect(self, actor: int, fd: int) -> None:
        """Serve this actor (or its next incarnation) from now on; `fd` is our end of a channel to it, and taken over."""
        if actor in self._askers:
            self._askers[actor].close()
        self._askers[actor] = _Asker(actor, Channel(fd), self._layout)

    def serve_once(self) -> None:
        """Answer the next questions. Whatever `listen` raises ends it."""
        self._recorder.enter(Activity.WAITING_FOR_BATCH)
        asked = self._gather()
        self._recorder.enter(Activity.INFERRING)
        for together in [asked] if self._batches else [[asker] for asker in asked]:
            self._trace.begin(Span.ANSWER)
            self._answer(together)
            self._trace.end(len(together), self._copy.version)

    def _gather(self) -> list[_Asker]:
        """Those who have asked, by actor; at least one."""
        asked: dict[int, _Asker] = {}
        until = 0.0
        while True:
            timeout = _IDLE_SECONDS if not asked else max(0.0, until - time.monotonic())
            sources: list[Channel | _Asker] = [self._supervisor, *self._askers.values()]
            ready = wait(sources, timeout)
            if self._supervisor in ready:
                self._listen()
            new = self._questions(source for source in ready if isinstance(source, _Asker))
            if new and not asked:
                until = time.monotonic() + GATHER_SECONDS
            asked = {actor: asker for actor, asker in (asked | new).items() if self._askers.get(actor) is asker}
            enough = len(asked) >= GATHER_SHARE * len(self._askers)
            if asked and (not self._batches or enough or time.monotonic() >= until):
                return [asked[actor] for actor in sorted(asked)]

    def _questions(self, ready: Iterable[_Asker]) -> dict[int, _Asker]:
        found = {}
        for asker in ready:
            if self._askers.get(asker.actor) is not asker:
                continue  # replaced a moment ago
            try:
                if asker.asks():
                    found[asker.actor] = asker
            except EOFError:
                self._forget(asker)
        return found

    def _answer(self, askers: list[_Asker]) -> None:
        if self._board.version > self._copy.version:
            self._copy.refresh()
        names = askers[0].questions
        together = {name: _beside([asker.questions[name] for asker in askers]) for name in names}
        noise, state = together.pop("noise"), {name: together.pop(name) for name in self._layout.states}
        action, outputs, state = self._copy.act(together, state, noise)
        whole = {"action": action, **outputs, **state}
        num_envs = len(noise) // len(askers)
        for place, asker in enumerate(askers):
            rows = slice(place * num_envs, (place + 1) * num_envs)
            try:
                asker.answer({name: array[rows] for name, array in whole.items()}, self._copy.version)
            except EOFError:
                self._forget(asker)

    def _forget(self, asker: _Asker) -> None:
        asker.close()
        if self._askers.get(asker.actor) is asker:
            del self._askers[asker.actor]


def _beside(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
