"""Learners with a GPU each: they add up by NCCL, and more of them than GPUs are refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rollout_fakes import scripted_spec
from shoal.config import RayConfig, RunConfig
from shoal.engines.roles import Blueprint, UserObjects
from shoal.errors import ConfigError
from shoal.learners.distributed import meet

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def blueprint(learners: int, device: str = "cuda", learners_on: Literal["driver", "nodes"] = "driver") -> Blueprint:
    config = RunConfig(engine="ray", learners=learners, ray=RayConfig(learners_on=learners_on))
    config.device = device  # type: ignore[assignment]
    return Blueprint(config, scripted_spec(), UserObjects(), bytes(16))


def test_more_learners_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    blueprint(2).check_algorithm()
    blueprint(3, "cpu").check_algorithm()
    with pytest.raises(
        ConfigError, match="learners: 3 learners take a GPU each, and torch sees 2 here; give --learners 2, or --device cpu"
    ):
        blueprint(3).check_algorithm()
    blueprint(3, learners_on="nodes").check_algorithm()  # the others have those of their machines


def add_up(rank: int, size: int, path: str, said: Any) -> None:
    torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(path, size)
    ranks = meet(store, rank, size, timeout_seconds=60.0, device=torch.device("cuda", rank))
    there, here = torch.full((1000,), float(rank + 1), device=f"cuda:{rank}"), torch.tensor([float(rank)], dtype=torch.float64)
    ranks.sum(there)
    ranks.sum(here)
    said.put((rank, there.cpu().tolist(), here.tolist()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(1, marks=pytest.mark.skipif(GPUS < 1, reason="torch sees no CUDA device")),
        pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason=f"two learners take two GPUs, torch sees {GPUS}")),
    ],
)
def test_learners_with_a_gpu_each_add_up_by_nccl(size: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    processes = [context.Process(target=add_up, args=(rank, size, str(tmp_path / "store"), said)) for rank in range(size)]
    for process in processes:
        process.start()
    found = sorted(said.get(timeout=120) for _ in range(size))
    for process in processes:
        process.join(60)
    total, ranks = float(size * (size + 1) // 2), float(sum(range(size)))
    assert found == [(rank, [total] * 1000, [ranks]) for rank in range(size)]
