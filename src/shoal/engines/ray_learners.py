"""Learners on the nodes of a cluster: which lives where, how they meet, and the rollouts that they learn from.

The first stays on the driver's machine: it publishes, saves, and keeps what all go on from. Each of the others has a node to itself, as far as there are
nodes besides the driver's own. What shared memory gives to a learner here is brought to the node of one there: every rollout that was made elsewhere, checked
as one that comes from a node is, before the order that names it. One that was made on that node lies in its slot already.

What the learners add up goes between their machines by gloo, which neither encrypts nor asks who is there.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from shoal.config import RunConfig
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, from_json
from shoal.engines.process import Process
from shoal.engines.ray_channel import NodeChannel
from shoal.engines.ray_cluster import ClusterNode
from shoal.engines.ray_link import NodeLink
from shoal.engines.ray_security import has_tls
from shoal.engines.ray_words import Frame, Kind, number_of
from shoal.errors import ConfigError, ProcessError
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring
from shoal.experience.wire import pack
from shoal.settings import NO_REPLAY_ON_NODES, check_spread

END_LEARNER_SECONDS = 5.0  # less than the supervisor waits for all that it told to end (STOP_SECONDS)


def check_learners(config: RunConfig, environment: Mapping[str, str], *, replayed: bool, others: int) -> list[str]:
    """What to warn of before learners live on nodes.

    Args:
      replayed: the run learns from a replay. others: nodes besides the driver's own that can have a learner.
    Raises:
      ConfigError: they cannot, or as `check_spread`.
    """
    if replayed:
        raise ConfigError(NO_REPLAY_ON_NODES)
    return [check_spread(config, others=others, tls=has_tls(environment))]


def homes(ranks: int, nodes: Sequence[NodeLink]) -> dict[int, NodeLink]:
    """Where each learner lives, by rank: the first, and those for which no node is left, on the driver's machine, which is not said."""
    return dict(zip(range(1, ranks), nodes, strict=False))


def meeting_place(address: str) -> socket.socket:
    """Where the learners of one group find each other: a port of this address that nobody else has, and no other address of this machine.

    Raises:
      ProcessError: this machine has no such address. OSError: there are no descriptors for it.
    """
    place = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        place.bind((address, 0))
        place.listen()
    except OSError as error:
        place.close()
        raise ProcessError(
            f"learners on nodes cannot meet at {address}, the address of this machine in the cluster ({error.strerror or error}); give --learners-on driver"
        ) from error
    return place


class Brought:
    """Which rollouts lie at which node for its learner. A slot's rollout crosses once to each, and not at all to the one where it was made: nobody writes into
    its slot there before all learners have made the update that it is for, since the slot is leased to nobody before that."""

    def __init__(self) -> None:
        self._there = WeakKeyDictionary[NodeLink, dict[int, Identity]]()

    def forget(self) -> None:
        """Other learners come, perhaps elsewhere."""
        self._there.clear()

    def made(self, link: NodeLink, index: int, identity: Identity) -> None:
        """An actor of this node made it."""
        self._there.setdefault(link, {})[index] = identity

    def bring(self, link: NodeLink, ring: Ring, rollouts: Iterable[tuple[int, Identity]]) -> None:
        """Have a node put these rollouts, which are whole and checked, into the same slots of its own; those that lie there already are left out."""
        there = self._there.setdefault(link, {})
        for index, identity in rollouts:
            if there.get(index) != identity:
                there[index] = identity
                slot = ring.slots[index]
                head = Word(Told.FILLED, index, identity, int(slot.envelope["version_max"])).encode()
                link.post(Frame(Kind.ROLLOUT, head=head, body=pack(slot)))


class LearnerChannel(NodeChannel):
    """The way to a learner on a node. number: of the learner (ray_words.number_of)."""

    def __init__(self, link: NodeLink, number: int, incarnation: int, ring: Ring, brought: Brought) -> None:
        super().__init__(link)
        self._number, self._incarnation = number, incarnation
        self._ring, self._brought = ring, brought

    def send_with_fds(self, message: bytes, fds: Sequence[int]) -> bool:
        """Always room: a learner has one order at a time."""
        self.check_there()
        order = from_json(message)
        if order["do"] == "train":
            self._brought.bring(self._link, self._ring, [(slot, Identity(*identity)) for slot, identity in order["rollouts"]])
        self._link.post(Frame(Kind.ORDER, self._number, self._incarnation, message))
        return True


class Spread:
    """The learners of a run, where all but the first are to be on nodes: where each lives, how they meet, and what is brought to them. Where none is to
    be there (`on` is False), nobody lives on a node.

    Args:
      learners: all of them. homes: nodes by the numbers of those who live there (ray_words.number_of); those of learners are written here.
    Attributes:
      device: of all learners, also where `auto` would choose another on a node.
      here: this machine's id in the cluster and its address there. places: as much of each node. ring: of this machine.
      with_gpu: nodes of whose GPUs the run has one, for a learner. Actors choose on the processor, and need none.
    """

    def __init__(self, config: RunConfig, learners: Sequence[Process], homes: dict[int, NodeLink]) -> None:
        self.on = config.learners > 1 and config.ray.learners_on == "nodes"
        self.device: str = config.device
        self.here = ("", "")
        self.places = WeakKeyDictionary[NodeLink, tuple[str, str]]()
        self.with_gpu = WeakSet[NodeLink]()
        self.ring: Ring | None = None
        self._learners, self._homes = learners, homes
        self._port = 0  # where they meet
        self._brought = Brought()

    def others(self, nodes: Iterable[NodeLink]) -> list[NodeLink]:
        """Of these nodes, those that are not this machine."""
        return [link for link in nodes if self.places[link][0] != self.here[0]]

    @property
    def on_gpus(self) -> bool:
        """Whether learners are to be on nodes, and compute on GPUs."""
        return self.on and self.device == "cuda"

    def check_gpus(self, nodes: Iterable[ClusterNode]) -> None:
        """Raise ConfigError where the run would begin with these nodes, and too few of them have a GPU for the learner there."""
        if not self.on_gpus:
            return
        others = [node for node in nodes if node.id != self.here[0]]
        without, learners = [node.name for node in others if not node.has_gpu], len(self._learners)
        have = len(others) - len(without)
        if without and have < learners - 1:
            fewer = f"--learners {have + 1}, " if have else ""
            raise ConfigError(
                f"ray.learners_on: {learners} learners compute on a GPU each (device cuda), the first on the driver's machine and each other one on a "
                f"node; Ray has none to give on {', '.join(without)}, and {have} other nodes have one; add nodes that have (`ray start --num-gpus N` where "
                f"Ray does not find them), or give {fewer}--device cpu or --learners-on driver"
            )

    def uses_gpu(self, node: ClusterNode, nodes: Iterable[NodeLink]) -> bool:
        """Whether the run is to have a GPU of a node that it takes besides these: where one of the learners that are there could not be on any of these,
        and on the driver's machine, where the first is."""
        if not self.on_gpus or not node.has_gpu:
            return False
        return node.id == self.here[0] or len(self.fit(nodes)) < len(self._learners) - 1

    def fit(self, nodes: Iterable[NodeLink]) -> list[NodeLink]:
        """Of these nodes, those that can have a learner."""
        return [link for link in self.others(nodes) if not self.on_gpus or link in self.with_gpu]

    def lodged(self) -> list[tuple[Process, NodeLink]]:
        """Learners that live, or are to live, on nodes, and where."""
        found = [(learner, self._homes.get(number_of("learner", learner.index))) for learner in self._learners]
        return [(learner, home) for learner, home in found if home is not None]

    def begin(self, nodes: Iterable[NodeLink]) -> int:
        """All begin together: settle which of these nodes each lives on, and where they meet. Returns the descriptor on which the first listens there.

        Raises:
          ProcessError, OSError: as `meeting_place`.
        """
        for learner in self._learners:
            self._homes.pop(number_of("learner", learner.index), None)
            learner.node = ""
        for rank, link in homes(len(self._learners), self.fit(nodes)).items():
            self._homes[number_of("learner", rank)], self._learners[rank].node = link, link.name
        self._brought.forget()
        place = meeting_place(self.here[1])
        self._port = place.getsockname()[1]
        return place.detach()

    def meeting_of(self, learner: Process) -> dict[str, Any]:
        """What a learner is told of where it meets the others. One whose node was lost since it was settled lives here."""
        number = number_of("learner", learner.index)
        home = self._homes.get(number)
        if home is not None and home.lost:
            del self._homes[number]
            home, learner.node = None, ""
        own = self.here[1] if home is None else self.places[home][1]
        return {"address": self.here[1], "port": self._port, "own": own}

    def channel(self, learner: Process, link: NodeLink) -> LearnerChannel:
        assert self.ring is not None
        return LearnerChannel(link, number_of("learner", learner.index), learner.incarnation, self.ring, self._brought)

    def bring(self, word: Word, made_on: NodeLink) -> None:
        """The rollout that a word tells of is in its slot here: it goes to the learners on nodes, but for the one where it was made, and need not wait for
        others of its update."""
        assert self.ring is not None
        for learner, home in self.lodged():
            if home is made_on:
                self._brought.made(home, word.slot, word.identity)
            elif learner.up:
                self._brought.bring(home, self.ring, [(word.slot, word.identity)])

    def give_up_silent(self, now: float) -> None:
        """A node that has not ended its learner long after it was told to is taken for lost: no other learner begins before that."""
        for learner, home in self.lodged():
            if learner.up and learner.doomed and now - learner.doomed_at > END_LEARNER_SECONDS:
                home.lost = home.lost or f"it has not ended its learner within {END_LEARNER_SECONDS:g} s"
