from __future__ import annotations

import pytest

from shoal.engines import ray_secrets


@pytest.fixture(autouse=True)
def no_cluster_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for Ray in one test has read nothing that the next one's must have."""
    monkeypatch.setattr(ray_secrets, "_kept", {})
