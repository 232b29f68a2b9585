"""`make bench-scaling`: that its rows are what they say, its arithmetic and its table; hosts and clusters that it makes and removes. No speed is asserted."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import namespaces
import pytest
import scaling
import summary
from clusters import Place, Watched, busy_seconds, held_bytes, measured_link, nodes_here, plasma_files, spilled_bytes, watching
from rows import ROOT, CommandError, Store, answer_of, circumstances
from scaling import ROWS, page, pair, settings_of

from shoal.cli.options import split_settings
from shoal.config import RunConfig
from shoal.settings import Raw, resolve

BY_NAME = {row.name: row for row in ROWS}
OPTIONS = scaling._parse([])


def resolved(arguments: list[str]) -> RunConfig:
    verb, environment, *options = arguments
    assert verb == "train"
    rest, settings = split_settings(options, {})
    assert rest == []
    return resolve(environment, {name: Raw(value) for name, value in settings.items()})[0]


# ---- the rows --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_both_runs_of_a_pair_differ_in_where_they_run_alone(row: scaling.Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    base, other = (resolved(row.arguments(nodes, "HEAD:1")) for nodes in (row.beside, row.nodes))
    assert (other.engine, other.ray.nodes, other.ray.actors_per_node) == ("ray", row.nodes, row.actors)
    assert (base.engine, base.actors or base.ray.actors_per_node) == ("ray" if row.beside else "local", row.actors)
    assert (other.sampling.groups or 0) == row.nodes * (base.sampling.groups or 0) // max(1, row.beside)
    assert (base.sampling.groups or 0) >= max(1, row.beside) * row.actors, "no actor is without a group"
    kept = {"algorithm", "policy", "env", "mode", "learner"}
    assert base.model_dump(include=kept, exclude={"policy": {"inference"}}) == other.model_dump(
        include=kept, exclude={"policy": {"inference"}}
    )
    assert base.sampling.model_dump(exclude={"groups"}) == other.sampling.model_dump(exclude={"groups"})
    if not row.name.startswith("one-node"):
        assert (other.sampling.groups or 0) * (other.sampling.group_size or 0) == row.nodes * scaling.ENVS_OF_NODE
        assert other.env.form == "threads"


def test_what_is_wanted_is_what_the_rows_are_held_to() -> None:
    assert {row.name: (row.nodes, row.beside, row.least) for row in ROWS} == {
        "one-node/cartpole-ppo": (1, 0, 0.90), "one-node/cartpole-impala": (1, 0, 0.90), "one-node/lunarlander": (1, 0, 0.90),
        "waiting/1": (1, 0, 0.90), "waiting/2": (2, 1, 0.92), "waiting/4": (4, 1, 0.92), "hosts/2": (2, 1, 0.95),
    }  # fmt: skip
    assert BY_NAME["hosts/2"].least * 2 == pytest.approx(1.9)
    assert [row.name for row in ROWS if row.on_hosts] == ["hosts/2"]


def test_other_seconds_are_measured_again() -> None:
    assert len({settings_of(row, OPTIONS) for row in ROWS}) == len(ROWS)
    row = ROWS[0]
    assert settings_of(row, OPTIONS) != settings_of(row, scaling._parse(["--seconds", "30"]))
    assert settings_of(row, OPTIONS) == settings_of(row, scaling._parse(["--pairs", "5"]))


# ---- a pair ----------------------------------------------------------------------------------------------------------
NETWORK = {
    "env_steps": 1000,
    "messages": 10,
    "bytes_said": 4000,
    "bytes_heard": 60_000,
    "bytes_per_env_step": 64.0,
    "messages_per_env_step": 0.01,
}


@pytest.mark.parametrize(
    ("name", "rates", "expected"),
    [("one-node/cartpole-ppo", [100.0, 93.0], 0.93), ("waiting/1", [100.0, 99.0], 0.99), ("waiting/4", [100.0, 380.0], 0.95)],
)
def test_a_pair_is_the_base_and_then_the_row_and_what_each_node_keeps_of_it(
    name: str, rates: list[float], expected: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row, runs = BY_NAME[name], iter(rates)
    clusters: list[int] = []
    order: list[int] = []

    @contextlib.contextmanager
    def cluster(self: scaling.Row, nodes: int) -> Iterator[Place]:
        clusters.append(nodes)
        yield Place("HEAD:1", tmp_path, {})

    def trained(row: scaling.Row, nodes: int, place: Place | None, seed: int, options: Any) -> tuple[float, dict[str, Any]]:
        assert (place is None) == (nodes == 0)
        order.append(nodes)
        return next(runs), {"network": NETWORK}

    def figures(self: Watched) -> dict[str, float]:
        return {"store_mb": 1.0, "store_growth_mb": 0.0, "spilled_mb": 0.0, "cores_busy": 1.5}

    monkeypatch.setattr(scaling.Row, "cluster", cluster)
    monkeypatch.setattr(scaling, "trained", trained)
    monkeypatch.setattr(Watched, "figures", figures)
    found = pair(row, 0, OPTIONS)
    assert order == [row.beside, row.nodes]
    assert clusters == [nodes for nodes in order if nodes]
    assert (found["base"], found["rate"], found["kept"]) == (*rates, pytest.approx(expected))
    assert (found["bytes_said"], found["bytes_heard"], found["bytes_per_env_step"]) == (4.0, 60.0, 64.0)


def figures_of(kept: float, base: float = 1000.0, **other: float) -> dict[str, float]:
    usual = {"bytes_per_env_step": 64.0, "messages_per_env_step": 0.01, "bytes_said": 4.0, "bytes_heard": 60.0, "store_mb": 12.0,
             "store_growth_mb": 0.5, "spilled_mb": 0.0, "cores_busy": 1.5}  # fmt: skip
    return {"base": base, "rate": base * kept, "kept": kept, **usual, **other}


def test_the_table_answers_from_three_pairs_and_says_what_is_not_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "why_not", lambda: "network namespaces are made by root alone")
    kept = Store(tmp_path, "scaling", lambda entry: (entry["row"], entry["seed"]), page)
    made = {
        "one-node/cartpole-ppo": [figures_of(share) for share in (0.99, 0.91, 0.80)],
        "one-node/cartpole-impala": [figures_of(share, spilled_mb=1.0) for share in (0.99, 0.89, 0.80)],
        "waiting/2": [figures_of(0.95, rate=1900.0, store_growth_mb=6.0)] * 2,
    }
    for name, entries in made.items():
        for n, figures in enumerate(entries):
            kept.append(
                {"row": name, "seed": n, "command": BY_NAME[name].command, "figures": figures} | {"code": "0123abcd"} | circumstances()
            )
    text = "\n".join(page(kept))
    cells = {row[0]: row for line in text.splitlines() if line.startswith("| ") and (row := line.strip("| ").split(" | "))}
    assert [cells[name][5] for name in made] == ["yes", "**no**", "2 of 3 pairs"]
    assert cells["one-node/cartpole-ppo"][3] == "91.0 (80.0 to 99.0) %"
    assert cells["waiting/2"][3].endswith("1.90 times")
    assert cells["waiting/2"][6] == "64.0 (60.0, 4.0)"
    assert ["**not flat**" in cells[name][8] for name in made] == [False, True, True]
    assert "Not measured yet: one-node/lunarlander, waiting/1, waiting/4." in text
    assert "hosts/2 is not measured here: network namespaces are made by root alone." in text


def test_rows_that_are_not_permitted_here_are_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "why_not", lambda: "no")
    assert scaling.main(["--list", "--results", str(tmp_path), "--rows", "hosts/*", "waiting/4"]) == 0
    said = capsys.readouterr()
    assert said.err == "hosts/2: left out, no\n"
    assert said.out.splitlines() == [f"waiting/4 seed {n}: to do" for n in range(3)]


def test_the_page_has_the_tables_that_the_results_make() -> None:
    text = summary.SCALING.read_text(encoding="utf-8")
    assert summary.written(text, summary.SCALING) == text, "python benchmarks/summary.py writes it anew"


# ---- what is watched -------------------------------------------------------------------------------------------------
def test_growth_and_busy_cores_are_those_of_the_second_half() -> None:
    samples = [(float(t), 1_000_000 * min(t, 6), 0, 1.5 * t if t > 5 else 9.0 * t) for t in range(10)]
    found = Watched(samples).figures()
    assert (found["store_mb"], found["store_growth_mb"], found["spilled_mb"]) == (6.0, 1.0, 0.0)
    assert found["cores_busy"] == pytest.approx((1.5 * 9 - 45.0) / 4)
    with pytest.raises(CommandError, match="too short"):
        Watched(samples[:1]).figures()


def test_what_was_spilled_is_the_files_there(tmp_path: Path) -> None:
    assert spilled_bytes(tmp_path) == 0
    (tmp_path / "ray_spilled_objects_1").mkdir()
    (tmp_path / "ray_spilled_objects_1" / "a").write_bytes(bytes(70))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "b").write_bytes(bytes(9))
    assert spilled_bytes(tmp_path) == 70
    assert held_bytes([tmp_path / "missing"]) == 0
    assert plasma_files(tmp_path) == []
    assert busy_seconds() > 0.0


# ---- hosts -----------------------------------------------------------------------------------------------------------
LISTEN = "import socket, sys; s = socket.create_server((sys.argv[1], 7)); print('up', flush=True); s.accept()[0].sendall(b'hello'); sys.stdin.read()"
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 7), 60).recv(5).decode())"


def test_hosts_reach_each_other_and_nothing_else_and_are_removed_with_what_runs_in_them() -> None:
    if reason := namespaces.why_not():
        pytest.skip(reason)
    tag, addresses = f"shoal-test-{os.getpid()}", ["10.213.0.1", "10.213.0.2"]
    names = [f"{tag}-0", f"{tag}-1"]
    inside = [["ip", "netns", "exec", name, sys.executable, "-c"] for name in names]
    try:
        namespaces._connect(f"{tag}-bridge", names, addresses)
        listening = subprocess.Popen([*inside[0], LISTEN, addresses[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert listening.stdout is not None
        assert listening.stdout.readline() == "up\n"
        assert subprocess.run([*inside[1], ASK, addresses[0]], capture_output=True, text=True, check=True).stdout == "hello\n"
        routes = subprocess.run(["ip", "-n", names[0], "route"], capture_output=True, text=True, check=True).stdout.split()
        assert "default" not in routes
    finally:
        for name in (*names, f"{tag}-bridge"):
            namespaces._remove(name)
    assert listening.stdin is not None
    listening.stdin.close()
    listening.stdout.close()
    assert listening.wait(300.0) == -9
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert tag not in left


def test_a_removal_that_fails_leaves_the_others_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    removed = []

    def remove(name: str) -> None:
        if name == "b":
            raise CommandError("b does not end")
        removed.append(name)

    monkeypatch.setattr(namespaces, "_remove", remove)
    with pytest.raises(CommandError, match=r"^b does not end$"):
        namespaces.remove_all(["a", "b", "c"])
    assert removed == ["a", "c"]


def test_what_a_killed_maker_left_is_removed_by_the_next_start_and_what_lives_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := namespaces.why_not():
        pytest.skip(reason)
    own = f"{os.getpid()}-{namespaces._started(os.getpid())}"
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f"shoal-{gone.pid}-1-0", f"shoal-{gone.pid}-1-bridge", f"shoal-{os.getpid()}-1-0"]  # the last: the number is another's by now
    stays = [f"shoal-{own}-0", "shoal-of-somebody"]
    try:
        for name in (*left, *stays):
            subprocess.run(["ip", "netns", "add", name], check=True)
        sleeping = subprocess.Popen(["ip", "netns", "exec", left[0], "sleep", "600"])
        while not namespaces._inside(left[0]):
            assert sleeping.poll() is None
        namespaces.sweep()
        assert sleeping.wait(60.0) == -9
        there = set(namespaces._names())
        assert there.isdisjoint(left)
        assert set(stays) <= there
    finally:
        namespaces.remove_all([*left, *stays])


# ---- clusters --------------------------------------------------------------------------------------------------------
@pytest.mark.soak
def test_a_cluster_takes_a_run_is_watched_and_is_gone_afterwards(tmp_path: Path) -> None:
    options = argparse.Namespace(seconds=8.0, runs=tmp_path)
    with nodes_here(2, 1) as place:
        assert len(plasma_files(place.session)) == 2
        link = measured_link(place)
        assert min(link.values()) > 0.0
        row = scaling._waiting("waiting/2", 2, 0.92)
        with watching(place.session) as watched:
            rate, told = scaling.trained(row, 2, place, 0, options)
        assert rate > 0
        assert len(told["network"]["nodes"]) == 2
        assert watched.figures()["spilled_mb"] == 0.0
    assert plasma_files(place.session) == []


@pytest.mark.soak
def test_hosts_take_a_run(tmp_path: Path) -> None:
    if reason := namespaces.why_not():
        pytest.skip(reason)
    with namespaces.hosts(2, 1) as place:
        assert len(plasma_files(place.session)) == 2
        small = [
            "train",
            "CartPole-v1",
            "--preset",
            "none",
            "--engine",
            "ray",
            "--address",
            place.address,
            "--nodes",
            "2",
            "--actors-per-node",
            "1",
        ]
        words = [scaling.SHOAL, *small, "--stop.updates", "3", "--evaluation.episodes", "0", "--run-dir", str(tmp_path / "run"), "--json"]
        told = answer_of(place.command(words), 200.0)
    assert len(told["network"]["nodes"]) == 2
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "shoal-" not in left
