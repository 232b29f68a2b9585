"""The policy: one module from raw observations to a distribution over actions and a value; and how it is built, named and hashed.

Legend: N batch (environments, or rows of a minibatch), D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.config import PolicyConfig
from shoal.errors import ConfigError
from shoal.imports import load_object
from shoal.networks.acting import ACTOR_CRITIC, Acting, NetworkKind
from shoal.networks.computing import any_length, compiled
from shoal.networks.encoders import Encoder, orthogonal
from shoal.networks.evaluation import Evaluation, GraphEvaluation, SmallEvaluation, small_network
from shoal.networks.heads import ActionHead, NoiseSpec
from shoal.networks.inputs import Inputs
from shoal.networks.memory import Memory
from shoal.networks.off_policy import DeterministicPolicy, QPolicy, stochastic_policy
from shoal.networks.recurrent_q import RecurrentQPolicy
from shoal.ops.distributions import Distribution
from shoal.types import EnvironmentSpec, FieldSpec


class Policy(Acting):
    """Inputs, one encoder for both or one each, and two heads.

    Observations are dicts by field name (`observation`, `observation/camera/0`): [N, *leaf shape] with the environment's dtypes. Action masks
    are bool [N, A], True where allowed. All parameters and persistent buffers are float32: they lie on one flat board.

    Args:
      inputs: raw fields -> prepared tensors.
      actor: prepared tensors -> features [N, D] for the action head.
      critic: the same for the value; None shares the actor's.
      action_head, value_head: features -> distribution; features -> [N, 1].

    Attributes:
      noise: what one environment's sampling needs, see NoiseSpec.
    """

    def __init__(self, inputs: Inputs, actor: nn.Module, critic: nn.Module | None, action_head: ActionHead, value_head: nn.Linear) -> None:
        super().__init__()
        self.inputs, self.actor, self.critic = inputs, actor, critic
        self.action_head, self.value_head = action_head, value_head
        self.noise: NoiseSpec = action_head.noise
        self._small = small_network(actor, critic, action_head, value_head) if type(self) is Policy else None
        self._mixed = False
        self._outputs: Callable[..., tuple[Tensor, Tensor, Tensor]] = _outputs
        self._values: Callable[..., Tensor] = _values
        self._compiled = False

    def compute(self, *, mixed: bool = False, compile: bool = False) -> None:
        """From now on run the encoders in bfloat16 (`mixed`), and `evaluate` and `value` by torch.compile; see networks/computing.py.

        The gradients that are written out for small networks are then not used: they are float32, and of other operations.

        Raises:
          ConfigError: this is a policy of the user's own that says itself how its distribution or value is computed.
        """
        if not (mixed or compile):
            return
        own = [name for name in _COMPUTED if getattr(type(self), name) is not getattr(Policy, name)]
        if own:
            key = "learner.precision" if mixed else "learner.compile"
            raise ConfigError(
                f"{key}: {type(self).__name__} has its own {', '.join(own)}, which would not follow it; return a torch module with num_features "
                "from policy.network, or leave the key at its default"
            )
        self._small, self._mixed, self._compiled = None, mixed, compile
        if compile:
            self._outputs, self._values = compiled(_outputs), compiled(_values)

    def fields(self) -> list[FieldSpec]:
        """What acting emits into a rollout besides observations: the action as stored, and its log-probability."""
        return [self.action_head.field, FieldSpec("log_prob", "float32", (), "T")]

    def distribution(self, observation: Mapping[str, Tensor], action_mask: Tensor | None = None) -> Distribution:
        return self.action_head.forward(self._features(self.actor, self.inputs.forward(observation)), action_mask)

    def value(self, observation: Mapping[str, Tensor]) -> Tensor:
        """V(x), [N] float32, in the units of the (normalised) return."""
        if self._compiled:
            any_length(*observation.values())
        if self._small is not None and not torch.is_grad_enabled():
            (prepared,) = self.inputs.forward(observation).values()
            if not prepared.is_cuda:
                return self._small.value(prepared)
        return self._values(self, observation)

    def distribution_and_value(self, observation: Mapping[str, Tensor], action_mask: Tensor | None = None) -> tuple[Distribution, Tensor]:
        """Both from one pass over the inputs, and over the encoder where it is shared."""
        prepared = self.inputs.forward(observation)
        features = self._features(self.actor, prepared)
        value_features = features if self.critic is None else self._features(self.critic, prepared)
        return self.action_head.forward(features, action_mask), self._value(value_features)

    def evaluate(self, observation: Mapping[str, Tensor], action: Tensor, action_mask: Tensor | None = None) -> Evaluation:
        """The learner's hot path: log-probability of `action` as stored ([N, ...]), entropy and value, [N] each, and their gradient."""
        if self._small is not None and not action.is_cuda:
            (prepared,) = self.inputs.forward(observation).values()
            return SmallEvaluation(self._small, prepared, action, action_mask)
        if self._compiled:
            any_length(*observation.values(), action, action_mask)
        return GraphEvaluation(*self._outputs(self, observation, action, action_mask))

    def act(self, observation: Mapping[str, Tensor], noise: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The actors' hot path, to be called under `torch.inference_mode()`: actions as stored [N, ...] and their log-probabilities [N].

        Args:
          noise: float32 [N, noise.size].
        """
        distribution = self.distribution(observation, action_mask)
        action = distribution.sample(noise)
        return action, distribution.log_prob(action)

    def greedy(self, observation: Mapping[str, Tensor], action_mask: Tensor | None = None) -> Tensor:
        """The most probable action."""
        return self.distribution(observation, action_mask).mode()

    def _features(self, encoder: nn.Module, prepared: Mapping[str, Tensor]) -> Tensor:
        if not self._mixed:
            return encoder(prepared)  # type: ignore[no-any-return]
        device = next(iter(prepared.values())).device.type
        with torch.autocast(device, torch.bfloat16):
            features: Tensor = encoder(prepared)
        return features.float()

    def _value(self, features: Tensor) -> Tensor:
        value: Tensor = self.value_head(features)
        return value.squeeze(-1)


_COMPUTED = ("distribution", "value", "distribution_and_value", "evaluate")


def _outputs(
    policy: Policy, observation: Mapping[str, Tensor], action: Tensor, action_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probability, entropy, value: [N] each."""
    distribution, value = policy.distribution_and_value(observation, action_mask)
    return distribution.log_prob(action), distribution.entropy(), value


def _values(policy: Policy, observation: Mapping[str, Tensor]) -> Tensor:
    encoder = policy.actor if policy.critic is None else policy.critic
    return policy._value(policy._features(encoder, policy.inputs.forward(observation)))


Network = Callable[[EnvironmentSpec, PolicyConfig], nn.Module]


def build_policy(spec: EnvironmentSpec, config: PolicyConfig, network: Network | None = None, *, seed: int = 0) -> Policy:
    """The policy of an on-policy run; see `build_acting`."""
    policy = build_acting(spec, config, network, seed=seed)
    assert isinstance(policy, Policy)
    return policy


def build_acting(
    spec: EnvironmentSpec, config: PolicyConfig, network: Network | None = None, *, seed: int = 0, kind: NetworkKind = ACTOR_CRITIC
) -> Acting:
    """The policy of a run. The same arguments give the same parameters; torch's global generator is left as it was.

    Args:
      network: the user's own (see the package's docstring); the one of `config.network` by default, else the encoders of this package.
      seed: of the initial parameters, [0, 2**63).
      kind: what its algorithm learns.
    Raises:
      ConfigError: if the encoder does not fit the observation, or the network is not of the form described.
    """
    if network is None and config.network is not None:
        network = load_object(config.network)
        if not callable(network):
            raise ConfigError(f"policy.network: {config.network} is {type(network).__name__}, not a callable (spec, config)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = _default_policy(spec, config, kind) if network is None else _custom_policy(spec, config, network, kind)
    for name, tensor in named_tensors(policy).items():
        if tensor.dtype is not torch.float32:
            raise ConfigError(
                f"policy tensor {name} is {tensor.dtype}; parameters and persistent buffers must be float32 (register constants with persistent=False)"
            )
    return policy


def policy_size(spec: EnvironmentSpec, config: PolicyConfig, kind: NetworkKind = ACTOR_CRITIC) -> int:
    """Numbers in the tensors of this package's policy, found without allocating any.

    Raises:
      ConfigError: as `build_policy`; also where a layer is larger than any tensor can be.
    """
    try:
        with torch.device("meta"):
            return sum(tensor.numel() for tensor in named_tensors(_default_policy(spec, config, kind)).values())
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ConfigError(f"policy.hidden_sizes: no layer can have {config.hidden_sizes} units: {str(error).splitlines()[0]}") from error


def _image_fields(spec: EnvironmentSpec, config: PolicyConfig) -> frozenset[str]:
    """Fields that go through the CNN."""
    if config.encoder == "mlp":
        return frozenset()
    forced = config.encoder != "auto"
    images = {
        leaf.name("observation")
        for leaf in spec.observation
        if leaf.is_image or (forced and leaf.kind == "box" and len(leaf.shape) in (2, 3))
    }
    if forced and not images:
        shapes = ", ".join(f"{leaf.name('observation')} {leaf.kind} {leaf.shape}" for leaf in spec.observation)
        raise ConfigError(
            f"policy.encoder: {config.encoder} needs a box of two or three dimensions in the observation, got {shapes}; use auto or mlp"
        )
    return frozenset(images)


def _heads(spec: EnvironmentSpec, config: PolicyConfig, num_features: int, num_value_features: int) -> tuple[ActionHead, nn.Linear]:
    value_head = nn.Linear(num_value_features, 1)
    orthogonal(value_head, 1.0, config.orthogonal_init)
    return ActionHead(spec.action, num_features, config), value_head


def _default_policy(spec: EnvironmentSpec, config: PolicyConfig, kind: NetworkKind) -> Acting:
    images = _image_fields(spec, config)
    inputs = Inputs(spec, config.normalise_observations, images)
    share = bool(images) if config.share_encoder is None else config.share_encoder

    def encoder() -> Encoder:
        return Encoder(
            inputs.shapes, config.hidden_sizes, config.activation, config.orthogonal_init, compact=config.encoder == "compact_cnn"
        )

    if kind != ACTOR_CRITIC:
        return _off_policy(spec, config, inputs, encoder(), kind)
    if config.memory != "none":
        if config.share_encoder is False:
            raise ConfigError("policy.share_encoder: with policy.memory, actor and critic share encoder and memory; leave it out")
        return _remembering(spec, config, inputs, encoder())
    actor = encoder()
    critic = None if share else encoder()
    return Policy(inputs, actor, critic, *_heads(spec, config, actor.num_features, actor.num_features))


def _off_policy(spec: EnvironmentSpec, config: PolicyConfig, inputs: Inputs, encoder: nn.Module, kind: NetworkKind) -> Acting:
    if kind.name == "q" and config.memory != "none":
        return RecurrentQPolicy(spec, inputs, encoder, config.orthogonal_init, memory=_memory(config, encoder), **kind.options)
    make = {"q": QPolicy, "stochastic": stochastic_policy, "deterministic": DeterministicPolicy}[kind.name]
    policy: Acting = make(spec, inputs, encoder, config.orthogonal_init, **kind.options)
    return policy


def _remembering(spec: EnvironmentSpec, config: PolicyConfig, inputs: Inputs, encoder: nn.Module) -> Policy:
    """encoder: with its `num_features`."""
    from shoal.networks.recurrent import RecurrentPolicy

    memory = _memory(config, encoder)
    return RecurrentPolicy(inputs, encoder, memory, *_heads(spec, config, config.memory_size, config.memory_size))


def _memory(config: PolicyConfig, encoder: nn.Module) -> Memory:
    assert config.memory != "none"
    return Memory(config.memory, int(encoder.num_features), config.memory_size, config.orthogonal_init)  # type: ignore[arg-type]


def _custom_policy(spec: EnvironmentSpec, config: PolicyConfig, network: Network, kind: NetworkKind) -> Acting:
    trunk = network(spec, config)
    if isinstance(trunk, Policy) and kind == ACTOR_CRITIC:
        if config.memory != "none" and not trunk.initial_state(1):
            raise ConfigError(
                f"policy.memory: {type(trunk).__name__}, which policy.network made, is a whole policy without a place for a memory; return a torch "
                "module with num_features, to which the memory is added, or a RecurrentPolicy, or leave policy.memory at none"
            )
        return trunk
    num_features: Any = getattr(trunk, "num_features", None)
    if not isinstance(trunk, nn.Module) or not isinstance(num_features, int):
        raise ConfigError(
            "policy.network: expected a callable (spec, config) that returns a torch module with an integer attribute `num_features` "
            f"(or a Policy), got {type(trunk).__name__} with num_features {num_features!r}"
        )
    inputs = Inputs(spec, config.normalise_observations, _image_fields(spec, config))
    if kind != ACTOR_CRITIC:
        return _off_policy(spec, config, inputs, trunk, kind)
    if config.memory != "none":
        return _remembering(spec, config, inputs, trunk)
    return Policy(inputs, trunk, None, *_heads(spec, config, num_features, num_features))


def named_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sorted; a tensor that two names share appears once. No copies: writing changes the policy."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in sorted(policy.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def weights_sha256(policy: nn.Module) -> str:
    """SHA-256 over names, shapes and little-endian float32 bytes of `named_tensors`, in their order."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(policy).items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
