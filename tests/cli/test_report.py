"""What a person reads."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.cli.report import print_check, print_control, print_replay, print_show, print_training
from shoal.config import RunConfig

RESULT = {
    "run": "runs/x", "reason": "return", "env_steps": 20480, "updates": 80, "seconds": 61.5, "env_steps_per_second": 333.0, "mean_return": 476.25,
    "policy_version": 80, "weights_sha256": "ab" * 32, "ledger": {"produced": 20736, "trained": 20480, "dropped": {"actor_died": 256}, "in_flight": 0},
    "lag": {"mean": 0.5, "p99": 2.0, "max": 3}, "restarts": 1,
}  # fmt: skip


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_training_is_summed_up_with_its_balance(capsys: pytest.CaptureFixture[str]) -> None:
    print_training(RESULT)
    text = said(capsys)
    for part in (
        "reached --stop.return",
        "476.2 (mean of the last 100",
        "20,480 in 80 updates and 1:02, 333 steps/s",
        "20,736 produced = 20,480 trained + 256 actor died + 0 in flight",
        "mean 0.5, p99 2, max 3 updates",
        "shoal evaluate runs/x",
    ):
        assert part in text
    print_training({**RESULT, "reason": "interrupted"})
    assert "shoal resume runs/x" in said(capsys)


def test_a_run_is_shown_with_what_was_configured_and_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig.model_validate({"env": {"id": "CartPole-v1", "kwargs": {"gravity": -3}}, "sampling": {"groups": 2}, "actors": 1})
    shown: dict[str, Any] = {
        "run": "runs/x", "status": "running", "process": 12345, "configuration": config.model_dump(mode="json", by_alias=True),
        "results": {"env_steps": 512, "updates": 2, "seconds": 1.0, "mean_return": None},
        "ledger": {"steps": RESULT["ledger"], "groups": {"0": {"produced": 10, "trained": 9, "in_flight": 1, "dropped": {}, "trained_share": 0.9,
                                                                  "by_environment": {"trained": [4, 3, 2], "late": [0, 1, 1234]}}}},
        "lag": None, "checkpoint": None, "warnings": ["run.db is torn"], "schema": [{"name": "reward", "dtype": "float64", "shape": [32, 2], "axis": "T"}],
        "faults": {"counts": {"died": 1}, "newest": [{"time": 0.0, "kind": "died", "update": 1, "role": "actor", "index": 0, "how": "killed", "reason": ""}]},
    }  # fmt: skip
    print_show(shown)
    text = said(capsys)
    for part in (
        "running (process 12345)",
        "env.kwargs.gravity",
        "none yet",
        "run.db is torn",
        "32x2",
        "actor 0 died, killed",
        "trained_share",
        "2 (environment 2)",
        "4 (environment 0)",
        "1 of environment 1, 1,234 of environment 2",
    ):
        assert part in text
    assert "gae_lambda" not in text  # as by default
    assert "sampling.groups" in text


def test_findings_come_worst_first_each_with_what_to_do_once(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        {"severity": "note", "name": "waits", "message": "it waits", "hint": ""},
        {"severity": "error", "name": "dtype", "message": "wrong\n  expected: a\n  hint: cast it", "hint": "cast it"},
        {"severity": "warning", "name": "range", "message": "too wide", "hint": "clip"},
    ]
    leaf = {"path": ["camera"], "kind": "box", "dtype": "uint8", "shape": [84, 84], "low": [0], "high": [255], "nvec": []}
    action = {"path": [], "kind": "discrete", "dtype": "int64", "shape": [], "low": [], "high": [], "nvec": [3]}
    spec = {"observation": [leaf], "action": action, "action_mask": "info", "exact_restore": False, "snapshot_bytes": 0}
    print_check({"environment": "x", "findings": findings, "spec": spec, "measurements": {"memory_bytes": 2_500_000}})
    text = said(capsys)
    assert text.startswith("x: 1 error, 1 warning, 1 note\n")
    assert text.index("dtype") < text.index("range") < text.index("waits")
    assert text.count("cast it") == 1
    for part in ("observation/camera", "box uint8 [84, 84], 0 to 255", "discrete, 3 choices, mask in the info", "not possible", "2.5 MB"):
        assert part in text


def test_answers_and_replays_are_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_control({"ok": True, "update": 7}, "save")
    print_control({"ok": True, "actors": 4, "autoscale": "1:8", "nodes": {"a": 3, "b": 1}}, "scale")
    print_replay({"run": "runs/x", "updates": 3, "weights_sha256": "ab", "expected_sha256": "cd", "equal": False})
    text = said(capsys)
    assert "saved: checkpoint of update 7" in text
    assert "now 4 actors (3 on a, 1 on b), and it follows the load (1:8)" in text
    assert "OTHER weights: the run has cd" in text


REPLAYED = {"produced": 90, "trained": 0, "dropped": {"shutdown": 10}, "in_flight": 0, "replayed": 80, "evicted": 30}
REPLAY = {
    "inserted": 80, "sampled": 160, "surplus": 0.0, "steps": 50, "capacity_steps": 64,
    "age_updates_mean": 2.5, "age_updates_p99": 4, "age_updates_max": 5, "age_steps_mean": 12.0, "age_steps_p99": 30, "age_steps_max": 40,
}  # fmt: skip
REPLAY_SAID = (
    "replay 50 of 64 env steps held; 80 in, 160 sampled (2.00 for each)",
    "age mean 2.5, p99 4, max 5 updates; mean 12, p99 30, max 40 env steps (of what the last update sampled)",
)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [" ".join(text.split()) for text in said(capsys).splitlines()]


def test_a_training_from_a_replay_is_summed_up_with_what_was_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    print_training({"reason": "updates", "ledger": REPLAYED, "replay": REPLAY})
    lines = lines_of(capsys)
    assert set(REPLAY_SAID) < set(lines)
    balance = "ledger 90 produced = 80 replayed + 10 shutdown + 0 in flight; 30 of those replayed were evicted since (env steps)"
    assert balance in lines


def test_a_run_that_learns_from_a_replay_is_shown_with_it_and_with_the_share_that_was_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    configuration = RunConfig.model_validate({"env": {"id": "CartPole-v1"}}).model_dump(mode="json", by_alias=True)
    shown: dict[str, Any] = {"run": "runs/x", "status": "running", "configuration": configuration, "replay": REPLAY}
    groups = {"0": {**REPLAYED, "trained_share": 0.0, "replayed_share": 0.875}}
    print_show({**shown, "ledger": {"steps": REPLAYED, "groups": groups}})
    lines = lines_of(capsys)
    assert set(REPLAY_SAID) < set(lines)
    assert "group produced replayed evicted in_flight dropped replayed_share" in lines
    assert "0 90 80 30 0 shutdown 10 0.875" in lines
    assert "trained_share" not in "\n".join(lines)
    print_show({**shown, "replay": {"inserted": 8, "sampled": 0, "surplus": 0.0, "steps": 8, "capacity_steps": 64}})
    lines = lines_of(capsys)
    assert "replay 8 of 64 env steps held; 8 in, 0 sampled (0.00 for each)" in lines
    assert not any(text.startswith("age") for text in lines), "nothing was sampled"
    print_show({**shown, "replay": {**REPLAY, "inserted": 2_528, "sampled": 544_768}})
    assert "replay 50 of 64 env steps held; 2,528 in, 544,768 sampled (215.49 for each)" in lines_of(capsys)
    print_show({**shown, "replay": None})
    assert not any(text.startswith(("age", "replay ")) for text in lines_of(capsys))


def test_a_run_on_a_cluster_is_shown_with_what_crossed_the_network_of_each_node(capsys: pytest.CaptureFixture[str]) -> None:
    node = {
        "env_steps": 1000,
        "messages": 20,
        "bytes_said": 4000,
        "bytes_heard": 60_000,
        "bytes_per_env_step": 64.0,
        "messages_per_env_step": 0.02,
    }
    network = {**node, "nodes": {"one": node}}
    print_training({**RESULT, "network": network})
    assert "64.0 bytes and 0.02 messages for each env step; 60 kB from 1 node, 4 kB there" in said(capsys)
    configuration = RunConfig.model_validate({"env": {"id": "CartPole-v1"}}).model_dump(mode="json", by_alias=True)
    print_show({"run": "runs/x", "status": "updates", "configuration": configuration, "network": network})
    lines = [line.split() for line in said(capsys).splitlines()]
    assert [line[1:] for line in lines if line[:1] in (["one"], ["all"])] == [["1,000", "60", "kB", "4", "kB", "20", "64.0", "0.02"]] * 2
    print_show({"run": "runs/x", "status": "updates", "configuration": configuration, "network": None})
    assert "network" not in said(capsys)
