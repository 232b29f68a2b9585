"""What algorithms share that learn from a replay: the base class, what they are given, target networks, and how much is done at random.

Legend: M rows of a sample, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from shoal.algorithms.base import Optimizer, UpdateContext
from shoal.algorithms.ranks import ALONE, Ranks
from shoal.config import OffPolicyConfig, PolicyConfig, QConfig
from shoal.networks.acting import NetworkKind
from shoal.networks.policy import named_tensors
from shoal.types import EnvironmentSpec

Metrics = dict[str, Tensor | float]


@dataclass(frozen=True)
class Transitions:
    """What one optimizer step learns from, on the learner's device.

    Attributes:
      observation, next_observation: by field name, [M, ...]; the next is that of n steps later, or the true last one of its episode.
      action_mask, next_action_mask: bool [M, A] or None.
      action: [M, ...] as stored.
      return_M: float32, the discounted sum of the rewards in between. discount_M: float32 of the value after them; 0 where the episode terminated.
      weight_M: float32, of importance: at most 1.
    """

    observation: dict[str, Tensor]
    action_mask: Tensor | None
    action: Tensor
    return_M: Tensor
    discount_M: Tensor
    next_observation: dict[str, Tensor]
    next_action_mask: Tensor | None
    weight_M: Tensor

    def __len__(self) -> int:
        return len(self.return_M)


@dataclass(frozen=True)
class SequenceRows:
    """What one optimizer step of an algorithm with memory learns from, on the learner's device: M sequences of L rows, as in `SequenceSample`.

    Attributes:
      burn_in: first rows, which warm the recurrent state up and are not trained.
      observation: by field name, [L+1, M, ...]. action_mask: bool [L+1, M, A] or None. action: as stored, [L, M, ...].
      begins_L1M: bool, the recurrent state is the initial one before this row.
      valid_LM: bool, what may be trained. return_LM, discount_LM: float32. successor_LM: int64, the row to bootstrap from.
      state: by name, [M, H], before row 0.
      weight_M: float32, of importance: at most 1.
      share: of the valid rows behind the burn-in in those of all learners.
    """

    burn_in: int
    observation: dict[str, Tensor]
    action_mask: Tensor | None
    action: Tensor
    begins_L1M: Tensor
    valid_LM: Tensor
    return_LM: Tensor
    discount_LM: Tensor
    successor_LM: Tensor
    state: dict[str, Tensor]
    weight_M: Tensor
    share: float = 1.0


class Beginning(NamedTuple):
    """Where a rollout begins, as far as it decides how much of it is done at random.

    env_steps: of the whole run by then, as the group's own count of rollouts says.
    """

    group: int
    num_groups: int
    env_steps: int
    learning_starts: int


ConfigT = TypeVar("ConfigT", bound=OffPolicyConfig)


class OffPolicyAlgorithm(Generic[ConfigT]):
    """Turns samples of a replay into optimizer steps. A subclass writes `learn`, says which `network` it needs and how it explores, and
    names its `optimizers` and `vectors`, which are its state.

    Given the policy, the state and (rows, context), a step is deterministic: no clock, no global random numbers.

    Attributes:
      Config: model of its settings. modes: of the engine, the default first.
      remembers: whether its policy has a memory, which it trains on sequences; `replay.sequence_length` and `replay.burn_in` say on which.
      shares: whether several learners can divide its work: `learn` goes down gradients with `Optimizer.descend`, which adds up (and is given the
        share of sequences); what is random for each row comes from `noise`. ranks: who of them this is.
    """

    Config: ClassVar[type[OffPolicyConfig]] = OffPolicyConfig
    modes: ClassVar[tuple[Literal["sync", "async"], ...]] = ("sync", "async")
    remembers: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    ranks: Ranks = ALONE

    def __init__(self, policy: Any, config: ConfigT) -> None:
        self.policy = policy
        self.config = config

    @classmethod
    def make(cls, policy: Any, config: Any, spec: EnvironmentSpec, networks: PolicyConfig, seed: int) -> Self:
        """With whatever else it learns besides the policy. seed: of its initial parameters, [0, 2**63)."""
        return cls(policy, config)

    @classmethod
    def network(cls, config: Any) -> NetworkKind:
        """Which policy is learned."""
        raise NotImplementedError(f"{cls.__name__}.network")

    @classmethod
    def epsilon(cls, config: Any, beginning: Beginning) -> float:
        """Share of random actions in a rollout: all of them until learning starts."""
        return float(beginning.env_steps < beginning.learning_starts)

    def learn(self, rows: Any, context: UpdateContext) -> tuple[Metrics, Tensor | None]:
        """One optimizer step: changes parameters in place. Returns metrics by the names of Stable-Baselines3, without `train/`, and the new priority
        of each row, or sequence, [M], not negative, where the algorithm has one.

        Args:
          rows: Transitions, or SequenceRows where the algorithm remembers. Their memory is written again once the next are drawn: what is kept of
            them beyond this call, metrics and priorities included, is in tensors of the algorithm's own.
        """
        raise NotImplementedError(f"{type(self).__name__}.learn")

    def join(self, ranks: Ranks) -> None:
        """Learn as one of several from now on."""
        self.ranks = ranks
        for optimizer in self.optimizers().values():
            optimizer.ranks = ranks

    def noise(self, context: UpdateContext, num: int, size: int, draws: int = 1) -> Tensor:
        """Standard normal numbers for this learner's M rows, float32 [draws * M, size]: its part of those that one learner would draw for all rows, the
        rows of each learner behind those of the one before."""
        drawn = context.rng.standard_normal((draws, self.ranks.size * num, size), np.float32)
        return torch.from_numpy(drawn[:, self.ranks.rank * num : (self.ranks.rank + 1) * num].reshape(-1, size))

    def optimizers(self) -> dict[str, Optimizer]:
        """All that it has, by what the names of their state begin with; the first is the one whose steps are counted."""
        raise NotImplementedError(f"{type(self).__name__}.optimizers")

    def vectors(self) -> dict[str, Tensor]:
        """What it learns besides the policy, by name: target networks, critics. The tensors themselves, which `set_state` writes into."""
        return {}

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps taken, of the optimizer that the others follow, and refused since loss or gradient was not finite, of all."""
        optimizers = list(self.optimizers().values())
        return optimizers[0].steps, sum(optimizer.skipped for optimizer in optimizers)

    def get_state(self) -> dict[str, Tensor]:
        """Everything besides the policy's tensors that the next step depends on: copies, by name, flat."""
        state = {name: vector.clone() for name, vector in self.vectors().items()}
        for prefix, optimizer in self.optimizers().items():
            state |= {prefix + name: value for name, value in optimizer.get_state().items()}
        return state

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `get_state`, exactly."""
        for name, vector in self.vectors().items():
            vector.copy_(state[name])
        for prefix, optimizer in self.optimizers().items():
            optimizer.set_state({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Target(Generic[ModuleT]):
    """A copy of a network that follows it. What it holds is one vector, `flat`: the P trained parameters in the order of the optimizer's, of which its
    own are views, and behind them its persistent buffers. Parameters that are not trained are as in the network."""

    def __init__(self, module: ModuleT) -> None:
        trained = [p.requires_grad for p in module.parameters()]
        self.module: ModuleT = copy.deepcopy(module).requires_grad_(False)
        parameters = [p for p, is_trained in zip(self.module.parameters(), trained, strict=True) if is_trained]
        self._buffers, self._followed = _buffers(self.module), _buffers(module)
        tensors = [*parameters, *self._buffers]
        self._size = sum(p.numel() for p in parameters)
        self.flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        for tensor, part in zip(tensors, torch.split(self.flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.data = part.view(tensor.shape)

    def follow(self, flat: Tensor, tau: float = 1.0) -> None:
        """Go the share `tau` of the way to the parameters `flat` [P]: all of it copies (Polyak averaging otherwise). Buffers are copied."""
        mine = self.flat[: self._size]
        if tau == 1.0:
            mine.copy_(flat)
        else:
            mine.lerp_(flat, tau)
        with torch.no_grad():
            for buffer, followed in zip(self._buffers, self._followed, strict=True):
                buffer.copy_(followed)

    def follow_by(self, config: QConfig, optimizer: Optimizer) -> None:
        """What is due after an optimizer step: a share of the way, or a copy now and then."""
        if config.target_tau is not None:
            self.follow(optimizer.flat, config.target_tau)
        elif optimizer.steps % config.target_update_steps == 0:
            self.follow(optimizer.flat)


def _buffers(module: nn.Module) -> list[Tensor]:
    """Those that are saved with it. One that is replaced instead of written into is lost sight of."""
    return [tensor for tensor in named_tensors(module).values() if not isinstance(tensor, nn.Parameter)]
