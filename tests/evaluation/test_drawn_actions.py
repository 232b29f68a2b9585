"""What `predict(deterministic=False)` draws from policies that learn action values, and from the others that learn from a replay."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

sys.path.append(str(Path(__file__).parent))
from helpers import Spaces, learned_bundle

import shoal
from shoal.config import DQNConfig, OffPolicyConfig, PolicyConfig, R2D2Config, SACConfig, TD3Config
from shoal.evaluation import load_policy
from shoal.monitoring.live import SilentView

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
MEMORY = PolicyConfig(memory="lstm", memory_size=4, hidden_sizes=[8])
N = 4000
CASES: dict[str, tuple[OffPolicyConfig, float]] = {
    "dqn": (DQNConfig(), 0.05),
    "dqn, another share": (DQNConfig(epsilon_final=0.4), 0.4),
    "dqn, ladder": (DQNConfig(epsilon="ladder", epsilon_base=0.5, epsilon_exponent=1.0), 0.25),
    "dqn, never": (DQNConfig(epsilon_final=0.0), 0.0),
    "c51": (DQNConfig(distribution="c51", epsilon_final=0.3), 0.3),
    "r2d2": (R2D2Config(), 0.4**8),
    "r2d2, annealed": (R2D2Config(epsilon="annealed", epsilon_final=0.2), 0.2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_policy_of_action_values_acts_at_random_as_often_as_training_ends_with(name: str, tmp_path: Path) -> None:
    config, share = CASES[name]
    learned_bundle(tmp_path, lambda: Spaces(VECTOR, spaces.Discrete(4, start=2)), config, MEMORY if config.name == "r2d2" else None)
    policy = load_policy(tmp_path)
    assert policy.network.epsilon == pytest.approx(share)
    rows = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    best, drawn = (policy.predict(rows, deterministic=how, rng=1)[0] for how in (True, False))
    assert (policy.predict(rows)[0] == best).all()
    other = float((drawn != best).mean())  # one of four at random is the best one
    assert abs(other - 0.75 * share) < 4.0 * (0.75 * share / N) ** 0.5 + 1e-9
    if share > 0.2:
        assert set(drawn[drawn != best]) == {2, 3, 4, 5}, "every choice comes up"
    rng = np.random.default_rng(2)
    alone = {int(policy.predict(rows[0], deterministic=False, rng=rng)[0]) for _ in range(200)}
    assert (len(alone) > 1) == (share > 0.01)


def test_what_is_drawn_at_random_is_allowed_by_the_mask(tmp_path: Path) -> None:
    mask = np.array([0, 1, 0, 1], np.int8)
    learned_bundle(tmp_path, lambda: Spaces(VECTOR, spaces.Discrete(4), mask=mask), DQNConfig(epsilon_final=1.0))
    drawn, _ = load_policy(tmp_path).predict(np.zeros((400, 3)), deterministic=False, action_mask=np.stack([mask] * 400))
    assert set(drawn) == {1, 3}


@pytest.mark.parametrize("config", [SACConfig(), TD3Config()])
def test_policies_with_critics_draw_as_in_training(config: Any, tmp_path: Path) -> None:
    learned_bundle(tmp_path, lambda: Spaces(VECTOR, spaces.Box(-1.0, 1.0, (2,), np.float32)), config)
    policy, rows = load_policy(tmp_path), np.zeros((N, 3), np.float32)
    best, drawn = (policy.predict(rows, deterministic=how, rng=1)[0] for how in (True, False))
    assert (best == best[0]).all()
    deviation = float((drawn - best).std())
    if config.name == "td3":
        assert deviation == pytest.approx(config.exploration_noise, rel=0.05)
    assert deviation > 0.05


def test_the_share_comes_with_a_runs_policy_and_evaluation_draws_with_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "algorithm": {"name": "dqn", "batch_size": 8, "epsilon_final": 0.6},
        "policy": {"hidden_sizes": [8]},
        "replay": {"learning_starts": 16, "capacity_steps": 200},
    }
    run = shoal.train(
        "CartPole-v1",
        actors=0,
        preset="none",
        stop={"updates": 2},
        run_dir=str(tmp_path / "run"),
        progress=SilentView(io.StringIO()),
        **settings,
    )
    (file,) = (run.path / "checkpoints").glob("*2/policy/policy.json")
    assert json.loads(file.read_text())["network"]["options"]["epsilon"] == 0.6
    rows = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    policy = run.policy()
    other = float((policy.predict(rows, deterministic=False, rng=1)[0] != policy.predict(rows)[0]).mean())
    assert abs(other - 0.3) < 0.04
    played = [shoal.evaluate(run, episodes=8, deterministic=how)["mean_length"] for how in (True, False, False)]
    assert played[1] == played[2] != played[0]
