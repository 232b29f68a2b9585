"""Learners that lodge on nodes, as the fleet and the supervisor see them: no process is started, and a node is what was posted to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_fakes import RUN_ID, scripted_schema, write_rollout
from shoal.config import EnvConfig, RayConfig, RunConfig
from shoal.engines.fleet import STOP_SECONDS, tell
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, from_json, to_json
from shoal.engines.process import Process
from shoal.engines.ray_cluster import ClusterNode
from shoal.engines.ray_fleet import RayFleet
from shoal.engines.ray_learners import END_LEARNER_SECONDS, Spread
from shoal.engines.ray_words import Frame, Kind, number_of
from shoal.engines.traffic import Counted, Traffic
from shoal.errors import ConfigError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring, allocate
from shoal.experience.wire import unpack

ELSEWHERE: Any = object()  # a node that has no learner
FIRST, SECOND = Identity(0, 0, 0), Identity(1, 0, 0)


class Posted:
    """A link to a node, which keeps what it is to be told."""

    def __init__(self, name: str) -> None:
        self.name, self.own, self.lost, self.node = name, name == "here", "", self
        self.traffic = Traffic(self.name, Counted(), Counted(), 0)
        self.frames: list[Frame] = []
        self.left = False

    def post(self, frame: Frame) -> None:
        self.frames.append(frame)

    def take(self) -> list[Frame]:
        return []

    def flush(self) -> None: ...
    def close(self) -> None: ...
    def end(self) -> None: ...
    def leave(self) -> None:
        self.left = True

    def kinds(self) -> list[Kind]:
        return [frame.kind for frame in self.frames]


def config(learners: int = 2, **settings: Any) -> RunConfig:
    return RunConfig(env=EnvConfig(id="x"), engine="ray", learners=learners, ray=RayConfig(learners_on="nodes"), **settings)


def filled(index: int, identity: Identity) -> Word:
    return Word(Told.FILLED, index, identity)


def train(*rollouts: tuple[int, Identity]) -> bytes:
    return to_json({"do": "train", "rollouts": [[slot, list(identity)] for slot, identity in rollouts], "optimizer_steps": 0})


@pytest.fixture
def ring() -> Ring:
    """Of two rollouts that are whole."""
    ring = allocate(scripted_schema(4, 2), 2)
    for slot, identity in zip(ring.slots, (FIRST, SECOND), strict=True):
        write_rollout(slot, identity)
    return ring


@pytest.fixture
def lodger(ring: Ring) -> tuple[Spread, Process, Posted]:
    """The second of two learners, which is up on a node."""
    learners, node = [Process("learner", index) for index in range(2)], Posted("a")
    spread, link = Spread(config(), learners, {}), _link(node)
    spread.ring, spread.here, spread.places[link] = ring, ("here", "127.0.0.1"), ("a", "127.0.0.2")
    os.close(spread.begin([link]))
    learners[1].channel = spread.channel(learners[1], link)
    return spread, learners[1], node


def _link(node: Posted) -> Any:
    return node


# ---- rollouts -------------------------------------------------------------------------------------------------------------------
def test_a_rollout_goes_to_a_learner_as_it_comes_in_and_the_others_before_the_order_that_names_them(
    lodger: tuple[Spread, Process, Posted], ring: Ring
) -> None:
    spread, learner, node = lodger
    spread.bring(filled(0, FIRST), ELSEWHERE)
    assert node.kinds() == [Kind.ROLLOUT]
    tell(learner, train((0, FIRST), (1, SECOND)))
    assert node.kinds() == [Kind.ROLLOUT, Kind.ROLLOUT, Kind.ORDER]
    there = allocate(ring.schema, 2)
    for frame, identity in zip(node.frames, (FIRST, SECOND), strict=False):
        word = Word.decode(frame.head)
        unpack(frame.body, there.slots[word.slot], RUN_ID, word.identity, word.value)
        assert (there.slots[word.slot].identity, word.identity) == (identity, identity)
    order = node.frames[-1]
    assert (order.index, order.incarnation, order.head) == (number_of("learner", 1), 0, train((0, FIRST), (1, SECOND)))


def test_another_rollout_in_the_same_slot_is_brought_and_so_is_the_same_one_to_learners_that_begin_anew(
    lodger: tuple[Spread, Process, Posted], ring: Ring
) -> None:
    spread, learner, node = lodger
    spread.bring(filled(0, FIRST), ELSEWHERE)
    again = FIRST._replace(attempt=1)
    write_rollout(ring.slots[0], again)
    spread.bring(filled(0, again), ELSEWHERE)
    spread.bring(filled(0, again), ELSEWHERE)
    assert [Word.decode(frame.head).identity for frame in node.frames] == [FIRST, again]
    os.close(spread.begin([_link(node)]))
    tell(learner, train((0, again)))
    assert node.kinds()[2:] == [Kind.ROLLOUT, Kind.ORDER]


def test_nothing_is_brought_to_a_learner_that_is_not_up_and_an_order_to_save_brings_nothing(
    lodger: tuple[Spread, Process, Posted],
) -> None:
    spread, learner, node = lodger
    tell(learner, to_json({"do": "save", "path": "x", "previous": None}))
    assert node.kinds() == [Kind.ORDER]
    learner.ended()
    spread.bring(filled(0, FIRST), ELSEWHERE)
    assert node.kinds() == [Kind.ORDER]


def test_a_node_that_is_lost_is_told_nothing(lodger: tuple[Spread, Process, Posted]) -> None:
    _, learner, node = lodger
    node.lost = "it is gone"
    tell(learner, train((0, FIRST)))
    assert node.frames == []


# ---- where they live ------------------------------------------------------------------------------------------------------------
def test_whoever_begins_again_with_fewer_nodes_is_here(lodger: tuple[Spread, Process, Posted]) -> None:
    spread, learner, node = lodger
    assert (spread.lodged(), learner.node) == ([(learner, node)], "a")
    os.close(spread.begin([]))
    assert (spread.lodged(), learner.node) == ([], "")
    assert spread.meeting_of(learner)["own"] == "127.0.0.1"


# ---- the fleet ------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[RayFleet, Posted]]:
    """A fleet with one node besides the driver's machine, where nobody lives yet."""
    made, node, here = (
        RayFleet(config(device="auto"), None, tmp_path, RUN_ID, "traces", lambda kind, **facts: None),
        Posted("a"),
        Posted("here"),
    )
    made._spread.here, made._spread.device, made._spread.ring = ("here", "127.0.0.1"), "cuda", allocate(scripted_schema(4, 2), 2)
    made._spread.places |= {_link(here): ("here", "127.0.0.1"), _link(node): ("a", "127.0.0.2")}
    made._spread.with_gpu.add(_link(node))
    made._nodes.links |= {"here": _link(here), "a": _link(node)}
    zygote: Any = SimpleNamespace(receive=list, close=lambda: None)
    made._zygote = zygote
    yield made, node
    made.close()


def begun(fleet: RayFleet) -> Process:
    """The second learner, started on the node."""
    learner = fleet.learners[1]
    fleet.start(learner, {"kept": None})
    return learner


def test_a_learner_is_started_on_its_node_with_the_device_of_all_and_where_to_meet(fleet: tuple[RayFleet, Posted]) -> None:
    made, node = fleet
    learner = begun(made)
    (start,) = node.frames
    assert (start.kind, start.index, start.incarnation) == (Kind.START, number_of("learner", 1), 0)
    setup = from_json(start.body)
    assert (setup["config"]["device"], made._config.device) == ("cuda", "auto")
    assert (setup["meeting"]["address"], setup["meeting"]["own"], setup["traces"]) == ("127.0.0.1", "127.0.0.2", "")
    assert (learner.up, learner.node) == (True, "a")
    (listening,) = made._meeting
    assert made._spread._port == setup["meeting"]["port"]
    assert os.readlink(f"/proc/self/fd/{listening}").startswith("socket:")


def test_those_that_begin_while_another_is_up_meet_at_the_same_place(fleet: tuple[RayFleet, Posted]) -> None:
    made, node = fleet
    learner = begun(made)
    before = list(made._meeting)
    made.start(learner, {"kept": None})
    ports = [from_json(frame.body)["meeting"]["port"] for frame in node.frames]
    assert (made._meeting, ports[0]) == (before, ports[1])


def test_the_node_of_a_learner_is_not_left_though_no_actor_lives_there(fleet: tuple[RayFleet, Posted]) -> None:
    made, node = fleet
    begun(made)
    made._nodes._leave(time.monotonic())
    assert (list(made._nodes.links), node.left) == (["a"], False)


def test_a_learner_whose_node_is_to_be_taken_away_is_told_to_end(fleet: tuple[RayFleet, Posted]) -> None:
    made, node = fleet
    learner = begun(made)
    made.notice(_link(node), "SIGTERM")
    made._nodes._leave(time.monotonic())
    assert learner.doomed == "its node is taken away: SIGTERM"
    assert node.kinds() == [Kind.START, Kind.KILL]


def test_a_node_that_does_not_end_its_learner_is_given_up_before_the_supervisor_would_be(fleet: tuple[RayFleet, Posted]) -> None:
    made, _ = fleet
    learner = begun(made)
    made.kill(learner, "another learner is lost")
    assert END_LEARNER_SECONDS < STOP_SECONDS
    learner.doomed_at -= END_LEARNER_SECONDS + 0.1
    made._hearing.died = lambda process, exited: made._hearing.events.append(SimpleNamespace(process=process, how=exited.describe()))  # type: ignore[method-assign,assignment,arg-type,return-value]
    (death,) = made.happened()
    assert death.process is learner  # type: ignore[union-attr]
    assert "has not ended its learner" in death.how  # type: ignore[union-attr]
    assert list(made._nodes.links) == ["here"]


# ---- GPUs of nodes -----------------------------------------------------------------------------------------------------------
def spread_on(gpus: dict[str, float], *, learners: int = 3, device: str = "cuda") -> tuple[Spread, dict[str, Any]]:
    """A run whose driver's machine is the node `own`, and the links to these nodes, each taken in with those before it."""
    spread, links = Spread(config(), [Process("learner", index) for index in range(learners)], {}), dict[str, Any]()
    spread.here, spread.device = ("own", "127.0.0.1"), device
    for name, count in gpus.items():
        link = _link(Posted(name))
        if spread.uses_gpu(ClusterNode(name, name, 4.0, gpus=count), links.values()):
            spread.with_gpu.add(link)
        spread.places[link], links[name] = (name, "127.0.0.2"), link
    return spread, links


@pytest.mark.parametrize(
    ("gpus", "device", "with_gpu", "fit"),
    [
        ({"a": 4.0, "b": 0.0, "c": 1.0, "d": 1.0, "own": 1.0}, "cuda", ["a", "c", "own"], ["a", "c"]),
        ({"own": 0.0, "a": 0.0, "b": 0.9, "c": 1.0, "d": 1.0}, "cuda", ["c", "d"], ["c", "d"]),
        ({"own": 1.0, "a": 1.0, "b": 1.0}, "cpu", [], ["a", "b"]),
    ],
    ids=["more than learners", "the driver's has none", "cpu"],
)
def test_as_many_nodes_give_a_gpu_as_have_learners(gpus: dict[str, float], device: str, with_gpu: list[str], fit: list[str]) -> None:
    spread, links = spread_on(gpus, device=device)
    assert sorted(link.name for link in spread.with_gpu) == with_gpu
    assert [link.name for link in spread.fit(links.values())] == fit


def test_a_node_that_comes_gives_a_gpu_where_one_that_gave_its_own_is_gone() -> None:
    spread, links = spread_on({"a": 1.0, "b": 1.0, "c": 1.0})
    newcomer = ClusterNode("d", "d", 4.0, gpus=1.0)
    assert not spread.uses_gpu(newcomer, links.values())
    stayed = [link for name, link in links.items() if name != "a"]
    assert spread.uses_gpu(newcomer, stayed)
    assert [link.name for link in spread.fit(stayed)] == ["b"], "c was started without, and a learner would see none there"


def test_too_few_gpus_are_told_with_what_would_do() -> None:
    nodes = [ClusterNode(name, name, 4.0, gpus=count) for name, count in {"own": 1.0, "a": 1.0, "b": 0.0, "c": 0.0}.items()]
    spread, _ = spread_on({}, learners=4)
    with pytest.raises(ConfigError, match=r"none to give on b, c, and 1 other nodes have one; .*or give --learners 2, --device cpu or"):
        spread.check_gpus(nodes)
    spread_on({}, learners=2)[0].check_gpus(nodes)
    spread_on({}, learners=4, device="cpu")[0].check_gpus(nodes)
    spread.check_gpus(nodes[:2])  # too few nodes are another matter (check_learners)
