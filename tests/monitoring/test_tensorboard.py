"""Our event files are what TensorBoard itself reads."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from shoal.monitoring.tensorboard import TensorBoardWriter, crc32c


def read_back(directory: Path) -> dict[str, list[tuple[int, float]]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_every_value_at_its_step(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path / "tb")
    steps = [0, 1, 127, 128, 300, 2**20, 2**40]
    for step in steps:
        writer.scalars(step, {"rollout/ep_rew_mean": step / 4, "train/approx_kl": -0.5})
    writer.close()
    writer.close()
    found = read_back(tmp_path / "tb")
    assert found["rollout/ep_rew_mean"] == [(step, step / 4) for step in steps]
    assert found["train/approx_kl"] == [(step, -0.5) for step in steps]


def test_a_number_beyond_float32_is_infinite(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path / "tb")
    writer.scalars(1, {"up": 1e300, "down": -1e300, "whole": 10**30})
    writer.close()
    found = read_back(tmp_path / "tb")
    assert (found["up"], found["down"]) == ([(1, math.inf)], [(1, -math.inf)])


def test_a_resumed_run_goes_on_in_a_second_file(tmp_path: Path) -> None:
    for step in (1, 2):
        writer = TensorBoardWriter(tmp_path)
        writer.scalars(step, {"a": 1.0})
        writer.close()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert [step for step, _ in read_back(tmp_path)["a"]] == [1, 2]


def test_crc32c_gives_the_values_of_rfc_3720() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283


def test_after_a_disk_that_refused_the_numbers_go_on_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.monitoring.tensorboard.FLUSH_SECONDS", 0.0)
    writer = TensorBoardWriter(tmp_path)
    writer.scalars(1, {"a": 1.0})
    (first,) = tmp_path.iterdir()
    assert writer._file is not None
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer._file.fileno())
        with pytest.raises(OSError, match="No space"):
            writer.scalars(2, {"a": 2.0})
    writer.scalars(3, {"a": 3.0})
    writer.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert first.stat().st_size > 0
    assert {step for step, _ in read_back(tmp_path)["a"]} == {1, 3}
