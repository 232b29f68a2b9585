"""`make bench-peers`: what is kept, what is made again, and from how many pairs an answer follows. Peers and, but for one test, shoal are played."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peers
import pytest
import summary
from peers import COMPARISONS, MATCHED, THROUGHPUT
from rows import Entry, Store, read

SB3 = "CartPole-v1 ppo / sb3 ppo"
NATIVE = "CartPole-v1 throughput impala native / rllib impala (0 runners)"


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """Options that find peers which run at 100 env steps a second."""
    scripts, bin_ = tmp_path / "scripts", tmp_path / "environment" / "bin"
    scripts.mkdir()
    bin_.mkdir(parents=True)
    for name in {c.peer.split()[0] for c in COMPARISONS}:
        (scripts / name).write_text("print('sps=50'); print('sps=100')\n")
    python = bin_ / "python"
    python.write_text(f"""#!/bin/sh\nif [ "$1" = -c ]; then echo '{{"ray": "0.1"}}'; else exec {sys.executable} "$@"; fi\n""")
    python.chmod(0o755)
    return ["--results", str(tmp_path), "--scripts", str(scripts), "--environment", str(bin_.parent)]


def played(monkeypatch: pytest.MonkeyPatch, *speeds: float | BaseException) -> list[str]:
    """Shoal runs at these speeds, in turn; the last one goes on. Returns the commands that are run."""
    left, calls = list(speeds), []

    def speed(comparison: peers.Comparison, seconds: float, runs: Path) -> float:
        calls.append(comparison.command(seconds))
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(peers, "shoal_speed", speed)
    return calls


def table(directory: Path) -> dict[str, list[str]]:
    """Cells by comparison."""
    texts = (directory / "peers.md").read_text(encoding="utf-8").splitlines()
    cells = [text.strip("| ").split(" | ") for text in texts if text.startswith("| ") and " / " in text]
    return {name: rest for name, *rest in cells[1:]}


def old(comparison: str, pair: int, measurement: str = "2026-11-26T01:15:15", ratio: float = 3.5, **given: Any) -> Entry:
    """A pair as it was written when pairs had neither settings nor code nor date."""
    made = next(c for c in COMPARISONS if c.name == comparison)
    machine = {"cpu": "A", "cores": 2, "torch": "2", "python": "3"}
    return {
        "comparison": comparison, "measurement": measurement, "pair": pair, "seconds": 20.0, "shoal": 100 * ratio, "peer": 100.0, "ratio": ratio,
        "peer_failure": "", "times": made.times, "floor": made.floor, "command": made.command(20.0), "peer_command": made.peer,
        "versions": {"ray": "0"}, "machine": machine, "load": 1.0,
    } | given  # fmt: skip


def write(directory: Path, *entries: Entry, cut_off: str = "") -> None:
    (directory / "peers.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + cut_off)


def test_a_bench_that_was_cut_off_goes_on_with_the_next_pair(place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch, 310.0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        peers.main([*place, "--rows", SB3])
    assert table(tmp_path)[SB3][4:6] == [">= 3x: 1 of 3 pairs", "1 x 20 s"]
    calls = played(monkeypatch, 290.0)
    assert peers.main([*place, "--rows", SB3]) == 0
    assert len(calls) == 2
    assert table(tmp_path)[SB3][:6] == ["290", "100", "2.90", "2.90, 3.10", ">= 3x: **no**", "3 x 20 s"]
    assert peers.main([*place, "--rows", SB3]) == 0
    assert len(calls) == 2
    assert [row["pair"] for row in read(tmp_path / "peers.jsonl")] == [0, 1, 2]


def test_other_seconds_and_again_measure_anew(place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = played(monkeypatch, 310.0)
    for given in ([], ["--seconds", "5"], ["--seconds", "5", "--again"]):
        assert peers.main([*place, "--rows", SB3, *given]) == 0
    assert len(calls) == 9
    assert table(tmp_path)[SB3][5] == "3 x 5 s"


def test_one_pair_of_other_settings_neither_answers_nor_hides_three(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, 310.0)
    peers.main([*place, "--rows", SB3])
    played(monkeypatch, 900.0)
    peers.main([*place, "--rows", SB3, "--seconds", "5", "--pairs", "1"])
    assert table(tmp_path)[SB3][4:6] == [">= 3x: yes", "3 x 20 s"]
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    (line,) = summary.peer_lines()
    assert "| 310 env steps/s | 3.1 times (3 pairs) |" in line
    peers.main([*place, "--rows", "CartPole-v1 appo / sb3*", "--pairs", "1"])
    assert table(tmp_path)["CartPole-v1 appo / sb3 ppo"][4] == ">= 4x: 1 of 3 pairs"
    assert len(list(summary.peer_lines())) == 1


def test_pairs_as_they_were_written_before_stay_readable_and_count(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *(old(SB3, pair) for pair in range(3)), old(SB3, 0, "2026-11-27T01:00:00", 2.0), old(NATIVE, 0, seconds=10.0))
    calls = played(monkeypatch, 310.0)
    assert peers.main([*place, "--rows", SB3]) == 0
    assert calls == []
    found = table(tmp_path)
    assert found[SB3][2:5] == ["3.50", "2.00, 3.50", ">= 3x: yes"]
    assert found[SB3][6] == "2026-11-26 to 2026-11-27"
    assert (found[SB3][-1], found[NATIVE][4]) == ("unknown", ">= 150,000 steps/s: 1 of 3 pairs")
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    (line,) = summary.peer_lines()
    assert line.endswith("| 3.5 times (3 pairs) | 2026-11-26 to 2026-11-27, A, load 1.0 |")


def test_a_line_that_was_cut_off_spoils_neither_the_table_nor_the_next_pair(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, *(old(SB3, pair) for pair in range(2)), cut_off='{"comparison": "Cart')
    calls = played(monkeypatch, 310.0)
    assert peers.main([*place, "--table"]) == 0
    assert table(tmp_path)[SB3][4] == ">= 3x: 2 of 3 pairs"
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    assert list(summary.peer_lines()) == []
    assert calls == []
    assert "cut off" in capsys.readouterr().err
    assert peers.main([*place, "--rows", SB3]) == 0
    assert len(calls) == 1
    assert table(tmp_path)[SB3][4] == ">= 3x: yes"


def test_a_peer_that_fails_leaves_a_pair_that_says_so(place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch, 310.0)
    (tmp_path / "scripts" / "sb3_matched.py").write_text("raise SystemExit('no samples')\n")
    assert peers.main([*place, "--rows", SB3]) == 0
    (first, *_) = read(tmp_path / "peers.jsonl")
    assert (first["ratio"], "no samples" in first["peer_failure"]) == (None, True)
    assert table(tmp_path)[SB3][:2] == ["310", "failed"]
    assert table(tmp_path)[SB3][4] == ">= 3x: 0 of 3 pairs"


def test_shoal_that_fails_ends_with_code_1_and_the_others_are_measured(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, peers.CommandError("no"), 310.0)
    assert peers.main([*place, "--rows", SB3]) == 1
    assert [row["pair"] for row in read(tmp_path / "peers.jsonl")] == [1, 2]


def test_what_is_missing_or_named_wrongly_ends_with_code_2(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = played(monkeypatch, 310.0)
    (tmp_path / "scripts" / "sb3_matched.py").unlink()
    assert peers.main([*place, "--list", "--rows", SB3]) == 0  # needs no peer
    assert capsys.readouterr().out.count("to do") == 3
    assert peers.main([*place, "--rows", SB3]) == 2
    assert "sb3_matched.py" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        peers.main([*place, "--rows", "nothing"])
    assert ended.value.code == 2
    assert calls == []


def test_shoal_and_a_peer_run_in_turn(place: list[str], tmp_path: Path) -> None:
    assert peers.main([*place, "--rows", SB3, "--pairs", "1", "--seconds", "1"]) == 0
    (pair,) = read(tmp_path / "peers.jsonl")
    assert pair["ratio"] == pair["shoal"] / 100.0 > 0
    assert pair["command"].startswith(f"shoal train CartPole-v1 --algorithm ppo {MATCHED}")
    assert len(pair["code"]) == 8
    assert pair["versions"] == {"ray": "0.1"}


def test_names_are_unique_and_each_track_has_its_own(tmp_path: Path) -> None:
    assert len({c.name for c in COMPARISONS}) == len(COMPARISONS)
    assert all(("throughput" in c.name) is c.options.startswith(THROUGHPUT) is (c.floor is not None) for c in COMPARISONS)
    assert Store(tmp_path, "peers", peers.key_of, peers.page).entries == {}
