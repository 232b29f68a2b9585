"""What the rows of `make bench-learning` ask for, and when that is reached. Nothing is trained."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rows import ROOT

from shoal.engines.plan import Plan


def loaded(path: Path) -> ModuleType:
    """By its path: tests/learning has the name of one of them."""
    spec = importlib.util.spec_from_file_location(f"_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


learning = loaded(ROOT / "benchmarks" / "learning.py")
BY_NAME = {row.name: row for row in learning.ROWS}
LIMITED = [row for row in learning.ROWS if row.env_steps_limit is not None]


def rows_of(name: str) -> dict[str, Any]:
    return {row.label: row for row in learning.ROWS if row.environment == name}


def entry(mean_return: float, env_steps: int = 1) -> dict[str, Any]:
    return {"evaluate": {"mean_return": mean_return}, "train": {"env_steps": env_steps}}


def test_every_row_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(learning.ROWS)


@pytest.mark.parametrize("row", LIMITED, ids=lambda row: row.name)
def test_a_run_that_nothing_ends_before_is_within_its_limit_after_its_last_update(row: Any) -> None:
    config = learning.config_of(row, 0)
    plan = Plan.of(config)
    update = plan.batch_rollouts * plan.rollout_length * plan.group_size
    assert config.stop.env_steps is not None
    assert 0.98 * row.env_steps_limit <= math.ceil(config.stop.env_steps / update) * update <= row.env_steps_limit


def test_half_cheetah_ends_after_300_000_env_steps_or_an_hour() -> None:
    stop = learning.config_of(BY_NAME["HalfCheetah-v5/sac"], 0).stop
    assert (stop.seconds, stop.return_, stop.updates) == (3600, None, None)
    assert 300_000 - 64 <= (stop.env_steps or 0) <= 300_000


def test_without_a_memory_recall_is_chance_and_with_either_it_is_answered() -> None:
    environment = loaded(ROOT / "examples" / "memory.py").Recall()
    rows, cues = rows_of(learning.RECALL), int(environment.action_space.n)
    with_memory = [rows.pop(f"ppo+{memory}") for memory in ("lstm", "gru")]
    assert [row.target for row in with_memory] == [0.95] * 2
    ((label, without),) = rows.items()
    assert (label, without.target) == ("ppo+none", None)
    assert {row.options for row in with_memory} == {without.options}
    right = range(math.floor(learning.EPISODES * without.ceiling) + 1, learning.EPISODES + 1)
    beyond = sum(math.comb(learning.EPISODES, k) * (cues - 1) ** (learning.EPISODES - k) for k in right) / cues**learning.EPISODES
    assert beyond == pytest.approx(1 / 3000, rel=0.05)  # as the note says
    shares = []
    for seed in range(2000):
        environment.reset(seed=seed)
        rewards = [environment.step(1)[1] for _ in range(51)]
        assert rewards[:-1] == [0.0] * 50
        shares.append(rewards[-1])
    assert sum(shares) / len(shares) == pytest.approx(1 / cues, abs=0.03)  # whoever always says the same


def test_a_target_is_reached_by_every_seed_within_the_limit_and_a_ceiling_passed_by_none() -> None:
    row = BY_NAME["LunarLander-v3/dqn"]
    good = [entry(200.0, 500_000), entry(260.0, 90_000)]
    assert learning.reached(row, good)
    assert not learning.reached(row, [*good, entry(260.0, 500_001)])
    assert not learning.reached(row, [*good, entry(199.9, 90_000)])
    ceiling = rows_of(learning.RECALL)["ppo+none"]
    assert learning.reached(ceiling, [entry(0.4), entry(0.2)])
    assert not learning.reached(ceiling, [entry(0.41), entry(0.2)])
