"""What algorithms share: the base class, values and masks of a batch, minibatches, the optimizer, schedules and metrics.

Legend: T rows, N environments (columns), M rows of a minibatch, P parameters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from shoal.algorithms.ranks import ALONE, Ranks, share_of
from shoal.algorithms.sequences import Evaluated, SequenceMinibatch, evaluate_unrolled, sequence_minibatches
from shoal.config import AlgorithmConfig
from shoal.experience.batch import Batch
from shoal.networks.evaluation import Evaluation
from shoal.networks.policy import Policy
from shoal.networks.recurrent import RecurrentPolicy
from shoal.types import Array

LIGHT_ROWS = 4096  # up to so many, numpy has less to do
GATHERED_BYTES = 2**22  # observations of one batch that are gathered in one go
CHUNK_NUMBERS = 2**24  # observation numbers of one forward pass over a whole batch: bounds its memory


@dataclass(frozen=True)
class UpdateContext:
    """What an update may depend on besides the batch and the algorithm's state.

    Attributes:
      update: updates before this one.
      progress: share of the schedule that is done, in [0, 1].
      rng: the stream of this update's permutations; the only source of randomness.
    """

    update: int
    progress: float
    rng: np.random.Generator


ConfigT = TypeVar("ConfigT", bound=AlgorithmConfig)
Column = TypeVar("Column", Tensor, Array)


class Algorithm(Generic[ConfigT]):
    """Turns batches into updates of the policy. A subclass writes `update`, and names its `Config` and `modes` where they differ.

    Given the policy, the state and (batch, context), an update is deterministic: no clock, no global random numbers.

    Attributes:
      Config: model of its settings.
      modes: of the engine, the default first: `sync` (one policy version per batch) or `async` (samples lag behind).
      remembers: whether it trains policies with memory: it takes values and evaluations from `values_TN`, `evaluate_TN` and `epoch`, which unroll them.
      shares: whether several learners can divide its work: it gives `self.ranks` to `values_TN`, `evaluate_TN` and `epoch`, and goes down the gradient that
        `Optimizer.gather` adds up.
      ranks: who of them it is.
    """

    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    modes: ClassVar[tuple[Literal["sync", "async"], ...]] = ("sync",)
    remembers: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    ranks: Ranks = ALONE

    def __init__(self, policy: Policy, config: ConfigT) -> None:
        self.policy = policy
        self.config = config
        self.optimizer = Optimizer.of(policy, config)

    def update(self, batch: Batch, context: UpdateContext) -> dict[str, float]:
        """Change the policy's parameters in place; returns metrics by the names of Stable-Baselines3, without `train/`."""
        raise NotImplementedError(f"{type(self).__name__}.update")

    def join(self, ranks: Ranks) -> None:
        """Learn as one of several from now on."""
        self.ranks = self.optimizer.ranks = ranks

    def get_state(self) -> dict[str, Tensor]:
        """Everything besides the policy's tensors that the next update depends on: copies, by name, flat."""
        return self.optimizer.get_state()

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `get_state`, exactly."""
        self.optimizer.set_state(state)


class Optimizer:
    """Adam (Kingma & Ba 2014, arXiv:1412.6980) or RMSProp behind a clipped gradient norm, on one flat vector.

    The policy's parameters become views of one tensor [P], so that a step is ten operations whatever the number of layers. Writing into
    parameters, or giving them other data, is noticed and works.

    Args:
      epsilon: added to the root of the second moment.
      max_gradient_norm: the gradient is scaled down to this Euclidean norm.
    Attributes:
      parameters: those that are trained, in the order of the flat vector.
      gradients: a place for the gradient of each, all of them views of one tensor [P]; `descend` takes what was written there without a copy.
      steps: taken; skipped: refused, because loss or gradient was not finite (parameters and moments stay as they were).
      ranks: with whom `gather` adds up.
    """

    def __init__(self, policy: nn.Module, *, epsilon: float, max_gradient_norm: float, kind: Literal["adam", "rmsprop"] = "adam") -> None:
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self._epsilon, self._max_norm, self._kind = epsilon, max_gradient_norm, kind
        self._betas = (0.9, 0.999) if kind == "adam" else (0.0, 0.99)
        self._flatten()
        self.first = torch.zeros_like(self._flat)
        self.second = torch.zeros_like(self._flat)
        self._gradient = torch.zeros_like(self._flat)
        parts = torch.split(self._gradient, [p.numel() for p in self.parameters])
        self.gradients = [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]
        self._count = torch.zeros((), device=self._flat.device)
        self.steps = 0
        self.skipped = 0
        self.ranks: Ranks = ALONE

    @classmethod
    def of(cls, module: nn.Module, config: AlgorithmConfig, kind: Literal["adam", "rmsprop"] = "adam") -> Optimizer:
        """Of all that is trained in `module`, as the configuration says."""
        return cls(module, epsilon=config.adam_epsilon, max_gradient_norm=config.max_gradient_norm, kind=kind)

    def _flatten(self) -> None:
        self._flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        place = 0
        self._places: list[int] = []
        for parameter in self.parameters:
            parameter.data = self._flat[place : place + parameter.numel()].view(parameter.shape)
            self._places.append(parameter.data_ptr())
            place += parameter.numel()

    def _look(self) -> None:
        if [p.data_ptr() for p in self.parameters] != self._places:
            self._flatten()

    @property
    def flat(self) -> Tensor:
        """The parameters as one vector [P], of which they are views."""
        self._look()
        return self._flat

    def step(self, loss: Tensor, learning_rate: float) -> float:
        """One step down the gradient of `loss` (a scalar); returns the gradient's norm before clipping, non-finite where the step was refused."""
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True, allow_unused=True)
        return self.descend(gradients, learning_rate, loss)

    def gather(
        self, gradients: Sequence[Tensor], numbers: Mapping[str, Tensor | float], share: float
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The gradient of a minibatch as one vector [P], and numbers of it, from what each learner found for its part.

        Args:
          gradients: of `parameters`, in their order and shapes: those of a mean over this learner's rows. numbers: such means.
          share: of its rows in those of all, see `share_of`.
        """
        gradient = self._one_vector(gradients)
        if self.ranks.size == 1:
            return gradient, numbers
        told = torch.tensor([float(number) for number in numbers.values()], device=gradient.device)
        vector = torch.cat([gradient, told]).mul_(share)
        self.ranks.sum(vector)
        return vector[: len(gradient)], dict(zip(numbers, vector[len(gradient) :].tolist(), strict=True))

    def _one_vector(self, gradients: Sequence[Tensor]) -> Tensor:
        return self._gradient if gradients is self.gradients else torch.cat([g.reshape(-1) for g in gradients])

    def descend(self, gradients: Sequence[Tensor], learning_rate: float, loss: Tensor | float, share: float | None = None) -> float:
        """The same from the gradients of `parameters`, in their order and shapes. `loss` is only looked at: the step is refused where it is
        not finite. Of several learners: the same step for all, from what each found for its rows.

        Args:
          share: of these rows in those of all learners; by default all have as many.
        """
        gradient, said = self.gather(gradients, {"loss": loss}, 1.0 / self.ranks.size if share is None else share)
        return self.follow(gradient, learning_rate, said["loss"])

    def follow(self, gradient: Tensor, learning_rate: float, loss: Tensor | float) -> float:
        """The same from one vector [P], which is overwritten."""
        self._look()
        norm = float(gradient.norm())
        if not (math.isfinite(norm) and math.isfinite(loss.item() if isinstance(loss, Tensor) else loss)):
            self.skipped += 1
            return norm
        if norm > self._max_norm:
            gradient.mul_(self._max_norm / (norm + 1e-6))
        self.steps += 1
        self._apply(gradient, learning_rate)
        return norm

    def _apply(self, gradient: Tensor, learning_rate: float) -> None:
        beta1, beta2 = self._betas
        if self._kind == "adam":
            self._count.fill_(self.steps)
            torch._fused_adam_(
                [self._flat], [gradient], [self.first], [self.second], [], [self._count], lr=learning_rate, beta1=beta1, beta2=beta2,
                weight_decay=0.0, eps=self._epsilon, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self._flat.addcdiv_(gradient, self.second.sqrt().add_(self._epsilon), value=-learning_rate)

    def get_state(self) -> dict[str, Tensor]:
        """Copies: optimizer/first, optimizer/second float32 [P]; optimizer/steps, optimizer/skipped int64 []."""
        return {
            "optimizer/first": self.first.clone(),
            "optimizer/second": self.second.clone(),
            "optimizer/steps": torch.tensor(self.steps),
            "optimizer/skipped": torch.tensor(self.skipped),
        }

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `get_state`."""
        self.first.copy_(state["optimizer/first"])
        self.second.copy_(state["optimizer/second"])
        self.steps = int(state["optimizer/steps"])
        self.skipped = int(state["optimizer/skipped"])


def discount_TN(batch: Batch, gamma: float) -> Tensor:
    """gamma, and 0 where the episode terminated: float32 [T, N]."""
    return gamma * (~batch.terminated_TN).float()


def cut_TN(batch: Batch) -> Tensor:
    """Where row t + 1 does not follow row t: an episode ended, or the next row is not valid. bool [T, N]."""
    cut = batch.ended_TN.clone()
    cut[:-1] |= ~batch.valid_TN[1:]
    return cut


def _chunks(batch: Batch, num_rows: int) -> list[slice]:
    numbers = sum(tensor[0, 0].numel() for tensor in batch.observation.values())
    size = max(1, CHUNK_NUMBERS // max(1, numbers))
    return [slice(begin, begin + size) for begin in range(0, num_rows, size)]


def _next_value_TN(policy: Policy, batch: Batch, value_T1N: Tensor) -> Tensor:
    """V of true successors; of episodes' last observations only truncated ones are evaluated (a discount of 0 hides the others)."""
    final_value_F = torch.zeros(len(batch.final_index), device=value_T1N.device)
    if len(batch.final_index):
        t, n = batch.final_index.unbind(1)
        wanted = (batch.truncated_TN[t, n] & ~batch.terminated_TN[t, n]).nonzero().squeeze(1)
        if len(wanted):
            final_value_F[wanted] = policy.value({name: value[wanted] for name, value in batch.final_observation.items()})
    return batch.next_value_TN(value_T1N, final_value_F)


def _put_together(found: Sequence[Tensor], columns: slice, share: float, num_columns: int, ranks: Ranks) -> tuple[Tensor, ...]:
    """[T, N] each, from what every learner found for its columns."""
    whole = found[0].new_zeros(len(found), len(found[0]), num_columns)
    if share:
        whole[:, :, columns] = torch.stack(list(found))
    ranks.sum(whole)
    return whole.unbind()


@torch.no_grad()
def values_TN(policy: Policy, batch: Batch, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """V of every row's observation, and V of its true successor: float32 [T, N] each, without gradient. Each of several learners evaluates some of
    the columns, and all get all."""
    if ranks.size > 1:
        columns, share = share_of(batch.valid_TN.shape[1], ranks)
        mine = values_TN(policy, batch.columns(columns))
        value_TN, next_value_TN = _put_together(mine, columns, share, batch.valid_TN.shape[1], ranks)
        return value_TN, next_value_TN
    if isinstance(policy, RecurrentPolicy):
        now = evaluate_unrolled(policy, batch, CHUNK_NUMBERS)
        return now.value_TN, now.next_value_TN
    rows = {name: value.flatten(0, 1) for name, value in batch.observation.items()}
    T, N = batch.reward_TN.shape
    parts = [policy.value({name: value[part] for name, value in rows.items()}) for part in _chunks(batch, (T + 1) * N)]
    value_T1N = torch.cat(parts).view(T + 1, N)
    return value_T1N[:-1], _next_value_TN(policy, batch, value_T1N)


def evaluate_TN(policy: Policy, batch: Batch, ranks: Ranks = ALONE, *, for_gradient: bool = False) -> Evaluated:
    """log pi of the actions taken, and values; `for_gradient` keeps what a gradient of all rows needs. Each of several learners evaluates
    some of the columns; all get all, but for `whole`, which is of a learner's own."""
    if ranks.size > 1:
        T, N = batch.valid_TN.shape
        columns, share = share_of(N, ranks)
        at_once = -(-N // ranks.size) * (T + 1) * sum(tensor[0, 0].numel() for tensor in batch.observation.values())
        mine = evaluate_TN(policy, batch.columns(columns), for_gradient=for_gradient and at_once <= CHUNK_NUMBERS)  # the same for all
        log_prob_TN, value_TN, next_value_TN = _put_together(mine[:3], columns, share, N, ranks)
        return Evaluated(log_prob_TN, value_TN, next_value_TN, mine.whole)
    if isinstance(policy, RecurrentPolicy):
        return evaluate_unrolled(policy, batch, CHUNK_NUMBERS, for_gradient=for_gradient)
    rows = {name: value.flatten(0, 1) for name, value in batch.observation.items()}
    mask = None if batch.action_mask is None else batch.action_mask.flatten(0, 1)
    action = torch.cat([batch.action, torch.zeros_like(batch.action[:1])]).flatten(0, 1)
    T, N = batch.reward_TN.shape
    parts = _chunks(batch, (T + 1) * N)
    evaluations = []
    with torch.set_grad_enabled(for_gradient and len(parts) == 1):
        for part in parts:
            observation = {name: value[part] for name, value in rows.items()}
            evaluations.append(policy.evaluate(observation, action[part], None if mask is None else mask[part]))
    with torch.no_grad():
        value_T1N = torch.cat([e.value for e in evaluations]).view(T + 1, N)
        log_prob_T1N = torch.cat([e.log_prob for e in evaluations]).view(T + 1, N)
        next_value_TN = _next_value_TN(policy, batch, value_T1N)
    whole = evaluations[0] if for_gradient and len(parts) == 1 else None
    return Evaluated(log_prob_T1N[:-1], value_T1N[:-1], next_value_TN, whole)


@dataclass(frozen=True)
class Minibatch:
    """M valid rows. `rows["name"]` gives the [M] column that was passed to `minibatches` under that name.

    Attributes:
      observation: by field name, [M, ...]. action: [M, ...]. action_mask: bool [M, A] or None.
      whole: of several learners, the columns over the rows of all. share: of these rows in those.
    """

    observation: dict[str, Tensor]
    action: Tensor
    action_mask: Tensor | None
    columns: dict[str, Tensor]
    whole: dict[str, Tensor]
    share: float

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.action)

    def evaluate(self, policy: Policy) -> Evaluation:
        return policy.evaluate(self.observation, self.action, self.action_mask)


def epoch(
    policy: Policy, batch: Batch, size: int | None, rng: np.random.Generator, ranks: Ranks = ALONE, **columns_TN: Tensor
) -> Iterator[Minibatch] | Iterator[SequenceMinibatch]:
    """One epoch in minibatches: of single rows, or of whole sequences where the policy has memory. Either has `evaluate(policy)`, the columns by
    name, a length, and the share that this learner's part is."""
    if isinstance(policy, RecurrentPolicy):
        return sequence_minibatches(batch, size, rng, ranks, **columns_TN)
    return minibatches(batch, size, rng, ranks, **columns_TN)


def minibatches(
    batch: Batch, size: int | None, rng: np.random.Generator, ranks: Ranks = ALONE, **columns_TN: Tensor
) -> Iterator[Minibatch]:
    """One epoch: every valid row once, in random order, in minibatches of nearly equal length, none longer than `size` (None: all in one).
    Of several learners each gets its part of every minibatch.

    Args:
      columns_TN: float32 [T, N] each, such as advantages; `rows[name]` holds their rows.
    """
    T = len(batch.valid_TN)
    columns = torch.stack([column.reshape(-1) for column in columns_TN.values()]) if columns_TN else None
    observation = {name: value[:T].flatten(0, 1) for name, value in batch.observation.items()}
    mask = None if batch.action_mask is None else batch.action_mask[:T].flatten(0, 1)
    action = batch.action.flatten(0, 1)
    valid = batch.valid_TN.reshape(-1).nonzero().squeeze(1)
    order = valid[torch.from_numpy(rng.permutation(len(valid))).to(valid.device)]
    if not len(order):
        return
    count = 1 if size is None else max(1, math.ceil(len(order) / size))
    num_bytes = sum(value.nbytes for value in observation.values())
    # Small rows are gathered once per epoch and then only cut; images one minibatch at a time.
    for part in (order,) if num_bytes < GATHERED_BYTES else order.tensor_split(count):
        cuts = count if len(part) == len(order) else 1
        wholes = part.tensor_split(cuts)
        shares = [share_of(len(whole), ranks) for whole in wholes]
        mine = part if ranks.size == 1 else torch.cat([whole[rows] for whole, (rows, _) in zip(wholes, shares, strict=True)])
        lengths = [rows.stop - rows.start for rows, _ in shares]
        observations = {name: torch.split(value.index_select(0, mine), lengths) for name, value in observation.items()}
        actions = torch.split(action.index_select(0, mine), lengths)
        masks = None if mask is None else torch.split(mask.index_select(0, mine), lengths)
        gathered = () if columns is None else columns.index_select(1, part).tensor_split(cuts, 1)
        for i, (rows, share) in enumerate(shares):
            whole = dict(zip(columns_TN, gathered[i], strict=True)) if gathered else {}
            yield Minibatch(
                {name: parts[i] for name, parts in observations.items()},
                actions[i],
                None if masks is None else masks[i],
                whole if ranks.size == 1 else {name: column[rows] for name, column in whole.items()},
                {} if ranks.size == 1 else whole,
                share,
            )


def schedule(value: float, kind: Literal["constant", "linear"], progress: float) -> float:
    """`value`, or the line from it to 0 at progress 1."""
    return value * (1.0 - progress) if kind == "linear" else value


def light(*columns: Tensor) -> tuple[Any, ...]:
    """Columns [M] of a minibatch as numpy sees them where they are short and in memory: numpy takes a third of torch's time for a few hundred
    numbers. The same tensors where they are not."""
    if columns[0].is_cuda or len(columns[0]) > LIGHT_ROWS:
        return columns
    return tuple(column.numpy() for column in columns)


def heavy(column: Column) -> Tensor:
    """A tensor of what came of `light` columns."""
    return column if isinstance(column, Tensor) else torch.from_numpy(column)


def library(column: Column) -> Any:
    """numpy or torch, whose functions of the same name do the same."""
    return torch if isinstance(column, Tensor) else np


def normalised(advantage: Column, among: Tensor | None = None) -> Column:
    """Zero mean and unit deviation over a minibatch, whose rows are these, or `among`; of one row it stays as it is."""
    if len(advantage if among is None else among) < 2:
        return advantage
    if among is not None:
        deviation, mean = torch.std_mean(among)
        return (advantage - float(mean)) / (float(deviation) + 1e-8)
    centred = advantage - advantage.sum() / len(advantage)
    return centred / (((centred * centred).sum() / (len(advantage) - 1)) ** 0.5 + 1e-8)  # type: ignore[no-any-return]


def explained_variance(value: Tensor, target: Tensor) -> float:
    """1 - Var(target - value) / Var(target): 1 is perfect, 0 no better than a constant; 0 where the target does not vary."""
    variance = float(target.var(correction=0)) if len(target) else 0.0
    return 1.0 - float((target - value).var(correction=0)) / variance if variance > 0 else 0.0


class Means:
    """Means of metrics (numbers, or columns of them) over the minibatches of an update; tensors are read once, at the end."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, list[Tensor | float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        for name, value in metrics.items():
            self._sums[name].append(value.detach() if isinstance(value, Tensor) else value)

    def result(self) -> dict[str, float]:
        return {name: _mean(values) for name, values in self._sums.items()}


def _mean(values: list[Tensor | float]) -> float:
    if isinstance(values[0], Tensor) and values[0].ndim:  # whole columns, which cost less in one go
        return float(torch.cat([value for value in values if isinstance(value, Tensor)]).mean())
    return float(np.mean([float(value) for value in values]))
