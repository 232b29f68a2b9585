"""Learners on nodes, without Ray: the nodes are in this process (test_ray_fleet.py), their learners in processes of their own.

What is learned is what as many learners learn beside the driver, whatever becomes of those on nodes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ray_fleet import SETTINGS, ClusterHere, NodeHere, at, events

import shoal
from rollout_fakes import scripted_schema, scripted_spec, write_rollout
from several import several
from shoal.config import RayConfig, RunConfig
from shoal.engines import learner_process, ray_fleet, ray_link
from shoal.engines.fleet import Fleet
from shoal.engines.keeping import hand_over
from shoal.engines.learner_process import LearnerProcess
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, to_json
from shoal.engines.process import Process
from shoal.engines.ray_cluster import ClusterNode
from shoal.engines.ray_learners import END_LEARNER_SECONDS, Spread, check_learners, homes, meeting_place
from shoal.engines.ray_words import Frame, Kind, Parts, decode, encode, is_part, number_of, role_of
from shoal.engines.roles import Blueprint, UserObjects
from shoal.errors import ConfigError, LearnersError, ProcessError
from shoal.experience.envelope import Identity
from shoal.experience.ring import allocate
from shoal.learners.distributed import TorchRanks, meet, network_store
from shoal.settings import resolve
from shoal.supervision.injector import roles_below

LEARNER = number_of("learner", 1)
UPDATES = SETTINGS["stop"]["updates"]


@pytest.fixture
def run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., shoal.Run]:
    """Train with two learners, of which one is on a node of this cluster."""
    numbers = iter(range(100))

    def run(cluster: ClusterHere, **settings: Any) -> shoal.Run:
        monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
        cluster.actors_per_node = 1
        where = {"engine": "ray", "learners": 2, "ray": {"learners_on": "nodes"}}
        return shoal.train("CartPole-v1", run_dir=str(tmp_path / f"run{next(numbers)}"), **{**SETTINGS, **where, **settings})

    return run


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The weights of the local engine, by the number of learners."""
    known: dict[int, str] = {}

    def weights(learners: int) -> str:
        if learners not in known:
            run = shoal.train("CartPole-v1", run_dir=str(tmp_path_factory.mktemp("local") / "run"), actors=2, learners=learners, **SETTINGS)
            known[learners] = str(run.result["weights_sha256"])
        return known[learners]

    return weights


def lives_on(cluster: ClusterHere, rank: int = 1) -> list[str]:
    """Nodes where this learner is now."""
    number = number_of("learner", rank)
    return [name for name in cluster.names if (hosted := cluster.here[name]._node._actors.get(number)) is not None and hosted.up]


def kill_learner(cluster: ClusterHere, number: int = signal.SIGKILL) -> None:
    (name,) = lives_on(cluster)
    os.kill(cluster.here[name]._node._actors[LEARNER].pid, number)


def listens_at(pid: int) -> set[str]:
    """The IPv4 addresses at which a process waits for others to connect."""
    sockets = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists() or fd.is_symlink()}
    found = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:
            found.add(socket.inet_ntoa(bytes.fromhex(local.partition(":")[0])[::-1]))
    return found


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]], ids=len)
def test_learners_on_nodes_learn_the_bits_of_as_many_beside_the_driver(
    names: list[str], run_on: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, seen, meet_at = ClusterHere(names), list[list[str]](), list[set[str]]()
    addresses = [f"127.0.0.{place}" for place in range(2, 2 + len(names))]
    nodes = [ClusterNode(name, name, 1.0, address) for name, address in zip(names, addresses, strict=True)]
    monkeypatch.setattr(cluster, "nodes", lambda: nodes)
    learners = len(names)

    def look() -> None:
        seen.extend(lives_on(cluster, rank) for rank in range(1, learners))
        pids = [cluster.here[name]._node._actors[number_of("learner", rank)].pid for rank, name in enumerate(names[:-1], 1)]
        meet_at.extend(map(listens_at, [roles_below(os.getpid())["learner", 0], *pids]))

    run = run_on(cluster, learners=learners, callbacks=[at(3, look)])
    assert run.result["weights_sha256"] == expected(learners)
    assert seen == [[name] for name in names[: learners - 1]], "one on each node, in their order"
    assert meet_at == [{"127.0.0.1"}, *({address} for address in addresses[:-1])], "each at the address of its machine, and at no other"
    assert run.result["restarts"] == 0
    warnings = [event["message"] for event in events(run, "warning")]
    assert any("neither encrypted nor authenticated" in message for message in warnings)


def test_the_node_of_the_driver_gets_no_other_learner(run_on: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, seen = ClusterHere(["a", "b"]), list[str]()
    monkeypatch.setattr(cluster, "driver", lambda: ("a", "127.0.0.1"))
    run = run_on(cluster, callbacks=[at(3, lambda: seen.extend(lives_on(cluster)))])
    assert (seen, run.result["weights_sha256"]) == (["b"], expected(2))


def nothing_was_lost(run: shoal.Run) -> None:
    assert run.result["ledger"]["dropped"] == {}
    assert events(run, "rolled_back") == []


def test_one_that_is_killed_or_stopped_on_its_node_costs_no_update_and_no_rollout(run_on: Any, expected: Any) -> None:
    cluster = ClusterHere(["a", "b"])
    strikes = [at(3, lambda: kill_learner(cluster)), at(7, lambda: kill_learner(cluster, signal.SIGSTOP))]
    run = run_on(cluster, callbacks=strikes)
    assert run.result["weights_sha256"] == expected(2)
    nothing_was_lost(run)
    assert [(event["role"], event["index"], event["reason"]) for event in events(run, "died")] == [
        ("learner", 1, ""),
        ("learner", 1, "was stopped"),
    ]
    assert [event["index"] for event in events(run, "recovered") if event["role"] == "learner"] == [1, 1]


def test_the_first_that_is_killed_here_is_joined_again_by_the_one_on_a_node(run_on: Any, expected: Any) -> None:
    def kill_first() -> None:
        os.kill(roles_below(os.getpid())["learner", 0], signal.SIGKILL)

    run = run_on(ClusterHere(["a", "b"]), callbacks=[at(5, kill_first)])
    assert run.result["weights_sha256"] == expected(2)
    assert events(run, "rolled_back") == []
    assert {(event["role"], event["index"]) for event in events(run, "died")} == {("learner", 0)}


def test_one_whose_node_is_lost_goes_on_on_another_and_then_beside_the_driver(
    run_on: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, lived = ClusterHere(["a", "b", "c"]), list[list[str]]()
    monkeypatch.setattr(cluster, "driver", lambda: ("c", "127.0.0.1"))

    def pull_its_node() -> None:
        lived.append(lives_on(cluster))
        cluster.pull(lived[-1][0])

    look = at(9, lambda: lived.append(lives_on(cluster)))
    run = run_on(cluster, callbacks=[at(3, pull_its_node), at(6, pull_its_node), look])
    assert lived == [["a"], ["b"], []]
    assert run.result["weights_sha256"] == expected(2)
    assert events(run, "rolled_back") == []
    assert set(run.result["ledger"]["dropped"]) <= {"actor_died"}


def test_one_whose_node_is_to_be_taken_away_moves_before(run_on: Any, tmp_path: Path) -> None:
    cluster, drained = ClusterHere(["a", "b"]), list[int]()

    def go_on(facts: Any) -> bool:
        if facts["update"] == 4:
            cluster.going["a"] = None
        if lives_on(cluster) == ["b"]:
            drained.append(facts["update"])
        return len(drained) < 5

    run = run_on(cluster, stop={"updates": 100_000}, callbacks=[go_on])
    assert len(drained) == 5
    assert events(run, "node_lost") == []
    assert [event["reason"] for event in events(run, "died")] == ["its node is taken away: Ray takes the node away"]
    alone = shoal.train(
        "CartPole-v1",
        run_dir=str(tmp_path / "alone"),
        **{**SETTINGS, "learners": 2, "actors": 2, "stop": {"updates": run.result["updates"]}},
    )
    assert run.result["weights_sha256"] == alone.result["weights_sha256"]
    nothing_was_lost(run)


def test_a_run_with_a_learner_on_a_node_is_resumed_there_and_beside_the_driver(run_on: Any, expected: Any) -> None:
    cluster = ClusterHere(["a", "b"])
    run = run_on(cluster, stop={"updates": 4})
    shoal.resume(run.path, stop={"updates": 8})
    assert LEARNER in cluster.here["a"]._node._actors
    ended = shoal.resume(run.path, stop={"updates": UPDATES}, **{"ray.learners_on": "driver"})
    assert ended.result["weights_sha256"] == expected(2)


def test_an_async_run_with_a_learner_on_a_node_that_is_killed_is_replayed(run_on: Any) -> None:
    cluster = ClusterHere(["a", "b"])
    settings = {
        "algorithm": {"name": "appo", "epochs": 2, "minibatch_size": 64},
        "max_policy_lag": 4,
        "callbacks": [at(5, lambda: kill_learner(cluster))],
    }
    run = run_on(cluster, **settings)
    assert events(run, "rolled_back") == []
    assert shoal.replay(run.path)["equal"] is True


@pytest.mark.parametrize(
    "says",
    [b'{"is": "trained", "version": 9, "metrics": {}}', b'{"is": "saved", "weights_sha256": "00"}', b"[]", b"\xff"],
    ids=["trained", "weights", "a list", "bytes"],
)
def test_a_node_whose_learner_says_what_only_the_first_may_is_given_up(says: bytes, run_on: Any, expected: Any) -> None:
    cluster, spoiled = ClusterHere(["a", "b"]), list[Frame]()

    def spoil(frame: Frame) -> Frame:
        if frame.kind is Kind.SAID and b"saved" in frame.head and not spoiled:
            spoiled.append(frame)
            return Frame(frame.kind, frame.index, frame.incarnation, says)
        return frame

    cluster.spoil = spoil
    run = run_on(cluster)
    (lost,) = events(run, "node_lost")
    assert "it said what no node says" in lost["reason"]
    assert run.result["weights_sha256"] == expected(2)


def test_a_rollout_that_is_changed_on_its_way_to_a_learner_costs_the_node(run_on: Any, expected: Any) -> None:
    spoiled: list[Frame] = []

    class Spoiling(NodeHere):
        def say(self, message: bytes) -> None:
            frames = list(decode(message))
            for place, frame in enumerate(frames):
                if frame.kind is Kind.ROLLOUT and not spoiled:
                    spoiled.append(frame)
                    body = frame.body[:700] + bytes([frame.body[700] ^ 1]) + frame.body[701:]
                    frames[place] = Frame(frame.kind, head=frame.head, body=body)
            super().say(encode(frames))

    cluster = ClusterHere(["a", "b"])
    cluster.kinds["a"] = Spoiling
    run = run_on(cluster)
    assert len(spoiled) == 1
    (lost,) = events(run, "node_lost")
    assert (lost["node"], "SchemaError" in lost["reason"]) == ("a", True)
    assert run.result["weights_sha256"] == expected(2)


def test_a_rollout_goes_once_to_a_learner_elsewhere_in_as_many_parts_as_its_link_takes(
    run_on: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_PART_BYTES", "LEAST_PART_BYTES", "MOST_PART_BYTES"):
        monkeypatch.setattr(ray_link, name, 500)
    told, brought, made = list[bytes](), list[Frame](), set[Identity]()

    class Cutting(NodeHere):
        def __init__(self, *made_of: Any) -> None:
            super().__init__(*made_of)
            self._parts = Parts(sys.maxsize)

        def say(self, message: bytes) -> None:
            told.append(message)
            brought.extend(frame for frame in self._parts.take(message) if frame.kind is Kind.ROLLOUT)
            super().say(message)

        def hear(self) -> bytes:
            message = super().hear()
            made.update(Word.decode(frame.head).identity for frame in decode(message) if frame.kind is Kind.WORD and frame.body)
            return message

    cluster = ClusterHere(["a", "b"])
    cluster.kinds["a"] = Cutting
    run = run_on(cluster)
    assert run.result["weights_sha256"] == expected(2)
    assert run.result["restarts"] == 0
    came = [Word.decode(frame.head).identity for frame in brought]
    assert made, "an actor lives there too"
    assert came, "and one elsewhere"
    assert made.isdisjoint(came), "what was made on a node does not go back there"
    assert len(came) + len(made) == len({*came, *made}) == UPDATES * SETTINGS["sampling"]["groups"]
    assert min(frame.size for frame in brought) > 500
    assert all(is_part(message) for message in told if len(message) > 500)
    assert max(map(len, told)) < 600


# ---- parts --------------------------------------------------------------------------------------------------------------------
def config(**settings: Any) -> RunConfig:
    return RunConfig(engine="ray", learners=3, ray=RayConfig(learners_on="nodes", **settings))


def test_learners_on_nodes_are_refused_where_they_cannot_be() -> None:
    assert len(check_learners(config(), {}, replayed=False, others=2)) == 1
    with pytest.raises(ConfigError, match="besides that machine the run has 1 nodes"):
        check_learners(config(), {}, replayed=False, others=1)
    with pytest.raises(ConfigError, match="keeps it beside its learners"):
        check_learners(config(), {}, replayed=True, others=2)


def test_a_cluster_with_tls_takes_plain_learners_only_where_somebody_said_so() -> None:
    secured = {"RAY_USE_TLS": "1"}
    with pytest.raises(ConfigError, match="--allow-plain-learners on a network that is yours alone"):
        check_learners(config(), secured, replayed=False, others=2)
    (warning,) = check_learners(config(allow_plain_learners=True), secured, replayed=False, others=2)
    assert "can read and change it" in warning


def test_a_run_on_a_cluster_with_tls_ends_with_a_word(run_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(ConfigError, match="this cluster has TLS"):
        run_on(ClusterHere(["a", "b"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learners": 1}, "a single learner is where the command runs"),
        ({"algorithm": "dqn"}, "keeps it beside its learners"),
        ({"engine": "local"}, "give --engine ray with it"),
        ({"ray": {"learners_on": "nodes", "address": "ray://head:10001"}}, "joins by ray://"),
    ],
    ids=["one", "replay", "local", "client"],
)
def test_a_configuration_that_no_cluster_can_fulfil_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    asked = {"engine": "ray", "learners": 2, "ray": {"learners_on": "nodes"}, "stop": {"updates": 1}, **settings}
    with pytest.raises(ConfigError, match=message):
        shoal.train("CartPole-v1", run_dir=str(tmp_path / "run"), preset="none", **asked)


# ---- GPUs, of which none is here: a node's are those that the cluster lists, and the driver's is what it says of its build -------
@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the driver knows, its learner computes on a GPU."""
    look = Fleet.look

    def with_gpu(fleet: Fleet) -> dict[str, Any]:
        facts = look(fleet)
        return {**facts, "build": {**facts["build"], "gpu": "a stand-in"}}

    monkeypatch.setattr(Fleet, "look", with_gpu)


def cluster_with_gpus(gpus: dict[str, float], own: str = "", num_nodes: int | None = None) -> ClusterHere:
    """gpus: of the nodes, by their names."""
    cluster = ClusterHere(list(gpus), num_nodes=num_nodes)
    listed = cluster.nodes
    nodes: Any = lambda: sorted(  # noqa: E731
        (replace(node, gpus=gpus[node.name]) for node in listed()), key=lambda node: cluster.gpus_first and not node.has_gpu
    )
    driver: Any = lambda: (own, "127.0.0.1")  # noqa: E731
    cluster.nodes, cluster.driver, cluster.own = nodes, driver, own  # type: ignore[method-assign]
    return cluster


def test_nodes_without_gpus_for_learners_that_compute_on_them_are_named_before_anything_is_started_there(
    run_on: Any, on_gpus: None
) -> None:
    cluster = cluster_with_gpus({"a": 0.0, "b": 0.5, "c": 1.0}, own="c")
    message = r"Ray has none to give on a, b, and 0 other nodes have one; .*or give --device cpu or --learners-on driver"
    with pytest.raises(ConfigError, match=message):
        run_on(cluster)
    assert cluster.here == {}


def test_a_learner_that_sees_no_gpu_on_its_node_ends_the_run_with_the_nodes_name_and_only_its_node_gives_a_gpu(
    run_on: Any, on_gpus: None
) -> None:
    cluster = cluster_with_gpus({"a": 0.0, "b": 1.0, "c": 1.0, "d": 1.0}, own="d", num_nodes=3)
    with pytest.raises(ConfigError, match=r"learner-1 on node b: device: cuda was asked for, but torch sees no GPU here"):
        run_on(cluster)
    assert sorted(cluster.gpus) == ["b", "d"], "one for each learner, the driver's included"
    assert sorted(cluster.here) == ["b", "c", "d"], "those with a GPU, of four"


def test_learners_that_compute_on_the_processor_reserve_no_gpu(run_on: Any, expected: Any) -> None:
    cluster = cluster_with_gpus({"a": 1.0, "b": 1.0})
    assert run_on(cluster).result["weights_sha256"] == expected(2)
    assert cluster.gpus == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_actor_chooses_on_the_processor_whatever_the_learners_compute_on(device: Any) -> None:
    """So a node of actors alone needs no GPU. Who chooses on a cluster is settled before (`_check_engine` of settings/completing.py)."""
    resolved, _ = resolve("CartPole-v1", {"engine": "ray", "preset": "none", "device": device})
    assert resolved.policy.inference == "actor"
    source: Any = None
    copy = Blueprint(resolved, scripted_spec(), UserObjects(), bytes(16)).policy_copy(source)
    assert {tensor.device.type for tensor in copy.policy.parameters()} == {"cpu"}


def test_every_process_has_a_number_of_its_own() -> None:
    roles = [("actor", 0), ("actor", 1023), ("learner", 0), ("learner", 63)]
    assert [role_of(number_of(*role)) for role in roles] == roles
    assert len({number_of(*role) for role in roles}) == len(roles)


def test_learners_for_which_no_node_is_left_are_here() -> None:
    a: Any = "a"
    b: Any = "b"
    assert homes(3, [a, b]) == {1: a, 2: b}
    assert homes(3, [a]) == {1: a}
    assert homes(2, []) == {}


class There:
    """As a link, for who lives there."""

    def __init__(self, name: str) -> None:
        self.name, self.lost, self.posted = name, "", list[Frame]()

    def post(self, frame: Frame) -> None:
        self.posted.append(frame)


@pytest.fixture
def spread() -> tuple[Spread, list[Process], list[Any]]:
    """Three learners that have begun together, of which two live on nodes."""
    learners, nodes = [Process("learner", index) for index in range(3)], [There(name) for name in ("here", "a", "b")]
    made, links = Spread(config(), learners, {}), list[Any](nodes)
    made.here = ("here", "127.0.0.1")
    made.places |= {link: (link.name, f"127.0.0.{at + 2}") for at, link in enumerate(links)}
    os.close(made.begin(links))
    return made, learners, links


def test_a_learner_whose_node_is_lost_before_it_was_told_where_to_meet_is_here(spread: tuple[Spread, list[Process], list[Any]]) -> None:
    made, learners, (_, a, b) = spread
    assert made.lodged() == [(learners[1], a), (learners[2], b)]
    assert [made.meeting_of(learner)["own"] for learner in learners] == ["127.0.0.1", "127.0.0.3", "127.0.0.4"]
    a.lost = "it is gone"
    assert [made.meeting_of(learner)["own"] for learner in learners] == ["127.0.0.1", "127.0.0.1", "127.0.0.4"]
    assert made.lodged() == [(learners[2], b)]
    assert [learner.node for learner in learners] == ["", "", "b"]


def test_a_node_that_has_not_ended_its_learner_in_time_is_given_up(spread: tuple[Spread, list[Process], list[Any]]) -> None:
    made, (_, first, second), (_, a, b) = spread
    up: Any = object()
    first.channel = second.channel = up
    first.doomed, first.doomed_at = "another learner is lost", 10.0
    made.give_up_silent(10.0 + END_LEARNER_SECONDS)
    assert a.lost == ""
    made.give_up_silent(10.1 + END_LEARNER_SECONDS)
    assert a.lost == "it has not ended its learner within 5 s"
    assert b.lost == "", "its learner was not told to end"


def test_what_was_made_on_a_node_goes_to_learners_elsewhere_and_to_those_that_come_later(
    spread: tuple[Spread, list[Process], list[Any]],
) -> None:
    made, learners, (_, a, b) = spread
    made.ring = allocate(scripted_schema(4, 2), 2)
    identities = [Identity(0, 3, 1), Identity(1, 3, 0)]
    for slot, identity in zip(made.ring.slots, identities, strict=True):
        write_rollout(slot, identity)
    channels = [made.channel(learner, link) for learner, link in made.lodged()]
    learners[1].channel, learners[2].channel = channels
    train = to_json({"do": "train", "rollouts": [[slot, list(identity)] for slot, identity in enumerate(identities)]})

    def came(link: There) -> list[Identity]:
        posted, link.posted = link.posted, []
        return [Word.decode(frame.head).identity for frame in posted if frame.kind is Kind.ROLLOUT]

    for slot, (identity, link) in enumerate(zip(identities, (a, b), strict=True)):
        made.bring(Word(Told.FILLED, slot, identity), link)
    assert (came(a), came(b)) == (identities[1:], identities[:1])
    for channel in channels:
        channel.send_with_fds(train, ())
    assert (came(a), came(b)) == ([], [])
    write_rollout(made.ring.slots[0], Identity(0, 4, 1))
    made.bring(Word(Told.FILLED, 0, Identity(0, 4, 1)), b)  # its group has moved
    assert (came(a), came(b)) == ([Identity(0, 4, 1)], [])
    os.close(made.begin([a, b]))
    write_rollout(made.ring.slots[0], identities[0])
    for channel in channels:
        channel.send_with_fds(train, ())
    assert (came(a), came(b)) == (identities, identities), "who begins anew is brought all, wherever it was made"


def test_learners_meet_at_one_address_of_this_machine_only() -> None:
    with meeting_place("127.0.0.1") as place:
        address, port = place.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 5.0).close()
    with pytest.raises(ProcessError, match=r"cannot meet at 203\.0\.113\.7"):
        meeting_place("203.0.113.7")


def test_learners_on_several_machines_add_up_through_a_store_in_one_of_them() -> None:
    place = meeting_place("127.0.0.1")
    port = place.getsockname()[1]

    def one(rank: int) -> list[float]:
        store = network_store("127.0.0.1", port, 2, 60.0, place.detach() if rank == 0 else None)
        ranks = meet(store, rank, 2, timeout_seconds=60.0)
        total = torch.tensor([float(rank + 1)])
        ranks.sum(total)
        return total.tolist()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(2) as pool:
        assert [each.result(120.0) for each in [pool.submit(one, rank) for rank in (0, 1)]] == [[3.0], [3.0]]


def test_learners_that_may_be_on_other_machines_add_up_by_gloo_at_their_own_addresses_also_where_they_have_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met: list[tuple[Any, ...]] = []
    monkeypatch.setattr(learner_process, "network_store", lambda *store: store)
    monkeypatch.setattr(learner_process, "meet", lambda *where, **how: met.append((*where, how)))
    learner = object.__new__(LearnerProcess)
    blueprint: Any = SimpleNamespace(config=config(), device=lambda: torch.device("cuda"))
    learner._blueprint, learner._first = blueprint, False
    context: Any = SimpleNamespace(index=2, memory_fds=())
    learner._meet(context, {"address": "10.0.0.1", "port": 7, "own": "10.0.0.3"})
    seconds = config().learner.timeout_seconds
    assert met == [(("10.0.0.1", 7, 3, seconds, None), 2, 3, {"timeout_seconds": seconds, "address": "10.0.0.3"})]


class Holding:
    """As a learner, for what is handed over: it holds a state, and numbers that are no state."""

    def __init__(self, rank: int) -> None:
        self.version, self.held = (7, torch.arange(5.0) / 3) if rank == 0 else (0, torch.zeros(5))

    def get_state(self) -> Any:
        return {"held": self.held.numpy()}, {"version": self.version}

    def set_state(self, arrays: Any, facts: Any) -> None:
        self.version, self.held = facts["version"], torch.from_numpy(arrays["held"].copy())


def test_all_go_on_from_the_state_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.engines.keeping._PIECE_BYTES", 64)

    def take(ranks: TorchRanks) -> tuple[int, list[float]]:
        learner: Any = Holding(ranks.rank)
        hand_over(learner, ranks, {"torch": "2"})
        return learner.version, learner.held.tolist()

    assert several(3, take) == [(7, (torch.arange(5.0) / 3).tolist())] * 3


def test_machines_that_compute_otherwise_are_told_apart_before_anything_is_learned() -> None:
    def take(ranks: TorchRanks) -> str:
        learner: Any = Holding(ranks.rank)
        with pytest.raises(LearnersError) as raised:
            hand_over(learner, ranks, {"cpu_capability": "AVX2" if ranks.rank else "AVX512"})
        return str(raised.value)

    first, second = several(2, take)
    assert "the machine of learner-1 computes otherwise" in first
    assert "AVX512" in first
    assert "AVX2" in second
