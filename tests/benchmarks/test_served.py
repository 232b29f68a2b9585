"""The measurement behind `policy.inference auto`. No time is asserted, but that all were taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import served

from shoal.engines.roles import SERVED_WEIGHTS


def test_a_server_is_asked_and_networks_of_the_wanted_size_choose_in_place() -> None:
    script = Path(served.__file__)
    done = subprocess.run([sys.executable, str(script), "--questions", "5"], capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert all(found[name] > 0 for name in ("way_ms", "image_way_ms", "small_ms", "served_ms", "image_ms"))
    assert SERVED_WEIGHTS < found["served_weights"] < 1.02 * SERVED_WEIGHTS
    assert found["small_weights"] == 2 * (64 * 64 + 64 + 64 * 64 + 64) + 64 * 6 + 6 + 64 + 1
    assert done.stderr == ""
