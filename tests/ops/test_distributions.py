"""Distributions against sums over every action, in python floats; sampling against the inverse of the cumulative distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.ops.distributions import Bernoulli, Categorical, DiagonalGaussian, MultiCategorical, StateDependentGaussian

from . import oracles

LARGEST = float(np.nextafter(np.float32(1), np.float32(0)))  # of Generator.random(dtype=float32)


def rows(seed: int, n: int, a: int, scale: float = 2.0) -> Tensor:
    return torch.from_numpy((np.random.default_rng(seed).normal(size=(n, a)) * scale).astype(np.float32))


def masks(seed: int, n: int, a: int) -> Tensor:
    """At least one allowed entry in each row."""
    rng = np.random.default_rng(seed + 1)
    mask = rng.random((n, a)) < 0.5
    mask[np.arange(n), rng.integers(0, a, n)] = True
    return torch.from_numpy(mask)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), a=st.integers(1, 6), masked=st.booleans())
def test_categorical_equals_a_sum_over_actions(seed: int, a: int, masked: bool) -> None:
    logits, mask = rows(seed, 4, a), masks(seed, 4, a)
    distribution = Categorical(logits, mask if masked else None)
    for n in range(4):
        p = oracles.softmax(logits[n].tolist(), mask[n].tolist() if masked else [True] * a)
        for action in range(a):
            found = distribution.log_prob(torch.full((4,), action))[n].item()
            assert (found == pytest.approx(math.log(p[action]), abs=1e-4)) if p[action] else found < -1e7
        assert distribution.entropy()[n].item() == pytest.approx(oracles.entropy(p), abs=1e-4)
        assert distribution.mode()[n].item() == int(np.argmax(p))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), a=st.integers(1, 6), masked=st.booleans(), u=st.floats(0, LARGEST, width=32))
def test_categorical_sample_inverts_the_cumulative_distribution(seed: int, a: int, masked: bool, u: float) -> None:
    logits, mask = rows(seed, 1, a), masks(seed, 1, a)
    action = Categorical(logits, mask if masked else None).sample(torch.tensor([[u]]))
    assert action.shape == (1,)
    assert action.dtype == torch.int64
    p = oracles.softmax(logits[0].tolist(), mask[0].tolist() if masked else [True] * a)
    below, above = p[: action.item()].sum(), p[: action.item() + 1].sum()
    assert below - 1e-5 <= u <= above + 1e-5
    assert p[action.item()] > 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_categorical_takes_actions_of_any_integer_type(dtype: torch.dtype) -> None:
    distribution = Categorical(rows(1, 3, 4))
    action = torch.tensor([0, 3, 1])
    assert torch.equal(distribution.log_prob(action.to(dtype)), distribution.log_prob(action))


def test_categorical_sampling_by_hand() -> None:
    distribution = Categorical(torch.log(torch.tensor([[0.25, 0.25, 0.5]])).expand(6, 3))
    noise = torch.tensor([[0.0], [0.2], [0.3], [0.49], [0.51], [LARGEST]])
    assert distribution.sample(noise).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("u", [0.0, 2.0**-149, 0.5, LARGEST])
def test_masked_actions_are_never_sampled_at_the_edges(u: float) -> None:
    mask = torch.tensor([[False, True, False, True, False]])
    for logits in (torch.zeros(1, 5), torch.tensor([[9.0, -9.0, 9.0, 0.0, 50.0]])):
        assert Categorical(logits, mask).sample(torch.tensor([[u]])).item() in (1, 3)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), a=st.integers(1, 40))
def test_the_largest_noise_stays_in_range(seed: int, a: int) -> None:
    """The cumulative sum may end just below or above 1."""
    action = Categorical(rows(seed, 64, a, 6.0)).sample(torch.full((64, 1), LARGEST))
    assert action.max() < a


def test_sampled_frequencies_are_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.6, 0.3])
    noise = ((torch.arange(1000) + 0.5) / 1000).unsqueeze(1)
    counts = Categorical(torch.log(p).expand(1000, 3)).sample(noise).bincount(minlength=3)
    assert (counts - 1000 * p).abs().max() <= 1


def test_masks_pass_no_gradient_and_no_nan() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    distribution = Categorical(logits, torch.tensor([[True, True, False], [False, False, False]]))
    (distribution.log_prob(torch.tensor([0, 0])).sum() + distribution.entropy().sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2] == 0
    assert logits.grad[0, 0] == pytest.approx(0.5)


def test_a_row_that_allows_nothing_is_uniform() -> None:
    distribution = Categorical(rows(1, 1, 4), torch.zeros(1, 4, dtype=torch.bool))
    assert distribution.entropy().item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("nvec", [(2, 2), (2, 3), (4, 1, 3), (3,)])
@pytest.mark.parametrize("masked", [False, True])
def test_multi_categorical_is_the_product_of_its_components(nvec: tuple[int, ...], masked: bool) -> None:
    logits = rows(3, 4, sum(nvec))
    mask = torch.cat([masks(7 + k, 4, n) for k, n in enumerate(nvec)], 1)
    joint = MultiCategorical(logits, nvec, mask if masked else None)
    parts = [Categorical(x, m if masked else None) for x, m in zip(logits.split(list(nvec), 1), mask.split(list(nvec), 1), strict=True)]
    for action in itertools.product(*map(range, nvec)):
        column = torch.tensor([action] * 4)
        expected = sum(part.log_prob(column[:, k]) for k, part in enumerate(parts))
        torch.testing.assert_close(joint.log_prob(column), expected)
    torch.testing.assert_close(joint.entropy(), torch.stack([part.entropy() for part in parts]).sum(0))
    assert torch.equal(joint.mode(), torch.stack([part.mode() for part in parts], 1))
    noise = torch.rand(4, len(nvec), generator=torch.Generator().manual_seed(1))
    expected_sample = torch.stack([part.sample(noise[:, k : k + 1]) for k, part in enumerate(parts)], 1)
    assert torch.equal(joint.sample(noise), expected_sample)
    assert joint.sample(noise).dtype == torch.int64


def test_multi_categorical_with_unequal_choices_and_nothing_allowed_stays_in_range() -> None:
    joint = MultiCategorical(torch.zeros(1, 5), (2, 3), torch.zeros(1, 5, dtype=torch.bool))
    assert joint.entropy().item() == pytest.approx(math.log(2) + math.log(3))
    assert joint.sample(torch.tensor([[LARGEST, LARGEST]])).tolist() == [[1, 2]]


def test_multi_categorical_keeps_the_actions_shape() -> None:
    nvec = (2, 3, 2, 3)
    joint = MultiCategorical(rows(1, 5, 10), nvec, shape=(2, 2))
    flat = MultiCategorical(rows(1, 5, 10), nvec)
    noise = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    action = joint.sample(noise)
    assert action.shape == joint.mode().shape == (5, 2, 2)
    assert flat.sample(noise).shape == (5, 4)
    torch.testing.assert_close(joint.log_prob(action), flat.log_prob(action.flatten(1)))
    assert torch.equal(joint.mode().flatten(1), flat.mode())


@pytest.mark.parametrize("masked", [False, True])
def test_bernoulli_equals_a_sum_over_bit_patterns(masked: bool) -> None:
    logits, mask = rows(5, 3, 3), torch.tensor([[True, False, True]] * 3)
    distribution = Bernoulli(logits, mask if masked else None)
    for n in range(3):
        one = [
            1 / (1 + math.exp(-x)) if allowed or not masked else 0.0
            for x, allowed in zip(logits[n].tolist(), mask[n].tolist(), strict=True)
        ]
        joint = []
        for bits in itertools.product((0, 1), repeat=3):
            p = math.prod(q if bit else 1 - q for q, bit in zip(one, bits, strict=True))
            found = distribution.log_prob(torch.tensor([bits] * 3, dtype=torch.int8))[n].item()
            assert (found == pytest.approx(math.log(p), abs=1e-4)) if p else found < -1e7
            joint.append(p)
        assert distribution.entropy()[n].item() == pytest.approx(oracles.entropy(np.array(joint)), abs=1e-4)
        assert distribution.mode()[n].tolist() == [int(q > 0.5) for q in one]


def test_bernoulli_sampling_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.25 / 0.75, 1.0, 3.0]])).expand(4, 3)
    noise = torch.tensor([[0.0, 0.0, 0.0], [0.24, 0.49, 0.74], [0.26, 0.51, 0.76], [LARGEST] * 3])
    action = Bernoulli(logits).sample(noise)
    assert action.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert action.dtype == Bernoulli(logits).mode().dtype == torch.int8


def test_a_masked_bit_is_never_set() -> None:
    distribution = Bernoulli(torch.full((2, 2), 50.0), torch.tensor([[True, False]] * 2))
    assert distribution.sample(torch.tensor([[0.0, 0.0], [LARGEST, LARGEST]])).tolist() == [[1, 0], [1, 0]]
    assert distribution.mode().tolist() == [[1, 0], [1, 0]]
    assert Bernoulli(torch.zeros(1, 1)).mode().item() == 0


def test_bernoulli_keeps_the_actions_shape() -> None:
    distribution = Bernoulli(rows(1, 5, 6), shape=(2, 3))
    action = distribution.sample(torch.rand(5, 6, generator=torch.Generator().manual_seed(1)))
    assert action.shape == distribution.mode().shape == (5, 2, 3)
    assert distribution.log_prob(action).shape == distribution.entropy().shape == (5,)
    assert Bernoulli(rows(1, 5, 6)).mode().shape == (5, 6)


def normal_log_density(x: float, mean: float, std: float) -> float:
    return -((x - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("per_row", [False, True])
def test_gaussian_equals_the_density(per_row: bool) -> None:
    mean, action = rows(1, 4, 3), rows(2, 4, 3)
    log_std = rows(3, 4, 3, 0.5) if per_row else rows(3, 1, 3, 0.5)[0]
    distribution = DiagonalGaussian(mean, log_std)
    std = log_std.exp().expand(4, 3)
    for n in range(4):
        expected = sum(normal_log_density(action[n, d].item(), mean[n, d].item(), std[n, d].item()) for d in range(3))
        assert distribution.log_prob(action)[n].item() == pytest.approx(expected, abs=1e-4)
        entropy = sum(0.5 * math.log(2 * math.pi * math.e * std[n, d].item() ** 2) for d in range(3))
        assert distribution.entropy()[n].item() == pytest.approx(entropy, abs=1e-4)
    assert distribution.entropy().shape == distribution.log_prob(action).shape == (4,)
    assert torch.equal(distribution.mode(), mean)


def test_gaussian_sample_is_mean_plus_deviation_times_noise() -> None:
    mean, noise = torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    action = DiagonalGaussian(mean, torch.log(torch.tensor([2.0, 0.5]))).sample(noise)
    torch.testing.assert_close(action, torch.tensor([[3.0, 0.0], [-2.0, 2.0]]))
    assert action.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_gaussian_keeps_the_actions_shape(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    distribution = DiagonalGaussian(rows(1, 5, size), torch.zeros(size), shape)
    action = distribution.sample(rows(2, 5, size))
    assert action.shape == distribution.mode().shape == (5, *shape)
    flat = DiagonalGaussian(rows(1, 5, size), torch.zeros(size))
    torch.testing.assert_close(distribution.log_prob(action), flat.log_prob(action.reshape(5, size)))


def state_dependent() -> tuple[StateDependentGaussian, Tensor, Tensor, Tensor]:
    mean, log_std, features = rows(1, 4, 2), rows(2, 3, 2, 0.5), rows(3, 4, 3)
    return StateDependentGaussian(mean, log_std, features), mean, log_std, features


def test_gsde_sample_is_the_paper_written_out() -> None:
    """a = mu + theta_epsilon^T z with theta_epsilon = sigma * noise, each environment with its own matrix."""
    distribution, mean, log_std, features = state_dependent()
    noise = rows(4, 4, 6)
    action = distribution.sample(noise)
    for n in range(4):
        for d in range(2):
            expected = mean[n, d].item()
            for f in range(3):
                expected += features[n, f].item() * math.exp(log_std[f, d].item()) * noise[n, 2 * f + d].item()
            assert action[n, d].item() == pytest.approx(expected, abs=1e-5)


def test_gsde_density_is_normal_with_the_papers_variance() -> None:
    distribution, mean, log_std, features = state_dependent()
    action = rows(5, 4, 2)
    for n in range(4):
        expected, entropy = 0.0, 0.0
        for d in range(2):
            variance = sum((features[n, f].item() * math.exp(log_std[f, d].item())) ** 2 for f in range(3))
            expected += normal_log_density(action[n, d].item(), mean[n, d].item(), math.sqrt(variance))
            entropy += 0.5 * math.log(2 * math.pi * math.e * variance)
        assert distribution.log_prob(action)[n].item() == pytest.approx(expected, rel=1e-4)
        assert distribution.entropy()[n].item() == pytest.approx(entropy, abs=1e-4)
    assert torch.equal(distribution.mode(), mean)


def test_gsde_variance_sends_no_gradient_into_the_features() -> None:
    features = rows(3, 4, 3).requires_grad_()
    log_std = rows(2, 3, 2).requires_grad_()
    StateDependentGaussian(rows(1, 4, 2), log_std, features).log_prob(rows(5, 4, 2)).sum().backward()
    assert features.grad is None
    assert log_std.grad is not None
    assert (log_std.grad != 0).all()


def test_gsde_without_features_is_finite() -> None:
    distribution = StateDependentGaussian(torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(1, 2), shape=())
    assert distribution.log_std.item() == pytest.approx(0.5 * math.log(1e-6))
    assert distribution.log_prob(torch.zeros(1)).item() == pytest.approx(-math.log(1e-3 * math.sqrt(2 * math.pi)), rel=1e-4)
    assert distribution.sample(torch.ones(1, 2)).tolist() == [0.0]
