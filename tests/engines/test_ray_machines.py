"""The machines of a cluster, as Ray lists them, without Ray: which the run takes and in which order, which one is the driver's, and what is reserved there."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.engines import ray_cluster, ray_connecting
from shoal.engines.ray_cluster import Cluster, ClusterNode
from shoal.engines.ray_node import SignalledNode
from shoal.engines.ray_own_node import OwnNode
from shoal.errors import ConfigError, TooFewNodesError
from shoal.settings import resolve


def machine(node_id: str, *, gpus: float = 0.0, alive: bool = True, cpus: float = 4.0) -> dict[str, Any]:
    return {
        "NodeID": node_id,
        "Alive": alive,
        "NodeManagerHostname": f"host-{node_id}",
        "NodeManagerAddress": f"10.0.0.{ord(node_id)}",
        "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})},
    }


def cluster_of(*machines: dict[str, Any], own: str = "", **how: Any) -> Cluster:
    roll: Any = SimpleNamespace(machines=list(machines))
    return Cluster(how.pop("num_nodes", None), 2, roll=roll, own=own, **how)


def test_the_driver_is_told_by_its_own_nodes_id_whatever_else_the_cluster_lists() -> None:
    cluster = cluster_of(machine("a"), machine("b", cpus=0.0), machine("c"), own="b")
    assert cluster.driver() == ("b", "10.0.0.98")
    assert [node.id for node in cluster.nodes()] == ["a", "c"], "it need not be one that hosts actors"


def test_nodes_are_taken_by_name_and_those_with_a_whole_gpu_first_where_learners_compute_on_them() -> None:
    machines = [machine("d", gpus=2.0), machine("a"), machine("c", gpus=1.0), machine("b", gpus=0.5), machine("e", gpus=1.0, alive=False)]
    assert [node.id for node in cluster_of(*machines).nodes()] == ["a", "b", "c", "d"]
    cluster = cluster_of(*machines, gpus_first=True)
    assert [node.id for node in cluster.nodes()] == ["c", "d", "a", "b"]
    assert [node.id for node in cluster.new_nodes(["c"])] == ["d", "a", "b"]


class Rays:
    """What stands for Ray, and keeps what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: Any = types.ModuleType("ray")
        self.module.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        self.options: dict[str, Any] = {}
        self.kinds: list[Any] = []
        self.made_of: tuple[Any, ...] = ()
        self.module.remote = lambda **how: self._kind
        self.module.init = lambda *where, **how: None
        self.module.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "b")
        scheduling: Any = types.ModuleType("ray.util.scheduling_strategies")
        scheduling.NodeAffinitySchedulingStrategy = lambda node_id, soft: (node_id, soft)
        util = types.ModuleType("ray.util")
        for name, module in {"ray": self.module, "ray.util": util, "ray.util.scheduling_strategies": scheduling}.items():
            monkeypatch.setitem(sys.modules, name, module)

    def _kind(self, kind: Any) -> Any:
        self.kinds.append(kind)
        return SimpleNamespace(options=self._options)

    def _options(self, **how: Any) -> Any:
        self.options = how
        return SimpleNamespace(remote=lambda *made_of: setattr(self, "made_of", made_of))


@pytest.mark.parametrize(("gpu", "asked"), [(True, 1), (False, None)])
def test_a_node_gives_the_cpus_of_its_actors_and_a_gpu_only_where_one_is_asked_for(
    gpu: bool, asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rays = Rays(monkeypatch)
    cluster_of().start(ClusterNode("a", "a", 4.0, "10.0.0.1", 2.0), b"setup", b"pickled", gpu=gpu)
    assert (rays.options["num_cpus"], rays.options.get("num_gpus")) == (2, asked)
    assert rays.options["scheduling_strategy"] == ("a", False)
    assert (rays.kinds, rays.made_of) == ([SignalledNode], (b"setup", b"pickled"))


def test_the_drivers_own_node_gets_what_holds_its_cpus_and_nothing_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    rays = Rays(monkeypatch)
    cluster_of(own="a").start(ClusterNode("a", "a", 4.0), b"setup", b"pickled", gpu=False)
    assert (rays.kinds, rays.made_of) == ([OwnNode], (b"setup",))


@pytest.mark.parametrize(("address", "own"), [("auto", "b"), (None, "b"), ("ray://head:10001", "")])
def test_a_driver_knows_its_own_node_but_for_one_that_joins_by_ray(address: str | None, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Rays(monkeypatch)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if not name.startswith("RAY_")})
    monkeypatch.setattr(ray_connecting, "_machines", lambda: [machine("a"), machine("b")])
    monkeypatch.setattr(ray_connecting, "check_cluster", lambda *asked: [])
    for check in ("_check_there_is_one", "_check_reachable"):
        monkeypatch.setattr(ray_connecting, check, lambda *asked: None)
    config, _ = resolve("CartPole-v1", {"engine": "ray", "ray.address": address})
    cluster = ray_connecting.connect(config, print)
    assert cluster.roll is not None
    cluster.roll.close()
    if cluster.secrets is not None:
        cluster.secrets.cleanup()
    assert cluster.own == own
    if own:
        assert cluster.driver() == ("b", "10.0.0.98")


# ---- too few nodes
def test_what_is_waited_for_is_said_once_and_at_once_and_too_few_nodes_may_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "NODES_SECONDS", 0.5)
    told: list[tuple[str, dict[str, Any]]] = []
    with pytest.raises(TooFewNodesError, match=r"ray.nodes: 3 with 2 CPUs each .* the cluster has 2; .* add machines") as missing:
        cluster_of(machine("a"), machine("b"), num_nodes=3).wait_for_nodes(lambda kind, **facts: told.append((kind, facts)))
    assert missing.value.exit_code == 1, "whoever repeats what may come out differently repeats this"
    assert told == [("nodes_awaited", {"there": 2, "wanted": 3, "cpus": 2, "seconds": 0.5})]


def test_a_node_that_comes_in_time_is_waited_for_and_where_all_are_there_nothing_is_said() -> None:
    cluster, told = cluster_of(machine("a"), num_nodes=2), list[str]()

    def tell(kind: str, **facts: Any) -> None:
        told.append(kind)
        cluster.roll.machines.append(machine("b"))  # type: ignore[union-attr]

    for _ in range(2):
        assert [node.id for node in cluster.wait_for_nodes(tell)] == ["a", "b"]
    assert told == ["nodes_awaited"]


# ---- what is refused before a cluster is joined, or started
@pytest.mark.parametrize(
    ("settings", "around", "said"),
    [
        ({"ray.nodes": 2}, {}, "ray.nodes: 2 were asked for .* this machine alone"),
        ({"ray.learners_on": "nodes", "learners": 3}, {}, "besides that machine the run has 0 nodes"),
        ({"ray.learners_on": "nodes", "learners": 3, "ray.address": "h:1", "ray.nodes": 1}, {}, "besides that machine the run has 1 nodes"),
        ({"ray.learners_on": "nodes", "learners": 3, "ray.address": "h:1"}, {"RAY_USE_TLS": "1"}, "--allow-plain-learners"),
        ({"ray.learners_on": "nodes", "learners": 3}, {"RAY_USE_TLS": "1", "RAY_ADDRESS": "h:1"}, "--allow-plain-learners"),
    ],
)
def test_what_no_cluster_could_give_is_refused_before_one_is_looked_for(
    settings: dict[str, Any], around: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rays = Rays(monkeypatch)
    rays.module.init = rays.module.nodes = None  # whoever calls it fails
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", {**kept, **around})
    config, _ = resolve("CartPole-v1", {"engine": "ray", **settings})
    with pytest.raises(ConfigError, match=said):
        ray_connecting.connect(config, print)
