"""A configuration to deploy, and an executable that only says how it was called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.deploying.deployment import Deployment, plan_deployment

SETTINGS = "env: {id: CartPole-v1, kwargs: {motto: 'costs $5, {{name}}'}}\nsampling: {groups: 16}\nseed: 1\n"


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Deployment]:
    file = tmp_path / "mine.yaml"
    file.write_text(SETTINGS)
    return lambda **how: plan_deployment(file, **how)


@pytest.fixture
def spread(tmp_path: Path) -> Callable[..., Deployment]:
    """As `planned`, of a run with two learners, of which one is on a node."""
    file = tmp_path / "spread.yaml"
    file.write_text(f"{SETTINGS}learners: 2\nray: {{learners_on: nodes, allow_plain_learners: true}}\n")
    return lambda **how: plan_deployment(file, **how)


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Deployment]:
    """As `planned`, of a run that is to lie in an object store."""
    file = tmp_path / "stored.yaml"
    file.write_text(f"{SETTINGS}run_dir: s3://bucket/runs/one\n")
    return lambda **how: plan_deployment(file, **how)


@pytest.fixture
def executable(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a script into a directory `bin`, which it returns."""

    def write(name: str, text: str) -> Path:
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
        return directory

    return write
