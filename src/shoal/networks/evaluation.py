"""What a training step asks of a policy about actions that were taken, and the gradient of whatever was made of the answers.

An algorithm computes its loss from `log_prob`, `entropy` and `value` [N] and says how the loss changes with each of them; `gradients` carries that
on to the parameters. Two ways give the same numbers up to rounding. `GraphEvaluation` leaves it to torch. `SmallEvaluation` has it written out:
with two MLPs of 64 units, torch spends more of a training step on some sixty graph nodes than on arithmetic. It knows only what is common and
simple: one vector through MLPs with tanh or relu, one discrete or an independent Gaussian action, on the CPU.

Legend: N rows, D features, A choices or action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from shoal.networks.by_hand import ACTIVATE, BACKWARD, product
from shoal.networks.encoders import MLP, Encoder
from shoal.networks.heads import ActionHead
from shoal.ops.distributions import HALF_LOG_2PI, MASKED_LOGIT


class Evaluation(Protocol):
    """Attributes: float32 [N] each, to be read as constants."""

    log_prob: Tensor
    entropy: Tensor
    value: Tensor

    def gradients(
        self, parameters: Sequence[Tensor], d_log_prob: Tensor, d_entropy: Tensor, d_value: Tensor, into: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor]:
        """The loss's gradient with respect to `parameters`, in their order and shapes, from its derivatives with respect to the three: [N] each.

        Once only; not after the parameters have changed, nor where the evaluation was made without gradient.

        Args:
          into: tensors of those shapes, zero before their first use (algorithms.base.Optimizer.gradients): may be written, and returned instead of new ones.
        """


class GraphEvaluation:
    """Whatever the policy is made of, by torch's graph: the three with the graph that made them, [N] each."""

    def __init__(self, log_prob: Tensor, entropy: Tensor, value: Tensor) -> None:
        self._outputs = (log_prob, entropy, value)
        self.log_prob, self.entropy, self.value = (output.detach() for output in self._outputs)

    def gradients(
        self, parameters: Sequence[Tensor], d_log_prob: Tensor, d_entropy: Tensor, d_value: Tensor, into: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor]:
        outputs, slopes = self._outputs, (d_log_prob, d_entropy, d_value)
        return torch.autograd.grad(outputs, parameters, slopes, allow_unused=True, materialize_grads=True)


class SmallNetwork:
    """The parts of a policy that `SmallEvaluation` computes with; see `small_network`."""

    def __init__(self, actor: MLP, critic: MLP | None, head: ActionHead, value_head: nn.Linear) -> None:
        self.actor, self.critic, self.head, self.value_head = actor, critic, head, value_head
        self.discrete = head.kind == "discrete"
        self.activate, self.backward = ACTIVATE[actor.activation], BACKWARD[actor.activation]

    def hidden(self, mlp: MLP, value: Tensor) -> list[Tensor]:
        """[N, D]: the input, and every hidden layer's output."""
        outputs = [value]
        for layer in mlp.linears:
            weight, bias = _parameters(layer)
            value = self.activate(torch.addmm(bias, value, weight.t()))
            outputs.append(value)
        return outputs

    def value_of(self, features: Tensor) -> Tensor:
        """V, [N], of the critic's last hidden layer [N, D]."""
        weight, bias = _parameters(self.value_head)
        return product(features, weight.t()).squeeze(1).add_(bias)

    def value(self, prepared: Tensor) -> Tensor:
        """V(x), [N], of prepared observations; to be called without gradient."""
        return self.value_of(self.hidden(self.critic or self.actor, prepared)[-1])


def _parameters(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias; `layer.weight` costs ten times as much."""
    parameters = layer._parameters
    return parameters["weight"], parameters["bias"]  # type: ignore[return-value]


def small_network(actor: nn.Module, critic: nn.Module | None, head: ActionHead, value_head: nn.Linear) -> SmallNetwork | None:
    """None where the parts are none of those that are known here."""
    if head.kind not in ("discrete", "box") or not _known(actor) or not (critic is None or _known(critic)):
        return None
    if critic is not None and critic.mlp.activation != actor.mlp.activation:
        return None
    return SmallNetwork(actor.mlp, None if critic is None else critic.mlp, head, value_head)


def _known(tower: nn.Module) -> TypeGuard[Encoder]:
    """Whether it is one vector's MLP; a subclass may do something else."""
    return type(tower) is Encoder and tower.single_vector is not None and tower.mlp.activation in ACTIVATE


class SmallEvaluation:
    """The same by hand.

    Args:
      value: the prepared observation, float32 [N, D]. action: as stored, int64 [N] or float32 [N, *shape]. mask: bool [N, A] or None.
    """

    @torch.no_grad()
    def __init__(self, network: SmallNetwork, value: Tensor, action: Tensor, mask: Tensor | None) -> None:
        self._network = network
        self._actor = network.hidden(network.actor, value)
        self._critic = self._actor if network.critic is None else network.hidden(network.critic, value)
        self.value = network.value_of(self._critic[-1])
        if network.discrete:
            self._choose(action, mask)
        else:
            self._deviate(action)

    def _choose(self, action: Tensor, mask: Tensor | None) -> None:
        """Choices come first, [A, N], since numpy walks long rows; it takes a third of torch's time for a few hundred numbers."""
        weight, bias = _parameters(self._network.head.linear)
        logits = product(weight, self._actor[-1].t()).numpy()
        logits += bias.numpy()[:, None]
        self._allowed = None if mask is None else mask.numpy().T
        if self._allowed is not None:
            logits = np.where(self._allowed, logits, np.float32(MASKED_LOGIT))
        logits -= logits.max(0)
        self._probs = np.exp(logits)
        total = self._probs.sum(0)
        self._probs /= total
        self._log_probs = np.subtract(logits, np.log(total), out=logits)
        self._place = action.numpy() * logits.shape[1] + np.arange(logits.shape[1])
        self._entropy = np.negative((self._probs * self._log_probs).sum(0))
        self.log_prob, self.entropy = torch.from_numpy(self._log_probs.take(self._place)), torch.from_numpy(self._entropy)

    def _deviate(self, action: Tensor) -> None:
        weight, bias = _parameters(self._network.head.linear)
        mean, log_std = torch.addmm(bias, self._actor[-1], weight.t()), self._network.head.log_std
        self._inverse_std = torch.exp(-log_std)
        self._deviation = action.reshape(mean.shape).sub(mean).mul_(self._inverse_std)
        total, constant = log_std.sum(), mean.shape[1] * HALF_LOG_2PI
        self.log_prob = self._deviation.square().sum(1).mul_(-0.5).sub_(total + constant)
        self.entropy = (total + (constant + 0.5 * mean.shape[1])).expand(len(mean))

    @torch.no_grad()
    def gradients(
        self, parameters: Sequence[Tensor], d_log_prob: Tensor, d_entropy: Tensor, d_value: Tensor, into: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor]:
        network = self._network
        into = into or [torch.zeros_like(p) for p in parameters]
        found = dict(zip(parameters, into, strict=True))
        d_output = (
            self._choice_gradient(d_log_prob, d_entropy) if network.discrete else self._deviation_gradient(d_log_prob, d_entropy, found)
        )
        d_actor = _linear(network.head.linear, d_output, self._actor[-1], found)
        d_critic = _linear(network.value_head, d_value.unsqueeze(1), self._critic[-1], found)
        if network.critic is None:
            d_actor = d_actor + d_critic
        else:
            self._down(network.critic, d_critic, self._critic, found)
        self._down(network.actor, d_actor, self._actor, found)
        return into

    def _choice_gradient(self, d_log_prob: Tensor, d_entropy: Tensor) -> Tensor:
        """With respect to the logits z, [N, A]: d log p(a) / dz = 1[a] - p, and dH / dz = -p (log p + H)."""
        slope = d_log_prob.numpy()
        d_logits = self._log_probs + self._entropy
        d_logits *= d_entropy.numpy()
        d_logits += slope
        d_logits *= self._probs
        np.negative(d_logits, out=d_logits)
        d_logits.reshape(-1)[self._place] += slope
        if self._allowed is not None:
            d_logits[~self._allowed] = 0.0
        return torch.from_numpy(d_logits).t()

    def _deviation_gradient(self, d_log_prob: Tensor, d_entropy: Tensor, found: dict[Tensor, Tensor]) -> Tensor:
        """With respect to the mean: d log p / dm = (a - m) / s^2; and to log s: ((a - m) / s)^2 - 1, and 1 for the entropy."""
        slope = d_log_prob.unsqueeze(1)
        d_log_std = self._deviation.square().sub_(1.0).mul_(slope).sum(0).add_(d_entropy.sum())
        if (place := found.get(self._network.head.log_std)) is not None:
            place.copy_(d_log_std)
        return (self._deviation * slope).mul_(self._inverse_std)

    def _down(self, mlp: MLP, gradient: Tensor, outputs: list[Tensor], found: dict[Tensor, Tensor]) -> None:
        for place in reversed(range(len(mlp.linears))):
            gradient = self._network.backward(gradient, outputs[place + 1])
            gradient = _linear(mlp.linears[place], gradient, outputs[place], found, needed=place > 0)


def _linear(layer: nn.Linear, gradient: Tensor, value: Tensor, found: dict[Tensor, Tensor], *, needed: bool = True) -> Tensor:
    """A layer's own gradients into `found`; returns the gradient with respect to its input."""
    weight, bias = _parameters(layer)
    if (d_bias := found.get(bias)) is not None:  # else it is not trained
        torch.sum(gradient, 0, out=d_bias)
    if (d_weight := found.get(weight)) is not None:
        product(gradient.t(), value, d_weight)
    return product(gradient, weight) if needed else gradient
