"""Roles as they are built, the same in every engine: from a configuration and an environment's spec to actor and learner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from shoal.actors.actor import Actor
from shoal.actors.behaviour import Inference, LocalPolicy, PolicyCopy, RemotePolicy, RolloutNoise, VersionSource, WeightSource
from shoal.algorithms import build_algorithm
from shoal.config import RunConfig
from shoal.environments.make import make_group
from shoal.errors import ConfigError
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema, rollout_schema
from shoal.learners.learner import Learner, WeightPublisher
from shoal.networks.computing import check_compiler, check_precision, compute_facts
from shoal.networks.fast import fast_actor
from shoal.networks.policy import Policy, build_policy, named_tensors
from shoal.streams import Purpose, seed_sequence
from shoal.types import CLOSING, Activity, ActivityRecorder, Array, Behaviour, EnvironmentGroup, EnvironmentSpec, NullRecorder
from shoal.weights.board import WeightLayout

# From about here on a group of 8 costs a core more (0.25 ms; 0.36 ms at 1.4 million weights, actor's and critic's together) than the way to a server
# and back (0.1 ms, measured: docs/performance.md) with as much again for a GPU's calls (assumed, not measured).
SERVED_WEIGHTS = 1_000_000


@contextmanager
def one_thread(threads: int) -> Iterator[None]:
    """Act with one torch thread, as an actor's process does, where learner and actors share this one: the bits may depend on it."""
    if threads != 1:
        torch.set_num_threads(1)
    yield
    if threads != 1:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class UserObjects:
    """What a user handed over as an object rather than by name; None where a name says it."""

    env: Callable[..., Any] | None = None
    network: Callable[..., Any] | None = None
    algorithm: type[Any] | None = None


@dataclass(frozen=True)
class _TimedPublisher:
    """A board whose publications show as an activity of their own between two stretches of learning."""

    board: WeightPublisher
    recorder: ActivityRecorder

    def begin(self, version: int) -> Array:
        self.recorder.enter(Activity.PUBLISHING)
        return self.board.begin(version)

    def commit(self, version: int) -> None:
        self.board.commit(version)
        self.recorder.enter(Activity.LEARNING)


@dataclass(frozen=True)
class Blueprint:
    """All that roles are built from."""

    config: RunConfig
    spec: EnvironmentSpec
    objects: UserObjects
    run_id: bytes  # 16 bytes
    epoch: int = 0

    def policy(self) -> Policy:
        """The policy with its initial weights, which depend on the run's seed only."""
        seed = int(seed_sequence(self.config.seed, Purpose.PARAMETERS, epoch=0).generate_state(1)[0])
        return build_policy(self.spec, self.config.policy, self.objects.network, seed=seed)

    def schema(self, policy: Policy) -> Schema:
        sampling = self.config.sampling
        return rollout_schema(self.spec, policy.fields(), sampling.rollout_length, sampling.group_size or 1)

    def layout(self, policy: Policy) -> WeightLayout:
        return WeightLayout.of((n, tuple(t.shape)) for n, t in named_tensors(policy).items())

    def group(self, index: int, recorder: ActivityRecorder | None = None) -> EnvironmentGroup:
        """recorder: is told of each call that puts the group back, or closes it."""
        c, recorder = self.config, recorder or NullRecorder()
        return make_group(
            c.env,
            group=index,
            num_envs=c.sampling.group_size or 1,
            run_seed=c.seed,
            factory=self.objects.env,
            epoch=self.epoch,
            spec=self.spec,
            progress=lambda b, *, closing=False: recorder.enter(Activity.RESTORING, index, b, CLOSING if closing else 0),
        )

    def behaviour(self, source: WeightSource) -> LocalPolicy:
        """Chooses in this process, with the numbers that an inference server would give each group where the configuration says so."""
        copy = self.policy_copy(source)
        # By policy and group size only, never by placement: the two agree to rounding, not to the bit.
        fast = None if self.served else fast_actor(copy.policy, self.config.sampling.group_size or 1)
        return LocalPolicy(copy, self._noise(copy.policy), fast)

    def remote_behaviour(self, server: Inference, versions: VersionSource, policy: Policy) -> RemotePolicy:
        """Has a server choose. policy: only looked at."""
        return RemotePolicy(server, versions, self._noise(policy), exact=self.config.mode != "async")

    def policy_copy(self, source: WeightSource) -> PolicyCopy:
        policy = self.policy()
        policy.eval()
        return PolicyCopy(policy, source, self.device() if self.served else torch.device("cpu"))

    def _noise(self, policy: Policy) -> RolloutNoise:
        sampling = self.config.sampling
        return RolloutNoise(policy.noise, self.config.seed, sampling.rollout_length, sampling.group_size or 1, self.epoch)

    @property
    def served(self) -> bool:
        """Whether actions are chosen on the learner's device, for all actors by one process; once the configuration is resolved."""
        return self.config.policy.inference == "server"

    def inference(self, policy: Policy) -> Literal["actor", "server"]:
        """Who chooses actions: what was asked for, or what `auto` means here."""
        wanted = self.config.policy.inference
        if wanted != "auto":
            return wanted
        large = any(leaf.is_image for leaf in self.spec.observation) or self.layout(policy).size > SERVED_WEIGHTS
        return "server" if large and self.device().type == "cuda" else "actor"

    def actor(
        self,
        ring: Ring,
        behaviour: Behaviour,
        actor: int = 0,
        incarnation: int = 0,
        recorder: ActivityRecorder | None = None,
    ) -> Actor:
        return Actor(
            ring, behaviour, partial(self.group, recorder=recorder), run_id=self.run_id, actor=actor, incarnation=incarnation, epoch=self.epoch, recorder=recorder,
            step_timeout_seconds=self.config.env.step_timeout_seconds, whole=self.config.mode != "async",
        )  # fmt: skip

    def learner(self, ring: Ring, board: WeightPublisher, max_policy_lag: int, recorder: ActivityRecorder | None = None) -> Learner:
        policy = self.policy().to(self.device())
        self.compute(policy)
        algorithm = build_algorithm(policy, self.config.algorithm, self.objects.algorithm)
        publisher = board if recorder is None else _TimedPublisher(board, recorder)
        return Learner(
            self.config, self.spec, policy, algorithm, ring, publisher, run_id=self.run_id, max_policy_lag=max_policy_lag, epoch=self.epoch
        )

    def compute(self, policy: Policy) -> None:
        """Have a learner's policy compute as the configuration says. Raises ConfigError where it cannot."""
        policy.compute(mixed=self.config.learner.precision == "bfloat16", compile=self.config.learner.compile)

    def check_computing(self, policy: Policy) -> None:
        """Raise ConfigError where the learner could not compute with `policy` as the configuration says; before anything runs."""
        self.compute(policy)
        if self.config.learner.precision == "bfloat16":
            check_precision(self.device())
        if self.config.learner.compile:
            check_compiler(self.device())

    def build_facts(self) -> dict[str, str]:
        """What else the bits of a run depend on."""
        learner = self.config.learner
        facts = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "numpy": np.__version__}
        return facts | compute_facts(self.device(), learner.precision, learner.compile)

    def device(self) -> torch.device:
        """The learner's device: `auto` takes a GPU for images only, since small networks learn faster without."""
        wanted = self.config.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device: cuda was asked for, but torch sees no GPU here; use --device cpu or auto")
        if wanted == "auto":
            images = any(leaf.is_image for leaf in self.spec.observation)
            wanted = "cuda" if images and torch.cuda.is_available() else "cpu"
        return torch.device(wanted)
