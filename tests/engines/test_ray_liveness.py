"""Nodes that do not confirm what they are told, helper processes of nodes that are stopped or do nothing, and nodes whose own thread stands still.

None of them lets a run wait for ever, ends it, or changes its bits. The nodes are in this process, as in test_ray_fleet.py; their helper processes are real.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_ray_fleet
from test_ray_fleet import ClusterHere, NodeHere, at, events

from shoal.cli.control import tell_run
from shoal.engines import ending, fleet, ray_node
from shoal.engines.fleet import Fleet
from shoal.engines.process import Death, Process
from shoal.engines.ray_fleet import RayFleet
from shoal.engines.ray_node import Node
from shoal.engines.ray_words import Kind, decode
from shoal.engines.traffic import Counted, Traffic
from shoal.errors import ConfigError, ProcessError
from shoal.files import load_checkpoint
from shoal.supervision.zygote import Exited, Zygote

WAIT_SECONDS = 120.0
run_on, expected = test_ray_fleet.run_on, test_ray_fleet.expected


class Behind(NodeHere):
    """A node behind a link on which the weights that are the fifth to go there are under way until the test ends; once."""

    under_way, over = threading.Event(), threading.Event()
    said = 0

    def say(self, message: bytes) -> None:
        Behind.said += sum(frame.kind is Kind.WEIGHTS for frame in decode(message))
        if Behind.said == 5:
            Behind.said += 1
            self.under_way.set()
            self.over.wait(WAIT_SECONDS)
        super().say(message)


@pytest.fixture
def behind() -> Iterator[ClusterHere]:
    """Two nodes, the second one `Behind`."""
    cluster = ClusterHere(["a", "b"])
    cluster.kinds["b"] = Behind
    Behind.under_way, Behind.over, Behind.said = threading.Event(), threading.Event(), 0
    yield cluster
    assert Behind.under_way.is_set()
    Behind.over.set()


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    """Do this once weights are under way to the node behind its link."""

    def wait() -> None:
        if Behind.under_way.wait(WAIT_SECONDS):
            time.sleep(0.5)
            act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


# ---- what a node does not confirm -----------------------------------------------------------------------------------------------
def test_a_run_that_goes_back_while_a_node_confirms_nothing_goes_on_without_it(
    behind: ClusterHere,
    run_on: Any,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "STOP_SECONDS", 2.0)

    def kill() -> None:
        processes = tell_run(tmp_path / "run0", "stalls")["stalls"]["processes"]
        os.kill(next(each["pid"] for each in processes if each["name"] == "learner-0"), signal.SIGKILL)

    thread = meanwhile(kill)
    run = run_on(behind)
    thread.join()
    assert run.result["weights_sha256"] == expected
    assert [event["role"] for event in events(run, "died")] == ["learner"]
    (lost,) = events(run, "node_lost")
    assert lost["node"] == "b"
    assert "it has not ended its processes within 2." in lost["reason"]


def test_a_run_that_is_to_end_while_weights_are_on_their_way_ends_with_a_checkpoint_in_seconds(
    behind: ClusterHere,
    run_on: Any,
    tmp_path: Path,
) -> None:
    wanted: list[float] = []

    def stop() -> None:
        tell_run(tmp_path / "run0", "stop")
        wanted.append(time.monotonic())

    thread = meanwhile(stop)
    run = run_on(behind, evaluation={"episodes": 0})
    seconds = time.monotonic() - wanted[0]
    thread.join()
    assert run.result["reason"] == "interrupted"
    assert seconds < 8.0  # three, on a machine that has nothing else to do
    newest = max((run.path / "checkpoints").glob("update-*"))
    assert load_checkpoint(newest).update == run.result["updates"] > 0
    ledger = run.result["ledger"]
    assert ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values())
    assert [(event["node"], event["reason"][:33]) for event in events(run, "node_lost")] == [("b", "it has not ended its processes wi")]


class Deaf:
    """A link to a node that says nothing."""

    def __init__(self) -> None:
        self.name, self.own, self.lost, self.node, self.delivery = "a", False, "", self, None
        self.traffic = Traffic(self.name, Counted(), Counted(), 0)
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def take(self) -> list[Any]:
        return []

    def post(self, frame: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def end(self) -> None: ...


@pytest.fixture
def deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RayFleet, Process]:
    """A fleet with an actor on a node that says nothing."""
    from rollout_fakes import RUN_ID
    from shoal.config import EnvConfig, RunConfig

    made = RayFleet(RunConfig(env=EnvConfig(id="x"), engine="ray"), None, tmp_path, RUN_ID, "", lambda kind, **facts: None)
    link: Any = Deaf()
    zygote: Any = SimpleNamespace(receive=list, wake=lambda: False, fileno=link.fileno, kill=lambda pid: None, close=lambda: None)
    made._zygote, made.actors = zygote, [Process("actor", 0, node="a")]
    made._nodes.links["a"] = made._nodes.homes[0] = link

    def died(process: Process, exited: Exited) -> None:
        record: Any = None
        made._hearing.events.append(Death(process, exited.describe(), process.doomed, False, record))

    monkeypatch.setattr(made._hearing, "died", died)
    made.start(made.actors[0], {})
    return made, made.actors[0]


def test_nodes_are_given_up_where_all_are_to_end_and_a_process_of_this_machine_is_an_error_still(deaf: tuple[RayFleet, Process]) -> None:
    made, actor = deaf
    made.kill(actor, "all are to end")
    assert made.wait_for_ends(time.monotonic() + 0.2, strict=True) is None
    assert not actor.up
    assert made._nodes.links == {}
    stuck: Any = SimpleNamespace(fileno=lambda: -1, close=lambda: None)
    made.learner.channel, made.learner.pid, made.learner.doomed = stuck, os.getpid(), "all are to end"
    with pytest.raises(ProcessError, match="uninterruptible sleep"):
        made.wait_for_ends(time.monotonic() + 0.2, strict=True)


def test_a_node_where_nobody_was_told_to_end_is_not_given_up(deaf: tuple[RayFleet, Process]) -> None:
    made, _ = deaf
    assert not made.give_up_nodes()
    assert list(made._nodes.links) == ["a"]
    assert not Fleet.give_up_nodes(made)


def test_a_node_that_does_not_end_its_learner_is_given_up_though_nobody_else_says_anything(
    deaf: tuple[RayFleet, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, actor = deaf
    learner = Process("learner", 1, channel=actor.channel, doomed="it hangs", doomed_at=time.monotonic())
    monkeypatch.setattr(made._spread, "lodged", lambda: [(learner, made._nodes.homes[0])])
    made.listen(0.0)
    assert list(made._nodes.links) == ["a"]
    learner.doomed_at -= 6.0
    assert made._zygote in made.listen(0.0), "it is to be asked who died"
    assert [event.process for event in made.happened() if isinstance(event, Death)] == [actor, learner]


@pytest.mark.parametrize(
    ("wanted_since", "learners_on", "seconds"),
    [(1.0, "", 3.0), (1.0, "b", 11.5), (0.0, "", 11.5)],
    ids=["somebody wants the end", "with a learner on a node", "a stop condition"],
)
def test_nodes_are_given_up_sooner_where_somebody_waits_and_no_update_is_lost_by_it(
    wanted_since: float, learners_on: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, given_up = [0.0], list[float]()
    monkeypatch.setattr(ending, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    channel: Any = SimpleNamespace(send_with_fds=lambda message, fds: True, close=lambda: None)
    actor = Process("actor", 0, channel=channel, node="a")

    def give_up() -> bool:
        given_up.append(clock[0])
        return node_is_there

    def attend() -> None:
        clock[0] += 0.25
        if given_up:
            actor.ended()

    house: Any = SimpleNamespace(
        actors=[actor], learners=[Process("learner", 0), Process("learner", 1, node=learners_on)], give_up_nodes=give_up
    )
    engine: Any = SimpleNamespace(ends=True, attend=attend, kill=lambda process, why: None)
    session: Any = SimpleNamespace(coordinator=None)
    node_is_there = True
    ending.Ending(session, house, engine, engine)._end_actors(wanted_since)
    assert given_up == [seconds + 0.25]
    node_is_there, clock[0], actor.channel = False, 0.0, channel  # it is a process of this machine
    engine.attend = lambda: clock.__setitem__(0, clock[0] + 0.25)
    with pytest.raises(ProcessError, match="uninterruptible sleep"):
        ending.Ending(session, house, engine, engine)._end_actors(wanted_since)
    assert clock[0] == 11.75


def test_actors_that_were_made_anew_are_not_ended_however_long_the_way_back_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner was lost while the run ended."""
    clock, killed = [0.0], list[Process]()
    monkeypatch.setattr(ending, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    channel: Any = SimpleNamespace(send_with_fds=lambda message, fds: True)
    house: Any = SimpleNamespace(
        actors=[Process("actor", 0, channel=channel)], learners=[Process("learner", 0)], give_up_nodes=lambda: False
    )
    engine: Any = SimpleNamespace(ends=True, kill=lambda process, why: killed.append(process))

    def go_back() -> None:
        clock[0], engine.ends = 20.0, False

    engine.attend = go_back
    ending.Ending(SimpleNamespace(coordinator=None), house, engine, engine)._end_actors(1.0)  # type: ignore[arg-type]
    assert killed == []


# ---- a node's helper process, and its own thread -----------------------------------------------------------------------------------
def stop_helper_and_kill_actor(cluster: ClusterHere, name: str) -> None:
    node = cluster.here[name]._node
    os.kill(node._zygote.pid, signal.SIGSTOP)
    os.kill(next(actor.pid for actor in node._actors.values() if actor.pid), signal.SIGKILL)


def test_a_helper_of_a_node_that_is_stopped_is_woken_and_the_actor_that_died_meanwhile_made_anew(run_on: Any, expected: str) -> None:
    cluster = ClusterHere(["a", "b"])
    run = run_on(cluster, callbacks=[at(5, lambda: stop_helper_and_kill_actor(cluster, "b"))])
    assert run.result["weights_sha256"] == expected
    (died,) = events(run, "died")
    assert (died["role"], died["how"]) == ("actor", "killed by SIGKILL")
    assert events(run, "node_lost") == []


def test_a_helper_of_a_node_that_does_not_do_its_work_is_killed_and_another_one_takes_its_place(
    run_on: Any,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_node, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(Zygote, "wake", lambda self: False)  # one that is busy for ever is not stopped
    cluster = ClusterHere(["a", "b"])
    doomed: list[int] = []

    def stop() -> None:
        node = cluster.here["b"]._node
        os.kill(node._zygote.pid, signal.SIGSTOP)
        actor = next(actor for actor in node._actors.values() if actor.pid)
        doomed.append(actor.pid)
        os.kill(actor.pid, signal.SIGSTOP)  # the driver sees that, and has it killed

    run = run_on(cluster, callbacks=[at(5, stop)])
    assert run.result["weights_sha256"] == expected
    assert [event["reason"] for event in events(run, "killed")] == ["was stopped"]
    (said,) = [event["message"] for event in events(run, "warning") if "helper" in event["message"]]
    assert "node b: it did not answer within 1 s; the helper process" in said
    assert "was killed by SIGKILL; it is started again" in said
    assert events(run, "node_lost") == []


def test_a_helper_that_imports_still_is_given_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up: list[float] = []
    zygote = SimpleNamespace(wake=lambda: False, give_up=lambda: given_up.append(1.0))
    actor = SimpleNamespace(up=True, pid=0, doomed="", asked_at=100.0, doomed_at=0.0)
    node: Any = SimpleNamespace(_zygote=zygote, _actors={0: actor}, _patient_until=400.0, _given_up="")
    Node._watch_zygote(node, 405.0)
    assert given_up == []
    Node._watch_zygote(node, 411.0)
    assert (given_up, node._given_up) == ([1.0], "it did not answer within 10 s; ")
    actor.pid = 7  # it is there
    Node._watch_zygote(node, 500.0)
    actor.doomed, actor.doomed_at = "told to", 495.0
    Node._watch_zygote(node, 500.0)
    assert len(given_up) == 1
    Node._watch_zygote(node, 506.0)
    assert len(given_up) == 2


def test_a_node_whose_thread_stands_still_is_given_up_and_comes_again(
    run_on: Any,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_node, "MOST_STILL", 3)
    stands, over = threading.Event(), threading.Event()

    class Standing(NodeHere):
        def end(self) -> None:
            over.set()  # SIGKILL, as Ray ends a node, waits for nothing
            super().end()

    serve = Node._serve

    def stand(self: Node) -> None:
        if stands.is_set() and not over.is_set() and self is cluster.here["b"]._node:
            over.wait(WAIT_SECONDS)
        serve(self)

    monkeypatch.setattr(Node, "_serve", stand)
    cluster = ClusterHere(["a", "b"])
    cluster.kinds["b"] = Standing
    run = run_on(cluster, callbacks=[at(5, stands.set)])
    assert run.result["weights_sha256"] == expected
    (lost,) = events(run, "node_lost")
    assert (lost["node"], lost["reason"]) == ("b", "the thread that serves it has stood still for 3 s")


def test_answers_without_a_turn_are_counted_in_a_row_and_from_the_first_turn_on() -> None:
    node: Any = SimpleNamespace(_turns=0, _turns_seen=0, _still=0, _import_error=None)
    told: Any = [object()]

    def answers(count: int, reports: Any = ()) -> None:
        for _ in range(count):
            Node._check_turns(node, reports)

    answers(100)  # it is importing
    node._import_error = ""
    answers(ray_node.MOST_STILL - 1)
    answers(1, told)
    answers(ray_node.MOST_STILL - 1)
    node._turns += 1
    answers(ray_node.MOST_STILL)
    with pytest.raises(RuntimeError, match="stood still for 15 s"):
        answers(1)


def test_a_node_whose_first_helper_cannot_be_started_says_why_and_leaves_nothing(run_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)

    def refuse(self: Node) -> Zygote:
        raise ProcessError("cannot start the helper process: no descriptors")

    monkeypatch.setattr(Node, "_start_zygote", refuse)
    made: list[Node] = []

    class Keeping(NodeHere):
        def __init__(self, setup: bytes, pickled: bytes | None, spoil: Any) -> None:
            super().__init__(setup, pickled, spoil)
            made.append(self._node)

    cluster = ClusterHere(["a"])
    cluster.kinds["a"] = Keeping
    with pytest.raises(ConfigError, match="cannot start the helper process: no descriptors"):
        run_on(cluster)
    (node,) = made
    node._thread.join(WAIT_SECONDS)
    assert raised == []
    assert (node._memory.fd, node._activities.fd) == (-1, -1)
    with pytest.raises(RuntimeError, match="no descriptors"):
        node.hear()
