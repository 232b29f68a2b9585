"""The same work without shoal, on the same machine: what the costs of the parts are compared with, since slow parts would flatter a fraction.

    environment   a bare Gymnasium loop: `gymnasium.make` (or its own vector form), random actions; and shoal's group under random actions
    inference     a bare forward pass of the actor's network at the group's batch, without sampling
    learning      a bare torch loop: the same network shape as nn.Sequential, the same batch, minibatches and epochs, autograd, torch.optim.Adam;
                  values of the whole batch first, the clipped objective, no recursion over time (GAE, V-trace), no metrics

Each bare loop does less than the part that it stands beside. All with one thread, processor time, medians.

Legend: B environments of a group, n rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.benching.measuring import cpu_us, median, repeat
from shoal.config import EnvConfig, RunConfig
from shoal.engines.plan import Plan
from shoal.engines.roles import Blueprint
from shoal.environments.make import close_quietly, environment_factory, is_atari, is_path, registered
from shoal.environments.native import native_factory
from shoal.environments.spaces import allocate, random_action
from shoal.networks.encoders import COMPACT, NATURE
from shoal.types import CURSOR, EnvironmentSpec, GroupState

_CHUNK_STEPS = 2_000
_CHUNK_SECONDS = 0.5


@dataclass(frozen=True)
class Loop:
    """Microseconds per environment step of a loop, and the mean length of its episodes in steps."""

    cpu_us: float
    wall_us: float
    episode_steps: float


# ---- environment ---------------------------------------------------------------------------------------------------------
def bare_environment(config: RunConfig, spec: EnvironmentSpec, seconds: float) -> Loop | None:
    """The environment without shoal under random actions; None where actions are masked."""
    if spec.action_mask != "none":
        return None
    if config.env.form == "native":
        return _bare_vector(config.env, config.sampling.group_size or 1, seconds)
    made = _bare_factory(config.env)()
    try:
        return _bare_single(made, seconds)
    finally:
        close_quietly(made)


def _bare_factory(env: EnvConfig) -> Callable[[], Any]:
    """`gymnasium.make`, for Atari with Gymnasium's own preprocessing; a user's own factory as it is."""
    if is_path(env.id):
        return environment_factory(env)
    import gymnasium

    found = registered(env.id)
    if not (is_atari(found) and env.atari_preprocessing):
        return environment_factory(env)
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    return lambda: FrameStackObservation(
        AtariPreprocessing(gymnasium.make(found, frameskip=1, disable_env_checker=True), terminal_on_life_loss=True), 4
    )


def _bare_single(made: Any, seconds: float) -> Loop:
    made.action_space.seed(0)
    actions = [made.action_space.sample() for _ in range(1024)]
    made.reset(seed=0)
    ended, place, chunk = [0, 0], [0], [_CHUNK_STEPS]

    def work() -> int:
        step, reset, begin, ends = made.step, made.reset, place[0], 0
        for n in range(begin, begin + chunk[0]):
            _, _, terminated, truncated, _ = step(actions[n & 1023])
            if terminated or truncated:
                reset()
                ends += 1
        place[0] = begin + chunk[0]
        ended[0], ended[1] = ended[0] + ends, ended[1] + chunk[0]
        return chunk[0]

    return _timed(work, chunk, seconds, ended)


def _bare_vector(env: EnvConfig, num_envs: int, seconds: float) -> Loop:
    from gymnasium.vector import AutoresetMode

    vector = native_factory(env)(num_envs)
    try:
        vector.action_space.seed(0)
        actions = [vector.action_space.sample() for _ in range(256)]
        vector.reset(seed=0)
        next_step = AutoresetMode(vector.metadata["autoreset_mode"]) is AutoresetMode.NEXT_STEP
        ended, chunk = [0, 0], [max(1, _CHUNK_STEPS // num_envs)]

        def work() -> int:
            flags = []
            for n in range(chunk[0]):
                _, _, terminated, truncated, _ = vector.step(actions[n & 255])
                flags.append((terminated, truncated))
            ends = sum(int((a | b).sum()) for a, b in flags)
            steps = chunk[0] * num_envs - (ends if next_step else 0)  # the row after an end is a reset
            ended[0], ended[1] = ended[0] + ends, ended[1] + steps
            return steps

        return _timed(work, chunk, seconds, ended)
    finally:
        vector.close()


def random_group(blueprint: Blueprint, seconds: float) -> Loop | None:
    """shoal's own group under random actions: beside `bare_environment`, what the group itself costs. None where actions are masked."""
    spec, num_envs = blueprint.spec, blueprint.config.sampling.group_size or 1
    if spec.action_mask != "none":
        return None
    group = blueprint.group(0)
    try:
        empty = np.zeros((0, *spec.action.shape), random_action(spec.action, np.random.default_rng(0)).dtype)
        group.restore(GroupState(np.zeros(num_envs, CURSOR), [empty] * num_envs, [None] * num_envs))
        rng = np.random.default_rng(0)
        actions = [np.stack([random_action(spec.action, rng) for _ in range(num_envs)]) for _ in range(256)]
        out = allocate(spec, num_envs)
        ended, chunk = [0, 0], [max(1, _CHUNK_STEPS // num_envs)]

        def work() -> int:
            steps = ends = 0
            for n in range(chunk[0]):
                step = group.step(actions[n & 255], out)
                ends += len(step.ended)
                steps += num_envs if step.valid_B.all() else int(step.valid_B.sum())
            ended[0], ended[1] = ended[0] + ends, ended[1] + steps
            return steps

        return _timed(work, chunk, seconds, ended)
    finally:
        group.close()


def _timed(work: Callable[[], int], chunk: list[int], seconds: float, ended: list[int]) -> Loop:
    """Repeats of `work`, whose number of rounds `chunk` is cut where a round is slow. `ended`: episodes and steps so far."""
    whole, chunk[0] = chunk[0], 2
    round_seconds = max(repeat(work, 0.0)[-1][0].wall / 2, 1e-9)
    chunk[0] = max(1, min(whole, int(min(_CHUNK_SECONDS, seconds / 6) / round_seconds)))
    found = repeat(work, seconds)
    wall = 1e6 * median([spent.wall / steps for spent, steps in found])
    return Loop(cpu_us(found), wall, ended[1] / ended[0] if ended[0] else math.nan)


# ---- network -------------------------------------------------------------------------------------------------------------
def why_no_bare_network(spec: EnvironmentSpec, config: RunConfig, device: str) -> str:
    """What about a run's network the bare loop has not, so that the two would not be compared like with like; nothing where they are alike."""
    policy, (leaf, *others) = config.policy, spec.observation
    convolved = policy.encoder != "mlp" and (
        leaf.is_image or (policy.encoder != "auto" and leaf.kind == "box" and len(leaf.shape) in (2, 3))
    )
    reasons = {
        "it has several observations, or a network of the user's own": bool(others) or policy.network is not None,
        f"its actions are {spec.action.kind}": spec.action.kind not in ("discrete", "box"),
        "it explores with gsde": policy.exploration == "gsde",
        "its observations are choices, which the network takes as one-hot and no bare loop does": leaf.kind.endswith("discrete"),
        "its network has a memory": policy.memory != "none",
        "its actor and critic share the encoder otherwise than by default": policy.share_encoder not in (None, convolved),
        "its images do not go through a CNN, or what does is no uint8 image": convolved != leaf.is_image,
        "it learns on a device of its own, a bare loop on the processor": device != "cpu",
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


class BareNetwork:
    """The network of a run as plain nn.Sequential: `trunk` (images; shared), `actor`, `critic`. Raises ValueError where it has no such form.

    device: of the learner, as torch names its type.
    """

    def __init__(self, spec: EnvironmentSpec, config: RunConfig, device: str) -> None:
        if reason := why_no_bare_network(spec, config, device):
            raise ValueError(reason)
        policy, (leaf,) = config.policy, spec.observation
        image = leaf.is_image
        self.leaf, self.discrete = leaf, spec.action.kind == "discrete"
        self.num_actions = spec.action.nvec[0] if self.discrete else spec.action.size
        self.trunk = _cnn(leaf.shape, policy.encoder == "compact_cnn") if image else nn.Identity()
        sizes = [256 if policy.encoder == "compact_cnn" else 512] if image else [leaf.size, *policy.hidden_sizes]
        self.actor = _mlp(sizes, policy.activation, self.num_actions)
        self.critic = _mlp(sizes, policy.activation, 1)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))
        self.parameters = [*self.trunk.parameters(), *self.actor.parameters(), *self.critic.parameters(), self.log_std]

    def rows(self, count: int) -> Tensor:
        """Observations: uint8 images or float32 vectors [count, ...]."""
        if self.leaf.is_image:
            return torch.randint(0, 256, (count, *self.leaf.shape), dtype=torch.uint8)
        return torch.randn(count, self.leaf.size)

    def features(self, rows: Tensor) -> Tensor:
        value: Tensor = self.trunk(rows.float() / 255.0) if rows.dtype is torch.uint8 else self.trunk(rows)
        return value


def _mlp(sizes: list[int], activation: str, out: int) -> nn.Sequential:
    kinds: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), kinds[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], out))


def _cnn(shape: tuple[int, ...], compact: bool) -> nn.Sequential:
    if len(shape) != 3 or shape[1] < 36 or shape[2] < 36:
        raise ValueError("no bare loop is written for images that are not [channels, height, width] of 36 pixels and more")
    layers: list[nn.Module] = []
    channels = shape[0]
    for width, kernel, stride, padding in COMPACT if compact else NATURE:
        layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
        channels = width
    flat = nn.Sequential(*layers, nn.Flatten())
    size = flat(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*flat, nn.Linear(size, 256 if compact else 512), nn.ReLU())


def bare_forward(network: BareNetwork, num_envs: int, seconds: float) -> float:
    """Microseconds per environment step of the actor's forward pass at [B, ...]."""
    rows = network.rows(num_envs)

    def work() -> int:
        with torch.inference_mode():
            for _ in range(50):
                network.actor(network.features(rows))
        return 50 * num_envs

    with _one_thread():
        return cpu_us(repeat(work, seconds))


def bare_update(network: BareNetwork, config: RunConfig, seconds: float) -> float:
    """Microseconds per environment step of an update: values, then epochs of minibatches down the clipped objective."""
    plan = Plan.of(config)
    n = plan.rollout_length * plan.group_size * plan.batch_rollouts
    extra = plan.group_size * plan.batch_rollouts
    algorithm = config.algorithm
    epochs, size = int(getattr(algorithm, "epochs", 1)), int(getattr(algorithm, "minibatch_size", None) or n)
    value_coefficient, entropy_coefficient = getattr(algorithm, "value_coefficient", 0.5), getattr(algorithm, "entropy_coefficient", 0.0)
    rows = network.rows(n + extra)
    action = torch.randint(0, network.num_actions, (n,)) if network.discrete else torch.randn(n, network.num_actions)
    old, advantage, target = torch.full((n,), -1.0), torch.randn(n), torch.randn(n)
    optimizer = torch.optim.Adam(network.parameters, lr=1e-6, eps=1e-5)

    def log_prob(features: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        output = network.actor(features)
        if network.discrete:
            logits = functional.log_softmax(output, -1)
            return logits.gather(1, chosen[:, None]).squeeze(1), -(logits.exp() * logits).sum(-1).mean()
        z = (chosen - output) / network.log_std.exp()
        return -0.5 * z.square().sum(-1) - network.log_std.sum(), network.log_std.sum()

    def work() -> int:
        with torch.no_grad():
            for part in torch.split(rows, 4096):
                network.critic(network.features(part))
        for _ in range(epochs):
            for index in torch.split(torch.randperm(n), size):
                features = network.features(rows[index])
                new, entropy = log_prob(features, action[index])
                ratio, a = (new - old[index]).exp(), advantage[index]
                policy_loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
                value_loss = (network.critic(features).squeeze(-1) - target[index]).square().mean()
                loss = policy_loss + value_coefficient * value_loss - entropy_coefficient * entropy
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters, algorithm.max_gradient_norm)
                optimizer.step()
        return n

    with _one_thread():
        return cpu_us(repeat(work, seconds))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
