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
from shoal.errors import CheckpointError, ConfigError, RunError, SchemaError
from shoal.files import MANIFEST, CheckpointDirectory, arrays_from_bytes, load_checkpoint, to_json, write_arrays
from shoal.networks.acting import ACTOR_CRITIC, Acting, NetworkKind
from shoal.networks.policy import Network, build_acting, named_tensors, policy_size
from shoal.types import Array, Arrays, EnvironmentSpec, LeafSpec

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
          state: what the previous call of this episode returned; None at its beginning. Of a batch, the rows [i] of its arrays are to be zeroed
            where an episode begins while others go on.
          deterministic: the most probable action; else one is drawn.
          action_mask: True where allowed, for environments whose mask is in `info`; one that is in the observation is found there.
          rng: what actions are drawn from, or a seed; by default a generator of this object's own.
        Returns:
          (action, state): the action as `env.step` takes it, with a leading dimension for a batch.
        Raises:
          SchemaError: an observation or a state that does not fit the policy's; names the leaf, what was expected and what came.
        """
        arrays, single = self._as_batch(observation, action_mask)
        num = len(next(iter(arrays.values())))
        before, noise = self._remembered(num, state), None
        if not deterministic:
            noise, state = self._noise(num, state, np.random.default_rng(rng) if isinstance(rng, int) else rng or self._rng)
        action_N, after = self.act(arrays, noise, before)
        if after:
            state = {**(state or {}), **after}
        return (action_N[0] if single else action_N), state

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

    def _remembered(self, num: int, state: Arrays | None) -> Arrays:
        memory = self.initial_memory(num)
        if not state:
            return memory
        for name, beginning in memory.items():
            if name not in state or np.shape(state[name]) != beginning.shape:
                came = "none" if name not in state else list(np.shape(state[name]))
                raise SchemaError(f"state: expected {name} {list(beginning.shape)} (what the last call returned, or None), got {came}")
        return {name: np.ascontiguousarray(state[name], np.float32) for name in memory}

    def draw_noise(self, num: int, rng: np.random.Generator) -> Array:
        """Exploration noise for one step (or, with gSDE, for one episode) of `num` environments: float32 [num, size]."""
        return self.network.noise.draw((num,), rng)

    def _noise(self, num: int, state: Arrays | None, rng: np.random.Generator) -> tuple[Array, Arrays | None]:
        if self.network.noise.per == "step":
            return self.draw_noise(num, rng), state
        if not state or "noise" not in state:  # gSDE keeps its matrix for an episode
            state = {**(state or {}), "noise": self.draw_noise(num, rng)}
        return state["noise"], state

    def _as_batch(self, observation: Any, action_mask: Any) -> tuple[Arrays, bool]:
        """Field arrays [N, *shape], and whether it was a single observation."""
        leaves = self.spec.observation
        values = {leaf.name("observation"): _pick(observation, leaf) for leaf in leaves}
        if self.spec.action_mask == "observation" and action_mask is None:
            action_mask = _pick(observation, LeafSpec((MASK,), "multi_binary", "int8", (self.spec.mask_size,)))
        single = all(values[leaf.name("observation")].ndim == len(leaf.shape) for leaf in leaves)
        arrays = {leaf.name("observation"): _rows(values[leaf.name("observation")], leaf, single) for leaf in leaves}
        if action_mask is not None and self.spec.mask_size:
            parts = action_mask if isinstance(action_mask, tuple) else (action_mask,)
            arrays[MASK] = np.concatenate(parts, -1).reshape(-1, self.spec.mask_size) != 0
        if len({len(array) for array in arrays.values()}) > 1:
            raise SchemaError(f"the parts of a batch differ in length: { {name: len(array) for name, array in arrays.items()} }")
        return arrays, single


def _pick(observation: Any, leaf: LeafSpec) -> Array:
    """A leaf of a nested observation."""
    value = observation
    for key in leaf.path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise SchemaError(
                f"{leaf.name('observation')}: expected a part {key!r} in the observation, got {type(value).__name__}"
            ) from None
    return np.asarray(value)


def _rows(value: Array, leaf: LeafSpec, single: bool) -> Array:
    """[N, *shape] in the leaf's dtype, of one observation or of a batch."""
    shape = value.shape if single else value.shape[1:]
    if shape != leaf.shape or value.ndim != len(leaf.shape) + (not single):
        expected = f"shape {list(leaf.shape)}, or [N, ...] of it in every part for a batch"
        raise SchemaError(f"{leaf.name('observation')}: expected {expected}; got {list(value.shape)}")
    stored = np.ascontiguousarray(value, leaf.dtype) if value.dtype.kind in "biuf" else value
    if value.dtype.kind not in "biuf" or (stored.dtype.kind != "f" and (stored != value).any()):
        raise SchemaError(f"{leaf.name('observation')}: expected {leaf.dtype}; got {value.dtype} with values that do not fit into it")
    return stored.reshape(-1, *leaf.shape)


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
        loaded = load_checkpoint(path)
    else:
        directory = CheckpointDirectory(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if not directory.paths():
            raise RunError(f"{path} is no run with a checkpoint, no checkpoint and no policy bundle")
        loaded = directory.newest()
        for warning in loaded.warnings:
            warnings.warn(warning, RuntimeWarning, stacklevel=4)
    return lambda file: loaded.read(f"{NAME}/{file}")
