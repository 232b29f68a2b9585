"""What Ray does with tokens and TLS: two clusters on this host, one with all of it and one with none, and drivers that join them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.engines.ray_security import asks_for_token, check_cluster, local_environment, why_not_joined
from shoal.errors import ConfigError
from standing_cluster import LIMIT_SECONDS, standing_cluster

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed, so nothing can be asked of it: pip install 'ray>=2.52'", allow_module_level=True)

CLUSTER = """
import sys
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
DRIVER = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("joined", flush=True)
"""
OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USE_TLS": "0"}


def surroundings(home: Path) -> dict[str, str]:
    """This process's environment without what says something of Ray, and with another home, where no token lies."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}


def join(address: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, address], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    return "joined" if "joined" in done.stdout else done.stderr


def test_a_cluster_with_token_and_tls_takes_those_who_have_both(tmp_path: Path) -> None:
    around = surroundings(tmp_path)
    ours = {**around, **local_environment(tmp_path / "private")}
    with standing_cluster(CLUSTER, environment=ours, cwd=tmp_path) as address:
        assert asks_for_token(address, ours, timeout_seconds=LIMIT_SECONDS) is True
        assert check_cluster(ours, allow_insecure=False, ask=lambda: True) == []
        assert join(address, ours) == "joined"
        with pytest.raises(ConfigError, match="has TLS, and this environment has not"):
            asks_for_token(address, {**ours, "RAY_USE_TLS": "0"}, timeout_seconds=LIMIT_SECONDS)
        stranger = {**ours, "RAY_AUTH_TOKEN": "0" * 64}
        assert join(address, stranger) != "joined"
        assert "it refuses the token of this environment (RAY_AUTH_TOKEN)" in why_not_joined(address, stranger, LIMIT_SECONDS)
        assert "refuses" not in why_not_joined(address, ours, LIMIT_SECONDS)
    assert asks_for_token(address, ours, timeout_seconds=5) is None, "nobody is there any more"


def test_a_cluster_that_asks_for_nothing_is_found_out(tmp_path: Path) -> None:
    around = surroundings(tmp_path)
    with standing_cluster(CLUSTER, environment={**around, **OPEN}, cwd=tmp_path) as address:
        with_token = {**around, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t0ken", "RAY_USE_TLS": "0"}
        assert join(address, with_token) == "joined", "Ray itself does not mind"
        with_tls = {**with_token, **local_environment(tmp_path / "private")}
        with pytest.raises(ConfigError, match="this environment has TLS"):
            asks_for_token(address, with_tls, timeout_seconds=LIMIT_SECONDS)
        asks = asks_for_token(address, with_token, timeout_seconds=LIMIT_SECONDS)
        assert asks is False
        with pytest.raises(ConfigError, match="CVE-2023-48022"):
            check_cluster(with_token, allow_insecure=False, ask=lambda: asks)
