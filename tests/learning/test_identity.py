"""Every observation kind x action kind x algorithm, through the engine, learns to give the action that the observation names."""

from __future__ import annotations

from pathlib import Path

import pytest

from .identity import ALL, PASS, learn

# One case for each kind of observation, of action and of mask; all algorithms. `make soak` runs the rest.
QUICK = {
    ("box", "multi_discrete", "appo"),
    ("box_unbounded", "box_bounded", "ppo"),
    ("image", "multi_binary_masked", "ppo"),
    ("discrete", "discrete", "impala"),
    ("multi_discrete", "multi_binary", "appo"),
    ("multi_binary", "box_unbounded", "ppo"),
    ("multi_binary", "discrete_masked", "impala"),
    ("nested", "multi_discrete_masked", "appo"),
}


@pytest.mark.parametrize(
    ("observation", "action", "algorithm"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.soak, id="-".join(case)) for case in ALL],
)
def test_learns_the_action_that_the_observation_names(observation: str, action: str, algorithm: str, tmp_path: Path) -> None:
    share, _ = learn(observation, action, algorithm, tmp_path / "run")
    assert share >= PASS
