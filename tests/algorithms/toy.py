"""A toy world without gymnasium: the observation names the action that is rewarded. And a loop that trains on it, like the engine's in small.

Legend: T rows, N environments, K components of the action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from shoal.algorithms import Algorithm, UpdateContext
from shoal.experience.batch import Batch
from shoal.networks.policy import Policy
from shoal.types import EnvironmentSpec, LeafSpec

CHOICES = 3  # values that each component of the target takes
COMPONENTS = 2
IMAGE = (6, 6)


def box(shape: tuple[int, ...], low: float, high: float, dtype: str = "float32", path: tuple[str | int, ...] = ()) -> LeafSpec:
    return LeafSpec(path, "box", dtype, shape, low=(low,), high=(high,))


def discrete(n: int, start: int = 0, path: tuple[str | int, ...] = ()) -> LeafSpec:
    return LeafSpec(path, "discrete", "int64", (), nvec=(n,), start=(start,))


OBSERVATIONS: dict[str, tuple[LeafSpec, ...]] = {
    "box": (box((COMPONENTS,), -1.0, 1.0),),
    "box_matrix_float64": (box((COMPONENTS, 1), -1.0, 1.0, "float64"),),
    "image": (box((*IMAGE, 1), 0, 255, "uint8"),),
    "discrete": (discrete(CHOICES**COMPONENTS, start=5),),
    "multi_discrete": (LeafSpec((), "multi_discrete", "int64", (COMPONENTS,), nvec=(CHOICES,) * COMPONENTS, start=(0,) * COMPONENTS),),
    "multi_binary": (LeafSpec((), "multi_binary", "int8", (CHOICES * COMPONENTS,)),),
    "dict": (box(IMAGE, 0, 255, "uint8", ("camera", 0)), discrete(CHOICES, 0, ("second",))),
}
ACTIONS: dict[str, LeafSpec] = {
    "discrete": discrete(CHOICES**COMPONENTS),
    "multi_discrete": LeafSpec((), "multi_discrete", "int64", (COMPONENTS,), nvec=(CHOICES,) * COMPONENTS, start=(0,) * COMPONENTS),
    "multi_binary": LeafSpec((), "multi_binary", "int8", (COMPONENTS,)),
    "box": box((COMPONENTS,), -1.0, 1.0),
}


def spec_of(observation: str, action: str) -> EnvironmentSpec:
    return EnvironmentSpec(f"identity-{observation}-{action}", OBSERVATIONS[observation], ACTIONS[action])


def _picture(column: np.ndarray) -> np.ndarray:
    """[M] in 0..CHOICES -> [M, *IMAGE] uint8, one bright band."""
    picture = np.zeros((len(column), *IMAGE), np.uint8)
    width = IMAGE[1] // CHOICES
    for i in range(CHOICES):
        picture[column == i, :, i * width : (i + 1) * width] = 255
    return picture


def observe(kind: str, target_MK: np.ndarray) -> dict[str, np.ndarray]:
    """Observation fields [M, ...] that name the target, int64 [M, COMPONENTS] in 0..CHOICES."""
    if kind == "box":
        return {"observation": (target_MK - 1).astype(np.float32)}
    if kind == "box_matrix_float64":
        return {"observation": (target_MK - 1.0)[..., None]}
    if kind == "image":
        half = IMAGE[0] // 2
        first, second = _picture(target_MK[:, 0]), _picture(target_MK[:, 1])
        return {"observation": np.concatenate([first[:, :half], second[:, half:]], 1)[..., None]}
    if kind == "discrete":
        return {"observation": 5 + target_MK[:, 0] * CHOICES + target_MK[:, 1]}
    if kind == "multi_discrete":
        return {"observation": target_MK}
    if kind == "multi_binary":
        return {"observation": (target_MK[..., None] == np.arange(CHOICES)).astype(np.int8).reshape(len(target_MK), -1)}
    return {"observation/camera/0": _picture(target_MK[:, 0]), "observation/second": target_MK[:, 1]}


def correct(kind: str, action: np.ndarray, target_MK: np.ndarray) -> np.ndarray:
    """Reward of each action, [M]: 1 for the one that was named. Boxes: 1 - mean absolute distance to (target - 1) / 2."""
    if kind == "discrete":
        return (action == target_MK[:, 0] * CHOICES + target_MK[:, 1]).astype(np.float32)
    if kind == "multi_discrete":
        return (action == target_MK).mean(1, dtype=np.float32)
    if kind == "multi_binary":
        return (action == (target_MK > 0)).mean(1, dtype=np.float32)
    return (1.0 - np.abs(np.clip(action, -1, 1) - (target_MK - 1) / 2).mean(1)).astype(np.float32)


@dataclass
class Identity:
    """N worlds in lockstep; an episode ends every `length` steps."""

    observation: str
    action: str
    num_envs: int
    rng: np.random.Generator
    length: int = 5

    def rollout(self, policy: Policy, num_steps: int) -> Batch:
        T, N = num_steps, self.num_envs
        target = self.rng.integers(0, CHOICES, (T + 1, N, COMPONENTS))
        observation = {
            name: value.reshape(T + 1, N, *value.shape[1:])
            for name, value in observe(self.observation, target.reshape(-1, COMPONENTS)).items()
        }
        actions, log_probs, rewards = [], [], []
        for t in range(T):
            noise = draw(policy, N, self.rng)
            with torch.inference_mode():
                action, log_prob = policy.act({name: torch.from_numpy(value[t]) for name, value in observation.items()}, noise)
            actions.append(action.numpy())
            log_probs.append(log_prob.numpy())
            rewards.append(correct(self.action, action.numpy(), target[t]))
        terminated = np.zeros((T, N), np.bool_)
        terminated[self.length - 1 :: self.length] = True
        return batch_of(observation, np.stack(actions), np.stack(log_probs), np.stack(rewards), terminated)

    def score(self, policy: Policy) -> float:
        """Mean reward of the mode, over every target."""
        target = np.array(list(product(range(CHOICES), repeat=COMPONENTS)))
        with torch.inference_mode():
            observation = {name: torch.from_numpy(value) for name, value in observe(self.observation, target).items()}
            return float(correct(self.action, policy.distribution(observation).mode().numpy(), target).mean())


def draw(policy: Policy, num_envs: int, rng: np.random.Generator) -> torch.Tensor:
    shape = (num_envs, policy.noise.size)
    uniform = policy.noise.kind == "uniform"
    return torch.from_numpy(rng.random(shape, np.float32) if uniform else rng.standard_normal(shape, np.float32))


def batch_of(
    observation: dict[str, np.ndarray],
    action: np.ndarray,
    log_prob: np.ndarray,
    reward: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    final: list[tuple[int, int, dict[str, np.ndarray]]] | None = None,
    action_mask: np.ndarray | None = None,
) -> Batch:
    """A batch from arrays; `final` lists (t, n, true last observation)."""
    fields = {
        name: np.stack([row[name] for _, _, row in final]) if final else np.zeros((0, *value.shape[2:]), value.dtype)
        for name, value in observation.items()
    }
    return Batch(
        observation={name: torch.from_numpy(value) for name, value in observation.items()},
        action_mask=None if action_mask is None else torch.from_numpy(action_mask),
        action=torch.from_numpy(action),
        log_prob_TN=torch.from_numpy(log_prob),
        reward_TN=torch.from_numpy(reward),
        terminated_TN=torch.from_numpy(terminated),
        truncated_TN=torch.from_numpy(np.zeros_like(terminated) if truncated is None else truncated),
        valid_TN=torch.from_numpy(np.ones_like(terminated) if valid is None else valid),
        policy_lag_TN=torch.zeros(terminated.shape, dtype=torch.int64),
        final_observation={name: torch.from_numpy(value) for name, value in fields.items()},
        final_index=torch.tensor([(t, n) for t, n, _ in final or []], dtype=torch.int64).reshape(-1, 2),
        policy_state={},
    )


def train(world: Identity, algorithm: Algorithm, updates: int, rollout_length: int = 20, done: Callable[[], bool] | None = None) -> int:
    """Updates taken until `done`, or `updates`."""
    for update in range(updates):
        batch = world.rollout(algorithm.policy, rollout_length)
        algorithm.update(batch, UpdateContext(update, update / updates, np.random.default_rng(update)))
        if done is not None and update % 5 == 4 and done():
            return update + 1
    return updates
