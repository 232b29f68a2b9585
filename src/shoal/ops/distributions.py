"""What the policy's head describes. Sampling is a pure function of noise drawn outside, so that a rollout's actions depend on its stream only.

Every distribution is over a batch of N and has
    log_prob(action [N, *shape]) -> [N]      entropy() -> [N]
    mode() -> [N, *shape]                    sample(noise [N, noise size]) -> [N, *shape]
`noise` is float32: uniform in [0, 1) as `Generator.random(dtype=float32)` draws it for the discrete kinds, standard normal for the Gaussians.
Masks are bool, True where allowed. A masked choice has probability 0 (in float32, exactly), is never sampled, and passes no gradient; its
logit is a large finite number, so that nothing becomes NaN, and a row that allows nothing (padding) is uniform.
torch.distributions is not used: its construction and validation cost more than the whole network of a small policy.

Legend: N batch, A actions or mask entries, K components, D action dimensions, F features.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

MASKED_LOGIT = -1e8
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Distribution(Protocol):
    """What algorithms and actors know of a distribution over actions."""

    def log_prob(self, action: Tensor) -> Tensor: ...
    def entropy(self) -> Tensor: ...
    def mode(self) -> Tensor: ...
    def sample(self, noise: Tensor) -> Tensor: ...


class Categorical:
    """One choice out of A. Actions are int64 [N]; noise is uniform [N, 1].

    Args:
      logits: [N, A] float32, any real numbers.
      mask: [N, A] bool, True where allowed; None allows all.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        if mask is not None:
            logits = torch.where(mask, logits, MASKED_LOGIT)
        self.log_probs = torch.log_softmax(logits, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.log_probs.gather(-1, action.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """Inverse of the cumulative distribution: the first action whose cumulative probability is above the noise.

        The noise is scaled by the last cumulative sum (1 up to rounding). For float32 noise below 1 the product is below that sum too, so
        that the result is always in range and never of probability 0.
        """
        cumulative = self.log_probs.exp().cumsum(-1)
        return torch.searchsorted(cumulative, noise * cumulative[..., -1:], right=True).squeeze(-1)


@lru_cache(maxsize=64)
def _padding(nvec: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the k-th component's logits lie in their concatenation: index [K * max n], and which entries exist: bool [K, max n]."""
    widest = max(nvec)
    with torch.inference_mode(False):  # what is kept must serve training too, whoever asks first
        exists = torch.arange(widest) < torch.tensor(nvec)[:, None]
        index = torch.zeros(len(nvec), widest, dtype=torch.int64)
        index[exists] = torch.arange(sum(nvec))
        return index.flatten().to(device), exists.to(device)


class MultiCategorical:
    """K independent choices, the k-th out of nvec[k]. Actions are int64 [N, *shape] with K elements; noise is uniform [N, K].

    Args:
      logits: [N, sum(nvec)], component after component.
      nvec: number of choices of each component, in the action's C order.
      mask: [N, sum(nvec)] bool, or None.
      shape: of one action; (K,) by default.
    """

    def __init__(self, logits: Tensor, nvec: tuple[int, ...], mask: Tensor | None = None, shape: tuple[int, ...] | None = None) -> None:
        self.shape = (len(nvec),) if shape is None else shape
        if mask is not None:
            logits = torch.where(mask, logits, MASKED_LOGIT)
        if min(nvec) == max(nvec):
            self.choice = Categorical(logits.reshape(-1, len(nvec), nvec[0]))
        else:
            index, exists = _padding(nvec, logits.device)
            padded = logits[:, index].reshape(-1, *exists.shape)
            self.choice = Categorical(padded.masked_fill(~exists, 2 * MASKED_LOGIT))

    def log_prob(self, action: Tensor) -> Tensor:
        return self.choice.log_prob(action.flatten(1)).sum(-1)

    def entropy(self) -> Tensor:
        return self.choice.entropy().sum(-1)

    def mode(self) -> Tensor:
        return self.choice.mode().view(-1, *self.shape)

    def sample(self, noise: Tensor) -> Tensor:
        return self.choice.sample(noise.unsqueeze(-1)).view(-1, *self.shape)


class Bernoulli:
    """D independent bits. Actions are int8 [N, *shape] with D elements; noise is uniform [N, D].

    Args:
      logits: [N, D], of being 1.
      mask: [N, D] bool, True where the bit may be 1; None allows all.
      shape: of one action; (D,) by default.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None, shape: tuple[int, ...] | None = None) -> None:
        self.shape = logits.shape[1:] if shape is None else shape
        self.logits = logits if mask is None else torch.where(mask, logits, MASKED_LOGIT)

    def log_prob(self, action: Tensor) -> Tensor:
        return (action.flatten(1) * self.logits - functional.softplus(self.logits)).sum(-1)

    def entropy(self) -> Tensor:
        return (functional.softplus(self.logits) - self.logits * torch.sigmoid(self.logits)).sum(-1)

    def mode(self) -> Tensor:
        return (self.logits > 0).to(torch.int8).view(-1, *self.shape)

    def sample(self, noise: Tensor) -> Tensor:
        return (noise < torch.sigmoid(self.logits)).to(torch.int8).view(-1, *self.shape)


class DiagonalGaussian:
    """Independent normal components. Actions are float32 [N, *shape] with D elements; noise is standard normal [N, D].

    Args:
      mean: [N, D].
      log_std: [D] or [N, D].
      shape: of one action; (D,) by default.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, shape: tuple[int, ...] | None = None) -> None:
        self.shape = mean.shape[1:] if shape is None else shape
        self.mean, self.log_std = mean, log_std

    def log_prob(self, action: Tensor) -> Tensor:
        deviation = (action.reshape(self.mean.shape) - self.mean) * torch.exp(-self.log_std)
        return -0.5 * (deviation * deviation).sum(-1) - self.log_std.sum(-1) - self.mean.shape[1] * HALF_LOG_2PI

    def entropy(self) -> Tensor:
        return (self.log_std.sum(-1) + self.mean.shape[1] * (0.5 + HALF_LOG_2PI)).expand(len(self.mean))

    def mode(self) -> Tensor:
        return self.mean.view(-1, *self.shape)

    def sample(self, noise: Tensor) -> Tensor:
        return torch.addcmul(self.mean, noise, self.log_std.exp()).view(-1, *self.shape)


class StateDependentGaussian(DiagonalGaussian):
    """Generalised state-dependent exploration, gSDE (Raffin, Kober & Stulp 2020, arXiv:2005.05719, eq. 2 to 6).

    action = mean + E^T features with E_fd ~ N(0, sigma_fd^2), kept for a whole rollout: the same state gives the same action. As a
    distribution of one action it is normal with variance_d = sum_f (features_f * sigma_fd)^2. Noise is standard normal [N, F * D], of the
    same value in every step of a rollout.

    Args:
      mean: [N, D].
      log_std: [F, D].
      features: [N, F], of the layer before the mean; the variance's gradient does not flow into them.
      shape: of one action; (D,) by default.
    """

    EPSILON = 1e-6  # of the variance, where all features are 0

    def __init__(self, mean: Tensor, log_std: Tensor, features: Tensor, shape: tuple[int, ...] | None = None) -> None:
        self.features = features.detach()
        self.std_FD = log_std.exp()
        variance = (self.features * self.features) @ (self.std_FD * self.std_FD)
        super().__init__(mean, 0.5 * torch.log(variance + self.EPSILON), shape)

    def sample(self, noise: Tensor) -> Tensor:
        matrix_NFD = noise.view(-1, *self.std_FD.shape) * self.std_FD
        return (self.mean + torch.bmm(self.features.unsqueeze(1), matrix_NFD).squeeze(1)).view(-1, *self.shape)
