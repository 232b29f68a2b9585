"""The policy bundle: weights, normaliser statistics, spaces and preprocessing together, so that what was evaluated is what is served.

Two files, in a directory of their own or in `policy/` of a checkpoint: `policy.safetensors` (every parameter and buffer; the normaliser's
statistics are buffers) and `policy.json` (EnvironmentSpec, PolicyConfig, EnvConfig, and the SHA-256 of the other file).
Legend: N observations of a batch.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.config import EnvConfig, PolicyConfig
from shoal.environments.spaces import MASK, to_environment_action
from shoal.errors import CheckpointError, ConfigError, RunError
from shoal.evaluation.given import read_generator, read_observation, read_state
from shoal.files import MANIFEST, CheckpointDirectory, arrays_from_bytes, load_checkpoint, to_json, without_replay, write_arrays
from shoal.networks.acting import ACTOR_CRITIC, Acting, NetworkKind
from shoal.networks.policy import Network, build_acting, named_tensors, policy_size
from shoal.types import Array, Arrays, EnvironmentSpec

FORMAT = 1
NAME = "policy"


def save_bundle(
    directory: Path,
    tensors: Mapping[str, Array],
    spec: EnvironmentSpec,
    policy_config: PolicyConfig,
    env_config: EnvConfig,
    kind: NetworkKind = ACTOR_CRITIC,
) -> None:
    """Write a bundle into `directory` (made if need be), which may be `policy/` of a checkpoint's staging: its commit then makes it durable.

    Args:
      tensors: every parameter and buffer of the policy by name, as `networks.named_tensors` has them.
      kind: what its algorithm learned.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / f"{NAME}.safetensors"
    write_arrays(weights, tensors)
    description = {
        "format": FORMAT,
        "spec": spec.to_json(),
        "policy": policy_config.model_dump(mode="json"),
        "env": env_config.model_dump(mode="json"),
        "network": {"kind": kind.name, "options": dict(kind.options)},
        "weights_file_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (directory / f"{NAME}.json").write_text(to_json(description), encoding="utf-8")


class LoadedPolicy:
    """A trained policy as its user meets it: observations and actions are the environment's own.

    Runs on the CPU in the calling process; torch's thread settings and global random state are left alone.

    Attributes:
      spec, policy_config, env_config: what it was trained on and how.
      network: the torch module.
      environment: the user's own factory, where it was given as a Python object.
    """

    def __init__(
        self,
        network: Acting,
        spec: EnvironmentSpec,
        policy_config: PolicyConfig,
        env_config: EnvConfig,
        environment: Callable[..., Any] | None = None,
    ) -> None:
        self.network = network
        self.spec = spec
        self.policy_config = policy_config
        self.env_config = env_config
        self.environment = environment
        self._rng = np.random.default_rng()

    def predict(
        self,
        observation: Any,
        state: Arrays | None = None,
        *,
        deterministic: bool = True,
        action_mask: Any = None,
        rng: np.random.Generator | int | None = None,
    ) -> tuple[Any, Arrays | None]:
        """Choose an action for one observation, or for each of a batch (every leaf with one more leading dimension).

        Args:
          observation: as the environment returns it (after its preprocessing), Dict and Tuple nested as there.
          state: what the previous call of this episode returned; None at its beginning, and always of a policy that remembers nothing. Of a batch, the
            rows [i] of its arrays are to be zeroed where an episode begins while others go on.
          deterministic: the best action as the policy knows it: the most probable one, or that of the highest value. Else one is drawn as in training:
            from the policy's distribution; of TD3 with its noise; of DQN and R2D2 at random with the share that training ends with
            (`algorithm.epsilon_final`; of a ladder `epsilon_base ^ (1 + epsilon_exponent)`), among what `action_mask` allows, and the best one otherwise.
          action_mask: True where allowed, for environments whose mask is in `info`; one that is in the observation is found there.
          rng: what actions are drawn from, or a seed; by default a generator of this object's own.
        Returns:
          (action, state): the action as `env.step` takes it, with a leading dimension for a batch; the state for the next call, None where there is none.
        Raises:
          SchemaError: an observation, state, mask or rng that does not fit the policy's; names the part, what was expected and what came. An observation
            with NaN, Inf or a choice that its space does not have is one.
        """
        arrays, single = read_observation(self.spec, observation, action_mask)
        num, spec = len(next(iter(arrays.values()))), self.network.noise
        memory = self.initial_memory(num)
        kept = read_state(state, memory, (num, spec.size) if spec.per == "rollout" else None)
        generator, noise = read_generator(rng, self._rng), None
        if not deterministic:
            noise = kept["noise"] if "noise" in kept else self.draw_noise(num, generator)
            if spec.per == "rollout":  # gSDE keeps its matrix for an episode
                kept["noise"] = noise
        action_N, after = self.act(arrays, noise, {name: kept.get(name, beginning) for name, beginning in memory.items()})
        return (action_N[0] if single else action_N), {**kept, **after} or None

    def act(self, arrays: Arrays, noise: Array | None, memory: Arrays) -> tuple[Array, Arrays]:
        """Actions [N, ...] for the environment, and the policy's recurrent state after them.

        Args:
          arrays: by field name, [N, *shape], with `action_mask` where there is one.
          noise: [N, size] float32, None for the most probable action.
          memory: the recurrent state before, see `initial_memory`.
        """
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
            before = {name: torch.from_numpy(array) for name, array in memory.items()}
            mask = inputs.pop(MASK, None)
            if noise is None:
                action, after = self.network.greedy_step(inputs, before, mask)
            else:
                action, _, after = self.network.step(inputs, before, torch.from_numpy(noise), mask)
        return to_environment_action(self.spec.action, action.numpy()), {name: value.numpy() for name, value in after.items()}

    def initial_memory(self, num: int) -> Arrays:
        """The recurrent state at an episode's beginning, [num, ...] by name; empty where the policy has none."""
        return {name: value.numpy() for name, value in self.network.initial_state(num).items()}

    def draw_noise(self, num: int, rng: np.random.Generator) -> Array:
        """Exploration noise for one step (or, with gSDE, for one episode) of `num` environments: float32 [num, size]."""
        return self.network.noise.draw((num,), rng, self.network.epsilon)


def load_policy(path: str | Path, *, network: Network | None = None, environment: Callable[..., Any] | None = None) -> LoadedPolicy:
    """The policy of a run's directory (its newest whole checkpoint), of one checkpoint, or of a bundle.

    Args:
      network, environment: the user's own factories, where they were given as Python objects that no import path leads to.
    Raises:
      CheckpointError: no whole one, or of another format.
      RunError: `path` is none of the three.
    """
    description, tensors = _read(Path(path))
    try:
        spec = EnvironmentSpec.from_json(description["spec"])
        policy_config = PolicyConfig.model_validate(description["policy"])
        env_config = EnvConfig.model_validate(description["env"])
        described = description.get("network", {"kind": "actor_critic", "options": {}})
        kind = NetworkKind(described["kind"], described["options"])
        if network is None and policy_config.network is None:
            _fits(spec, policy_config, tensors, kind)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ConfigError) as error:
        raise CheckpointError(f"{path}: {NAME}.json does not describe a policy that this version of shoal knows: {error}") from error
    module = build_acting(spec, policy_config, network, kind=kind)
    expected = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
    stored = {name: array.shape for name, array in tensors.items()}
    if expected != stored:
        odd = sorted({name for name, _ in expected.items() ^ stored.items()})
        raise CheckpointError(f"{path}: the network that was built does not fit the weights at {', '.join(odd[:5])}; was its code changed?")
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            tensor.copy_(torch.from_numpy(tensors[name]))
    module.requires_grad_(False)
    module.eval()
    return LoadedPolicy(module, spec, policy_config, env_config, environment)


def _fits(spec: EnvironmentSpec, config: PolicyConfig, tensors: Arrays, kind: NetworkKind) -> None:
    """Raise ValueError, before anything is allocated, where the policy described has another size than the weights that are there."""
    stored = sum(array.size for array in tensors.values())
    choices = sum(n for leaf in spec.observation for n in leaf.nvec)  # each is an input, and so has weights
    if choices > stored or (wanted := policy_size(spec, config, kind)) != stored:
        raise ValueError(f"it describes {choices if choices > stored else wanted:,} weights, and {stored:,} are there")


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """policy.json and the tensors, checked before use."""
    try:
        read = _source(path)
        description = json.loads(read(f"{NAME}.json"))
        weights = read(f"{NAME}.safetensors")
        if description["format"] != FORMAT:
            raise CheckpointError(f"{path} has bundle format {description['format']}; this version of shoal reads format {FORMAT}")
        whole = description["weights_file_sha256"] == hashlib.sha256(weights).hexdigest()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: the policy bundle is damaged: {error}") from error
    if not whole:
        raise CheckpointError(f"{path}: {NAME}.safetensors does not have the SHA-256 that {NAME}.json says")
    return description, arrays_from_bytes(weights)


def _source(path: Path) -> Callable[[str], bytes]:
    """Reads the bundle's files, from whichever kind of directory `path` is."""
    if (path / f"{NAME}.json").is_file():
        return lambda file: (path / file).read_bytes()
    if (path / MANIFEST).is_file():
        loaded = load_checkpoint(path, wanted=without_replay)
    else:
        directory = CheckpointDirectory(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if not directory.paths():
            raise RunError(f"{path} is no run with a checkpoint, no checkpoint and no policy bundle")
        loaded = directory.newest(without_replay)
        for warning in loaded.warnings:
            warnings.warn(warning, RuntimeWarning, stacklevel=4)
    return lambda file: loaded.read(f"{NAME}/{file}")
