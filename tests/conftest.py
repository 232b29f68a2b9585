"""What all tests share: hypothesis draws the same examples every time, no example has a time limit, and mathematics has one thread."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch and numpy here: two workers with as many threads as cores each wait for each other

settings.register_profile("shoal", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")
