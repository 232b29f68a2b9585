"""A node that says what no node says is given up, and what it says of slots that are not leased to it is not heard."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from faults.decoders import LEARNER, NodeSays, learner_words, node_messages, true_fault
from rollout_fakes import RUN_ID, write_rollout
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, to_json
from shoal.engines.ray_link import NodeLink
from shoal.engines.ray_node import ACTIVITY
from shoal.engines.ray_words import Frame, Kind, decode
from shoal.experience.envelope import Identity
from shoal.experience.ring import allocate
from shoal.experience.wire import pack
from shoal.supervision.heartbeat import RECORD

IDENTITY = Identity(0, 3, 1)
FAULT = true_fault()
CLOCK = (5).to_bytes(8, "little")


@pytest.fixture
def node(tmp_path: Path) -> NodeSays:
    return NodeSays(tmp_path)


def activity(of: int) -> bytes:
    record = np.zeros(1, RECORD)
    record["activity"] = of
    return ACTIVITY.pack(0, b"S") + record.tobytes()


def fault(**report: object) -> Frame:
    """An actor's fault, with a report that differs so from a true one."""
    return word(Told.FAULT, {**FAULT, "report": {**FAULT["report"], **report}})


def word(kind: Told, body: object, value: int = 0) -> Frame:
    return Frame(Kind.WORD, head=Word(kind, value=value, body=json.dumps(body).encode()).encode())


def nested(levels: int) -> list[object]:
    return [nested(levels - 1)] if levels else []


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.WORD, head=b"\0"),
        Frame(Kind.WORD, head=Word(Told.LEASE).encode()),
        Frame(Kind.WORD, head=Word(Told.RESTORED).encode()),
        Frame(Kind.WORD, head=Word(Told.FAULT).encode()),
        word(Told.RESTORED, {"seconds": "1"}),
        word(Told.RESTORED, {"seconds": float("nan")}),
        word(Told.RESTORED, {"seconds": 10**400}),
        word(Told.RESTORED, {"seconds": -1.0}),
        word(Told.RESTORED, {"seconds": 1.0}, value=3),
        word(Told.RESTORED, {"seconds": 1.0}, value=-1),
        word(Told.FAULT, []),
        word(Told.FAULT, {"error": "EnvironmentFault", "message": "no", "traceback": ""}),
        word(Told.FAULT, {**FAULT, "report": None}),
        word(Told.FAULT, {**FAULT, "error": 1}),
        word(Told.FAULT, {**FAULT, "message": ""}),
        word(Told.FAULT, {**FAULT, "message": "\n  traceback:"}),
        word(Told.FAULT, {**FAULT, "message": "x" * 200_000}),
        fault(env=2),
        fault(env=-1),
        fault(env=None),
        fault(env=True),
        fault(env="one"),
        fault(row=6),
        fault(step="9" * 4000),
        fault(seed=0.5),
        fault(paced=[1]),
        fault(paced=None),
        fault(paced=[1, "x"]),
        fault(snippet="/etc/passwd"),
        fault(last_action=nested(70)),
        Frame(Kind.HAPPENED, head=to_json({"is": "lost", "reason": "x" * 200_000})),
        Frame(Kind.HAPPENED, head=to_json({"is": "lost", "reason": "", "more": nested(450)})),
        Frame(Kind.SAID, LEARNER, head=to_json({**learner_words()[3], "report": {"env": 99}})),
        Frame(Kind.HAPPENED, head=b"no JSON"),
        Frame(Kind.HAPPENED, head=b"[]"),
        Frame(Kind.HAPPENED, head=b"{}"),
        Frame(Kind.HAPPENED, head=to_json({"is": "lost", "reason": 1})),
        Frame(Kind.HAPPENED, head=to_json({"is": "forked"})),
        Frame(Kind.HAPPENED, head=to_json({"is": "forked", "pid": "7"})),
        Frame(Kind.HAPPENED, head=to_json({"is": "exited", "pid": 7, "status": 10**20, "error": ""})),
        Frame(Kind.HAPPENED, head=to_json({"is": "exited", "pid": 7, "status": None, "error": None})),
        Frame(Kind.PARTIAL, head=b"\0", body=b"x"),
        Frame(Kind.WORD, head=b"\0", body=b"x"),
        Frame(Kind.WORD, head=b"\xff" * 32, body=b"x"),
        Frame(Kind.WORD, LEARNER, head=Word(Told.FILLED).encode()),
        Frame(Kind.SAID, head=to_json({"is": "ready", "version": 3})),
        Frame(Kind.SAID, LEARNER, head=b"no JSON"),
        Frame(Kind.SAID, LEARNER, head=to_json({"is": "ready", "version": "3"})),
        Frame(Kind.SAID, LEARNER, head=to_json({"is": "trained", "version": 3, "metrics": {}, "dropped": []})),
        Frame(Kind.SAID, LEARNER, head=to_json({"is": "consumed", "dropped": []})),
        Frame(Kind.SAID, LEARNER, head=to_json({"is": "saved", "weights_sha256": "00"})),
        Frame(Kind.SAID, LEARNER, head=to_json({"is": "failed", "error": "LearnersError", "message": "no"})),
        Frame(Kind.ACTIVITIES),
        Frame(Kind.ACTIVITIES, head=(-(2**63)).to_bytes(8, "little", signed=True)),
        Frame(Kind.ACTIVITIES, head=CLOCK, body=activity(0)[:-1]),
        Frame(Kind.ACTIVITIES, head=CLOCK, body=activity(999)),
    ],
)
def test_a_frame_that_cannot_be_read_costs_the_node_and_nothing_else(frame: Frame, node: NodeSays) -> None:
    process = node.hear([frame])
    assert node.lost.startswith(f"it said what no node says ({frame.kind.name}: ")
    assert node.told == ["node_lost"]
    assert [death.process for death in node.fleet._hearing.events] == [process, node.learner]


def test_a_word_that_no_actor_says_costs_only_the_actor_where_it_is_one_of_this_machine(node: NodeSays) -> None:
    """As its memory is not what it was."""
    for frame in (word(Told.RESTORED, None), fault(env=2)):
        process = node.hear([])
        process.channel.said.append(frame.head)  # type: ignore[union-attr]
        node.heed(process)
        assert process.doomed.startswith("sent what is no message (")
        assert not node.lost


def test_what_a_node_truly_says_is_heard(node: NodeSays) -> None:
    for message in node_messages():
        node.hear(list(decode(message)))
        assert not node.lost


def test_what_a_learner_on_a_node_says_is_heard_as_it_is(node: NodeSays) -> None:
    words = [to_json(said) for said in learner_words()]
    actor = node.hear([Frame(Kind.SAID, LEARNER, head=word) for word in words])
    assert list(node.learner.channel.said) == words  # type: ignore[union-attr]
    assert not actor.channel.said  # type: ignore[union-attr]


def test_what_a_learner_does_and_writes_is_kept_as_its_own(node: NodeSays, tmp_path: Path) -> None:
    doing = ACTIVITY.pack(LEARNER, b"T") + activity(0)[ACTIVITY.size :]
    log = Frame(Kind.LOG, LEARNER, body=b"a line\n")
    exited = Frame(Kind.HAPPENED, LEARNER, head=to_json({"is": "exited", "pid": 7, "status": 9, "error": ""}))
    node.hear([Frame(Kind.ACTIVITIES, head=CLOCK, body=doing)])
    assert node.fleet.state_of(node.learner) == "T"
    node.hear([log, exited])
    assert node.fleet.state_of(node.learner) is None, "what was seen of it ended with it"
    assert (tmp_path / "logs" / "learner-1.log").read_bytes() == b"a line\n"
    (death,) = node.fleet._hearing.events
    assert death.process is node.learner  # type: ignore[union-attr]
    assert node.told == []


class Other(NodeLink):
    """A link to another node, that says these frames."""

    def __init__(self, frames: list[Frame]) -> None:
        self.name, self.lost, self._frames = "other", "", frames

    def take(self) -> list[Frame]:
        return self._frames


def test_what_is_said_of_a_learner_by_another_node_or_of_one_before_it_is_not_heard(node: NodeSays) -> None:
    def frames(incarnation: int) -> list[Frame]:
        exited = to_json({"is": "exited", "pid": 7, "status": 9, "error": ""})
        return [
            Frame(Kind.SAID, LEARNER, incarnation, to_json(learner_words()[0])),
            Frame(Kind.LOG, LEARNER, incarnation, body=b"a line\n"),
            Frame(Kind.HAPPENED, LEARNER, incarnation, exited),
        ]

    doing = Frame(Kind.ACTIVITIES, head=CLOCK, body=ACTIVITY.pack(LEARNER, b"T") + activity(0)[ACTIVITY.size :])
    node.hear(frames(incarnation=1))
    other = Other([*frames(incarnation=0), doing])
    node.fleet._hearing.take_in(other)
    assert not node.learner.channel.said  # type: ignore[union-attr]
    assert (node.fleet._hearing.events, node.fleet._hearing.states, node.fleet._hearing._logs) == ([], {}, {})
    assert (other.lost, node.lost, node.told) == ("", "", [])


def part(node: NodeSays, identity: Identity = IDENTITY, run: bytes = RUN_ID, slot: int = 1) -> Frame:
    there = write_rollout(allocate(node.ring.schema, 1).slots[0], identity, num_rows=2)
    there.envelope["run_id"] = np.void(run)
    return Frame(Kind.PARTIAL, head=slot.to_bytes(4, "little"), body=pack(there))


def test_a_part_of_what_is_leased_is_taken(node: NodeSays) -> None:
    node.hear([part(node)], (1, IDENTITY))
    assert node.ring.slots[1].identity == IDENTITY
    assert node.ring.slots[1].arrays["valid"].sum() == 4
    assert node.told == []


@pytest.mark.parametrize("lease", [None, (0, IDENTITY)])
def test_a_part_of_a_slot_that_is_not_leased_is_not_heard(lease: tuple[int, Identity] | None, node: NodeSays) -> None:
    for slot in (1, 2, 2**32 - 1):
        node.hear([part(node, slot=slot)], lease)
        assert not node.lost
    assert not node.ring._buffer.any()


def test_a_part_of_another_run_or_attempt_is_told_and_not_taken(node: NodeSays) -> None:
    for frame in (part(node, run=bytes(16)), part(node, Identity(0, 3, 2)), part(node, Identity(1, 3, 1))):
        node.hear([frame], (1, IDENTITY))
        assert not node.ring._buffer.any()
    assert node.told == ["warning"] * 3


def test_a_slot_that_was_leased_to_another_actor_since_is_not_the_first_ones(node: NodeSays) -> None:
    first = node.hear([], (1, IDENTITY))
    second = node.hear([], (1, Identity(0, 3, 2)))
    assert not node.fleet._hearing.is_leased(first, 1, IDENTITY)
    assert not node.fleet._hearing.is_leased(second, 1, IDENTITY)
    assert node.fleet._hearing.is_leased(second, 1, Identity(0, 3, 2))


def test_only_rollouts_of_what_is_leased_are_kept_until_their_word_is_heard(node: NodeSays) -> None:
    def filled(slot: int, identity: Identity) -> Frame:
        return Frame(Kind.WORD, head=Word(Told.FILLED, slot, identity).encode(), body=b"a rollout")

    node.hear([filled(slot, IDENTITY) for slot in range(100) if slot != 1] + [filled(1, Identity(0, 3, 2))], (1, IDENTITY))
    assert not node.fleet._hearing.arrived
    node.hear([filled(1, IDENTITY)], (1, IDENTITY))
    assert node.fleet._hearing.arrived == {1: (IDENTITY, b"a rollout")}


def test_times_of_a_rollout_lie_within_the_run_whatever_its_node_says(node: NodeSays) -> None:
    there = write_rollout(allocate(node.ring.schema, 1).slots[0], IDENTITY)
    for begun_ns, finished_ns in ((-(2**63), 2**63 - 1), (2**63 - 1, -(2**63))):
        there.envelope["begun_ns"], there.envelope["finished_ns"] = begun_ns, finished_ns
        told = Word(Told.FILLED, 1, IDENTITY)
        before = time.monotonic_ns()
        process = node.hear([Frame(Kind.ACTIVITIES, head=CLOCK), Frame(Kind.WORD, head=told.encode(), body=pack(there))], (1, IDENTITY))
        node.fleet.collect(process, told, 0)
        kept = [int(node.ring.slots[1].envelope[name]) for name in ("begun_ns", "finished_ns")]
        assert min(kept) == node.fleet._hearing._since_ns
        assert before <= max(kept) <= time.monotonic_ns()
