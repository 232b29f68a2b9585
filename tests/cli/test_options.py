"""Options that are configuration keys, told apart from a command's own."""

from __future__ import annotations

import click
import pytest

from shoal.cli.options import split_settings

OWN = {"--json": False, "--video": True}


@pytest.mark.parametrize(
    ("line", "rest", "settings"),
    [
        ("CartPole-v1 --seed 3", ["CartPole-v1"], {"seed": "3"}),
        ("--seed 3 CartPole-v1 --json", ["CartPole-v1", "--json"], {"seed": "3"}),
        ("E --stop.env-steps=1e6", ["E"], {"stop.env_steps": "1e6"}),
        ("E --env.kwargs.gravity -3", ["E"], {"env.kwargs.gravity": "-3"}),
        ("E --env.kwargs.enable-wind", ["E"], {"env.kwargs.enable_wind": "true"}),
        ("E --policy.normalise-observations --seed 3", ["E"], {"policy.normalise_observations": "true", "seed": "3"}),
        ("E --video out.mp4 --seed 3", ["E", "--video", "out.mp4"], {"seed": "3"}),
        ("E --seed 1 --seed 2", ["E"], {"seed": "2"}),
        ("E --run-dir= --seed 2", ["E"], {"run_dir": "", "seed": "2"}),
        ("E -- --seed 2", ["E", "--", "--seed", "2"], {}),
        ("E --wrong", ["E"], {"wrong": "true"}),
    ],
)
def test_settings_are_taken_out_of_a_line_wherever_they_stand(line: str, rest: list[str], settings: dict[str, str]) -> None:
    assert split_settings(line.split(), OWN) == (rest, settings)


def test_a_key_that_is_no_switch_needs_a_value() -> None:
    with pytest.raises(click.UsageError, match=r"--stop\.env-steps needs a value"):
        split_settings(["E", "--stop.env-steps", "--json"], OWN)
