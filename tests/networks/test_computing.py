"""Mixed precision and torch.compile: what they touch, what they leave, and where they are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from shoal.algorithms.base import Optimizer
from shoal.config import PolicyConfig
from shoal.errors import ConfigError
from shoal.networks import computing
from shoal.networks.computing import check_compiler, check_precision, compute_facts
from shoal.networks.evaluation import GraphEvaluation, SmallEvaluation
from shoal.networks.policy import Policy, build_policy
from shoal.types import EnvironmentSpec

from .test_policy import ACTIONS, DICT, IMAGE, VECTOR, noise, raw, spec

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("observation", [VECTOR, IMAGE, DICT], ids=["vector", "image", "dict"])


def compiler() -> str:
    """Why torch.compile cannot be tested here; empty where it can."""
    try:
        check_compiler(CPU)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def compiling() -> None:
    if missing := compiler():
        pytest.skip(missing)


def taken(policy: Policy, environment: EnvironmentSpec, n: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows = raw(environment, n, seed)
    with torch.no_grad():
        action, _ = policy.act(rows, noise(policy, n))
    return rows, action


def gradients(evaluation: object, policy: Policy, n: int) -> list[torch.Tensor]:
    slopes = torch.randn(3, n, generator=torch.Generator().manual_seed(3))
    return list(evaluation.gradients(list(policy.parameters()), *slopes))


# ---- bfloat16 --------------------------------------------------------------------------------------------------------
@KINDS
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_only_what_is_inside_encoders_is_rounded(observation, kind: str) -> None:
    environment = spec(observation, ACTIONS[kind][0])
    plain, mixed = (build_policy(environment, PolicyConfig(orthogonal_init=False), seed=1) for _ in range(2))
    mixed.compute(mixed=True)
    inside: list[torch.dtype] = []
    mixed.actor.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    rows, action = taken(plain, environment, 40)
    found, expected = mixed.evaluate(rows, action), plain.evaluate(rows, action)
    assert inside == [torch.bfloat16]
    for name in ("log_prob", "entropy", "value"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    assert not torch.equal(found.value, expected.value)
    assert torch.equal(found.value, mixed.value(rows))
    ours, theirs = gradients(found, mixed, 40), gradients(expected, plain, 40)
    assert all(g.dtype is p.dtype is torch.float32 for g, p in zip(ours, mixed.parameters(), strict=True))
    a, b = (torch.cat([g.flatten() for g in each]) for each in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_gradients_that_are_written_out_are_not_mixed_with_another_precision() -> None:
    environment = spec()
    policy = build_policy(environment, PolicyConfig(), seed=1)
    rows, action = taken(policy, environment, 10)
    assert isinstance(policy.evaluate(rows, action), SmallEvaluation)
    policy.compute()
    assert isinstance(policy.evaluate(rows, action), SmallEvaluation)
    policy.compute(mixed=True)
    assert isinstance(policy.evaluate(rows, action), GraphEvaluation)


def test_a_gradient_that_is_not_finite_is_refused_in_bfloat16_too() -> None:
    environment = spec()
    policy = build_policy(environment, PolicyConfig(activation="relu"), seed=1)
    policy.compute(mixed=True)
    rows, action = taken(policy, environment, 10)
    optimizer = Optimizer(policy, epsilon=1e-5, max_gradient_norm=0.5)
    before = [p.detach().clone() for p in policy.parameters()]
    rows["observation"][3, 1] = math.inf
    evaluation = policy.evaluate(rows, action)
    slope = torch.full((10,), 0.1)
    norm = optimizer.descend(evaluation.gradients(optimizer.parameters, slope, slope, slope), 1e-3, evaluation.value.sum())
    assert not math.isfinite(norm)
    assert (optimizer.steps, optimizer.skipped) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_numbers_that_float16_could_not_hold_are_no_fault() -> None:
    environment = spec()
    policy = build_policy(environment, PolicyConfig(activation="relu"), seed=1)
    policy.compute(mixed=True)
    rows, action = taken(policy, environment, 10)
    rows["observation"] *= 1e8
    assert all(g.isfinite().all() for g in gradients(policy.evaluate(rows, action), policy, 10))


class Own(Policy):
    def value(self, observation):
        return super().value(observation) * 2.0


class Renamed(Policy):
    """Computes as any policy does."""


@pytest.mark.parametrize(("asked", "key"), [({"mixed": True}, "learner.precision"), ({"compile": True}, "learner.compile")])
def test_a_policy_that_computes_in_its_own_way_is_refused(asked: dict[str, bool], key: str) -> None:
    parts = build_policy(spec(), PolicyConfig())
    arguments = (parts.inputs, parts.actor, parts.critic, parts.action_head, parts.value_head)
    with pytest.raises(ConfigError, match=rf"{key}: Own has its own value"):
        Own(*arguments).compute(**asked)
    Own(*arguments).compute()
    Renamed(*arguments).compute(**asked)


def test_what_the_bits_depend_on_is_recorded_where_it_is_asked_for() -> None:
    assert compute_facts(CPU, "float32", False) == {}
    assert set(compute_facts(CPU, "bfloat16", False)) == {"bfloat16"}
    assert set(compute_facts(CPU, "bfloat16", True)) == {"bfloat16", "compiler"}
    check_precision(CPU)


# ---- torch.compile ---------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_what_is_compiled_computes_the_same_up_to_rounding(mixed: bool) -> None:
    environment = spec(DICT, ACTIONS["multi_discrete"][0])
    plain, fast = (build_policy(environment, PolicyConfig(orthogonal_init=False), seed=1) for _ in range(2))
    plain.compute(mixed=mixed)
    fast.compute(mixed=mixed, compile=True)
    rows, action = taken(plain, environment, 12)
    found, expected = fast.evaluate(rows, action), plain.evaluate(rows, action)
    close = {"rtol": 0.05, "atol": 0.05} if mixed else {"rtol": 1e-4, "atol": 1e-5}
    for name in ("log_prob", "entropy", "value"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    for ours, theirs in zip(gradients(found, fast, 12), gradients(expected, plain, 12), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close["rtol"], atol=0.2 if mixed else 1e-4)


@pytest.mark.usefixtures("compiling")
def test_numbers_do_not_depend_on_which_lengths_were_compiled_before() -> None:
    environment = spec()
    found, graphs = [], []
    for lengths in ((13,), (64, 40, 13)):
        torch._dynamo.reset()
        counters.clear()
        policy = build_policy(environment, PolicyConfig(hidden_sizes=[33]), seed=1)
        policy.compute(compile=True)
        for n in lengths:
            rows, action = taken(policy, environment, n)
            evaluation = policy.evaluate(rows, action)
            outputs = [evaluation.value, *gradients(evaluation, policy, n), policy.value(rows)]
        found.append(outputs)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0  # else each length that comes first has code of its own
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("compiler", "missing"), [("no-such-compiler", "'no-such-compiler' is not on the PATH"), ("false", "does not work")]
)
def test_a_missing_compiler_is_said_in_one_line(compiler: str, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if compiler == "false":
        monkeypatch.setattr(computing, "compiled", lambda function: _broken)
    with pytest.raises(ConfigError, match=missing) as refusal:
        check_compiler(CPU)
    assert "\n" not in str(refusal.value)


def _broken(*_: object) -> None:
    raise RuntimeError("the compiler said no\nand a lot more")


def test_missing_headers_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(computing.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"Python\.h is missing"):
        check_compiler(CPU)
