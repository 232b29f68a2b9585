"""Roles as they are built, the same in every engine: from a configuration and an environment's spec to actor and learner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch

from shoal.actors.actor import Actor
from shoal.actors.behaviour import Inference, LocalPolicy, PolicyCopy, RemotePolicy, RolloutNoise, VersionSource, WeightSource
from shoal.algorithms import AnyAlgorithm, build_algorithm, check_actions, check_class, checked_settings, learns_from_replay, load_algorithm
from shoal.algorithms.off_policy import Beginning
from shoal.config import AlgorithmConfig, OffPolicyConfig, ReplayConfig, RunConfig
from shoal.engines.plan import Plan
from shoal.engines.sizes import rate_of
from shoal.environments.make import make_group
from shoal.errors import ConfigError
from shoal.experience.limiter import Rate
from shoal.experience.replay_memory import OWN, Memory
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema, rollout_schema
from shoal.learners.learner import Learner, Unpublished, WeightPublisher
from shoal.learners.replay_learner import ReplayLearner
from shoal.learners.together import Together
from shoal.networks.acting import ACTOR_CRITIC, Acting, NetworkKind
from shoal.networks.chain import ACTIVATIONS
from shoal.networks.computing import check_compiler, check_precision, compute_facts
from shoal.networks.fast import fast_actor
from shoal.networks.policy import build_acting, named_tensors
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


def _check_dealt(key: str, number: int, what: str, learners: int) -> None:
    """Raise ConfigError where so many cannot be dealt evenly."""
    rest = number % learners
    if rest:
        works = [each for each in (number - rest, number - rest + learners) if each]
        raise ConfigError(
            f"{key}: {number} {what} cannot be dealt evenly to {learners} learners (learners); {' or '.join(map(str, works))} can"
        )


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

    @cached_property
    def algorithm(self) -> type[AnyAlgorithm]:
        """Its class."""
        if self.objects.algorithm is not None:
            return check_class(self.objects.algorithm, self.objects.algorithm.__name__)
        return load_algorithm(self.config.algorithm.name)

    @cached_property
    def settings(self) -> AlgorithmConfig:
        """The algorithm's, as its own model has them."""
        return checked_settings(self.algorithm, self.config.algorithm)

    @property
    def network_kind(self) -> NetworkKind:
        """Which policy is learned."""
        return self.algorithm.network(self.settings) if learns_from_replay(self.algorithm) else ACTOR_CRITIC

    @cached_property
    def replay(self) -> ReplayConfig | None:
        """What the run samples from, with the algorithm's defaults filled in; None for one that learns from batches in order."""
        settings = self.settings
        if not isinstance(settings, OffPolicyConfig) or not learns_from_replay(self.algorithm):
            return None
        given = self.config.replay
        sampling = self.config.sampling
        first_whole = (sampling.groups or 1) * (sampling.group_size or 1) * (given.sequence_length or 0)  # env steps until sequences are
        return given.model_copy(
            update={
                "n_step": given.n_step or settings.n_step,
                "prioritised": settings.prioritised if given.prioritised is None else given.prioritised,
                "samples_per_insert": given.samples_per_insert or settings.updates_per_step * settings.batch_size * given.trained_rows,
                "learning_starts": max(given.learning_starts, first_whole),
            }
        )

    @property
    def rate(self) -> Rate | None:
        """How much of the replay is sampled."""
        settings = self.settings
        if self.replay is None or not isinstance(settings, OffPolicyConfig):
            return None
        return rate_of(self.config, self.replay, settings.batch_size * self.replay.trained_rows)

    def plan(self) -> Plan:
        return Plan.of(self.config, self.rate)

    def check_algorithm(self) -> None:
        """Raise ConfigError where the algorithm cannot do what is asked of it here."""
        check_actions(self.settings, self.spec.action)
        if self.config.learners > 1:
            self._check_shares()
        if self.replay is None:
            return
        policy, replay, remembers = self.config.policy, self.replay, self.algorithm.remembers
        refused = {
            "policy.normalise_observations": policy.normalise_observations,
            "policy.normalise_rewards": policy.normalise_rewards,
            "policy.exploration": policy.exploration != "gaussian",
            "policy.log_std_init": policy.log_std_init != 0.0,
            "policy.share_encoder": policy.share_encoder is not None,
            "policy.memory": policy.memory != "none" and not remembers,
            "replay.sequence_length": replay.sequence_length is not None and not remembers,
            "replay.burn_in": replay.burn_in > 0 and not remembers,
        }
        for key in (key for key, given in refused.items() if given):
            memory = key in ("policy.memory", "replay.sequence_length", "replay.burn_in")
            hint = "leave it out, or take r2d2, which learns from sequences with a memory" if memory else "leave it out"
            raise ConfigError(f"{key}: {self.config.algorithm.name} learns from a replay, and takes this at its default only; {hint}")
        if remembers:
            self._check_sequences(replay)
        if self.network_kind.name in ("stochastic", "deterministic") and policy.activation not in ACTIVATIONS:
            raise ConfigError(
                f"policy.activation: the critics of {self.config.algorithm.name} take {' or '.join(ACTIVATIONS)}, not {policy.activation}"
            )
        if replay.learning_starts > replay.capacity_steps:
            raise ConfigError(
                f"replay.learning_starts: the replay holds {replay.capacity_steps:,} env steps (replay.capacity_steps) and would never hold the "
                f"{replay.learning_starts:,} after which learning starts; lower it, or raise the other"
            )
        self._check_returns(replay)

    def _check_returns(self, replay: ReplayConfig) -> None:
        """Returns are no longer than what there is to sum: the steps of an environment in the replay, or a sequence. The algorithm's own
        default is cut there instead."""
        default = self.settings.n_step if isinstance(self.settings, OffPolicyConfig) else 1
        environments = (self.config.sampling.groups or 1) * (self.config.sampling.group_size or 1)
        most, where = replay.capacity_steps // environments, "replay.capacity_steps"
        what = f"the replay holds of each of the {environments:,} environments ({where} {replay.capacity_steps:,})"
        if replay.sequence_length is not None:
            most, where = replay.sequence_length, "replay.sequence_length"
            what = f"a sequence holds ({where})"
        if (replay.n_step or 1) > max(most, default):
            raise ConfigError(
                f"replay.n_step: a return of {replay.n_step:,} steps is longer than the {most:,} that {what}; give --replay.n-step {most} or less, "
                f"or raise {where}"
            )

    def _check_shares(self) -> None:
        name, learners = self.config.algorithm.name, self.config.learners
        if not getattr(self.algorithm, "shares", False):
            whose = "off_policy.OffPolicyAlgorithm" if learns_from_replay(self.algorithm) else "base.Algorithm"
            raise ConfigError(
                f"learners: {name} does not divide its work, as the built-in algorithms do (one of your own says `shares = True`, see "
                f"shoal.algorithms.{whose}); leave it at 1"
            )
        self._check_gpus(learners)
        if isinstance(self.settings, OffPolicyConfig) and self.replay is not None:
            drawn = "sequences" if self.replay.sequence_length is not None else "transitions"
            _check_dealt("algorithm.batch_size", self.settings.batch_size, f"{drawn} of a batch", learners)
            _check_dealt(
                "sampling.groups",
                self.config.sampling.groups or 1,
                "groups (each learner keeps and samples the rollouts of its own)",
                learners,
            )
        size = getattr(self.settings, "minibatch_size", None)
        if size is not None and size < learners:
            raise ConfigError(f"algorithm.minibatch_size: {size} rows cannot be divided among {learners} learners (learners)")

    def _check_gpus(self, learners: int) -> None:
        if self.config.ray.learners_on == "nodes":  # each asks for those of its own machine
            return
        gpus = torch.cuda.device_count() if self.device().type == "cuda" else learners
        if gpus < learners:
            raise ConfigError(
                f"learners: {learners} learners take a GPU each, and torch sees {gpus} here; give --learners {gpus}, or --device cpu"
            )

    def _check_sequences(self, replay: ReplayConfig) -> None:
        name = self.config.algorithm.name
        if self.config.policy.memory == "none":
            raise ConfigError(f"policy.memory: {name} trains a policy with memory; take lstm or gru, or dqn, which has none")
        if replay.sequence_length is None:
            raise ConfigError(f"replay.sequence_length: {name} learns from sequences; give their length in rows, burn-in included")

    def policy(self) -> Acting:
        """The policy with its initial weights, which depend on the run's seed only."""
        return build_acting(self.spec, self.config.policy, self.objects.network, seed=self._parameter_seed(0), kind=self.network_kind)

    def _parameter_seed(self, index: int) -> int:
        return int(seed_sequence(self.config.seed, Purpose.PARAMETERS, index=index, epoch=0).generate_state(1)[0])

    def schema(self, policy: Acting) -> Schema:
        sampling = self.config.sampling
        return rollout_schema(self.spec, policy.fields(), sampling.rollout_length, sampling.group_size or 1)

    def layout(self, policy: Acting) -> WeightLayout:
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

    def remote_behaviour(self, server: Inference, versions: VersionSource, policy: Acting) -> RemotePolicy:
        """Has a server choose. policy: only looked at."""
        return RemotePolicy(server, versions, self._noise(policy), exact=self.config.mode != "async")

    def policy_copy(self, source: WeightSource) -> PolicyCopy:
        policy = self.policy()
        policy.eval()
        return PolicyCopy(policy, source, self.device() if self.served else torch.device("cpu"))

    def _noise(self, policy: Acting) -> RolloutNoise:
        sampling, envs = self.config.sampling, self.config.sampling.group_size or 1
        return RolloutNoise(policy.noise, self.config.seed, sampling.rollout_length, envs, self.epoch, self.epsilon)

    def epsilon(self, group: int, sequence: int) -> float:
        """Share of actions at random in a group's n-th rollout; every group is taken to have made as many, and whole ones.

        Those of environments that wait may be shorter in async mode: there it is as far on as the fastest environment of each group.
        """
        algorithm, replay, sampling = self.algorithm, self.replay, self.config.sampling
        if replay is None or not learns_from_replay(algorithm):
            return 0.0
        groups = sampling.groups or 1
        env_steps = sequence * groups * (sampling.group_size or 1) * sampling.rollout_length
        return algorithm.epsilon(self.settings, Beginning(group, groups, env_steps, replay.learning_starts))

    @property
    def served(self) -> bool:
        """Whether actions are chosen on the learner's device, for all actors by one process; once the configuration is resolved."""
        return self.config.policy.inference == "server"

    def inference(self, policy: Acting) -> Literal["actor", "server"]:
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

    def learner(
        self,
        ring: Ring,
        board: WeightPublisher,
        max_policy_lag: int,
        recorder: ActivityRecorder | None = None,
        memory: Memory = OWN,
    ) -> Learner:
        """memory: where its replay's arrays are to lie, where it has one."""
        policy: Any = self.policy().to(self.device())
        self.compute(policy)
        publisher = board if recorder is None else _TimedPublisher(board, recorder)
        if self.replay is not None and learns_from_replay(self.algorithm):
            learns = self.algorithm.make(policy, self.settings, self.spec, self.config.policy, self._parameter_seed(1))
            return ReplayLearner(
                self.config, self.spec, policy, learns, ring, publisher,
                run_id=self.run_id, replay=self.replay, epoch=self.epoch, memory=memory,
            )  # fmt: skip
        algorithm = build_algorithm(policy, self.config.algorithm, self.objects.algorithm)
        return Learner(
            self.config, self.spec, policy, algorithm, ring, publisher, run_id=self.run_id, max_policy_lag=max_policy_lag, epoch=self.epoch
        )

    def learners_here(self, ring: Ring, board: WeightPublisher, max_policy_lag: int, recorder: ActivityRecorder | None = None) -> Together:
        """All learners in this process."""
        first = self.learner(ring, board, max_policy_lag, recorder)
        size = self.layout(self.policy()).size
        others = [self.learner(ring, Unpublished(size), max_policy_lag) for _ in range(1, self.config.learners)]
        return Together([first, *others], threads=self.config.learner.threads, timeout_seconds=self.config.learner.timeout_seconds)

    def compute(self, policy: Acting) -> None:
        """Have a learner's policy compute as the configuration says. Raises ConfigError where it cannot."""
        policy.compute(mixed=self.config.learner.precision == "bfloat16", compile=self.config.learner.compile)

    def check_computing(self, policy: Acting) -> None:
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
