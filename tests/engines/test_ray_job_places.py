"""Where a submitted driver may lay its run, and which import paths outlast its job."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.engines.ray_job import check_run_directory, is_unpacked, passing_files
from shoal.errors import ConfigError
from shoal.settings import resolve

UNPACKED = "/tmp/ray/session_2026-01-01_1/runtime_resources/working_dir_files/_ray_pkg_0a1b"


@pytest.mark.parametrize(
    ("path", "unpacked"),
    [
        (UNPACKED, True),
        (f"{UNPACKED}/runs/one", True),
        (f"{UNPACKED}/worlds.py:make", True),
        ("/tmp/ray/session_2026-01-01_1/runs/one", False),
        ("/home/me/working_dir_files/runs", False),
        ("runs/one", False),
    ],
)
def test_what_ray_unpacked_is_told_from_the_rest(path: str, unpacked: bool) -> None:
    assert is_unpacked(path) is unpacked


def test_a_run_is_not_laid_where_ray_removes_it() -> None:
    check_run_directory(Path("/home/me/runs/one"))
    with pytest.raises(ConfigError, match=r"^run_dir: .*/runs/one lies in what Ray unpacked for this job"):
        check_run_directory(Path(UNPACKED) / "runs" / "one")


def test_files_that_only_this_job_has_are_told_with_the_name_to_take() -> None:
    config, _ = resolve("CartPole-v1")
    assert list(passing_files(config)) == []
    config.env.id = f"{UNPACKED}/worlds.py:make"
    config.policy.network = f"{UNPACKED}/nets.py:Trunk"
    first, second = passing_files(config)
    assert first.startswith("env.id is a file that Ray unpacked for this job")
    assert first.endswith("such as worlds:make")
    assert second.startswith("policy.network is a file")
    assert second.endswith("such as nets:Trunk")
