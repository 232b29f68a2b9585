"""`shoal deploy` from the command line: in processes of its own, but for what ends before anything is done."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shoal.cli import main

RUN = ["--stop.updates", "1", "--actors", "0", "--seed", "3", "--run-dir", "runs/short"]


def shoal(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "shoal.cli", *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text("env: CartPole-v1\nsampling: {groups: 8}\n")
    return tmp_path


def test_a_file_for_each_kind_of_cluster_is_printed(cwd: Path) -> None:
    kinds = [part["kind"] for part in yaml.safe_load_all(shoal("deploy", "kubernetes", "mine.yaml", "--namespace", "a", cwd=cwd).stdout)]
    assert kinds == ["ConfigMap", "PersistentVolumeClaim", "RayJob"]
    done = shoal("deploy", "compose", "mine.yaml", "--nodes", "4", "--image", "shoal:7", cwd=cwd)
    assert yaml.safe_load(done.stdout)["services"]["worker"]["deploy"]["replicas"] == 3
    script = shoal("deploy", "slurm", "mine.yaml", "--time", "60", "--partition", "gpu", "--name", "one", cwd=cwd)
    assert script.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=one\n")
    assert done.stderr == script.stderr == ""
    assert sorted(path.name for path in cwd.iterdir()) == ["mine.yaml"]


def test_with_json_the_file_is_in_one_object_with_the_warnings(cwd: Path) -> None:
    (cwd / "own.py").write_text("def make(): ...\n")
    (cwd / "own.yaml").write_text("env: own.py:make\n")
    answer = json.loads(shoal("deploy", "slurm", "own.yaml", "--json", cwd=cwd).stdout)
    assert answer["name"] == "own-make-ppo-0"
    assert answer["file"] == (done := shoal("deploy", "slurm", "own.yaml", cwd=cwd)).stdout
    assert f"id: {cwd}/own.py:make" in answer["file"]
    assert done.stderr == f"warning: {answer['warnings'][0]}\n"


def test_a_secret_in_the_configuration_is_warned_of_by_its_name(cwd: Path) -> None:
    (cwd / "keyed.yaml").write_text(
        "env: {id: CartPole-v1, kwargs: {api_key: c0ffee, max_tokens: 5, tokenizer: a, deep: [{db_password: x}]}}\n"
    )
    warnings = json.loads(shoal("deploy", "slurm", "keyed.yaml", "--json", cwd=cwd).stdout)["warnings"]
    assert [warning.partition(": ")[0] for warning in warnings] == ["env.kwargs.api_key", "env.kwargs.deep.0.db_password"]
    assert "c0ffee" not in " ".join(warnings)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["kubernetes"], "Missing argument 'RUN_CONFIG'"),
        (["kubernetes", "none.yaml"], "none.yaml: there is no such configuration"),
        (["slurm", "wrong.yaml"], "wrong.yaml: algorithm.epoch is no key of the configuration (did you mean algorithm.epochs?)"),
        (["compose", "worse.yaml"], "max_policy_lag: should be greater than 0, got -1"),
        (["kubernetes", "mine.yaml", "--nodes", "9"], "nodes: 9 nodes cannot share 8 groups"),
        (["kubernetes", "mine.yaml", "--nodes", "0"], "'--nodes'"),
        (["kubernetes", "mine.yaml", "--ray-version", "2.40.0"], "ray-version: Ray 2.40.0 has no token authentication (CVE-2023-48022)"),
        (["kubernetes", "mine.yaml", "--image", "a b"], "image: 'a b' is not a container image"),
        (["slurm", "mine.yaml", "--image", "a"], "No such option '--image'"),
        (["slurm", "mine.yaml", "--time", "soon"], "time: 'soon' is not a time"),
        (["nomad", "mine.yaml"], "No such command 'nomad'"),
        (["certificate", "nowhere", "--out", "out"], "nowhere holds no authority"),
        (["secrets", "mine.yaml/x"], "cannot write into mine.yaml/x"),
    ],
)
def test_what_is_wrong_ends_with_two_and_its_name(
    args: list[str], part: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (cwd / "wrong.yaml").write_text("env: CartPole-v1\nalgorithm: {epoch: 3}\n")
    (cwd / "worse.yaml").write_text("env: CartPole-v1\nalgorithm: appo\nmax_policy_lag: -1\n")
    monkeypatch.chdir(cwd)
    with pytest.raises(SystemExit) as ended:
        main(["deploy", *args])
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert part in said.err
    assert said.out == ""
    assert "Traceback" not in said.err


@pytest.mark.parametrize("kind", ["kubernetes", "slurm", "compose"])
def test_no_file_is_printed_of_learners_on_nodes_that_its_cluster_would_refuse(
    kind: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (cwd / "spread.yaml").write_text("env: CartPole-v1\nlearners: 2\nray: {learners_on: nodes}\n")
    monkeypatch.chdir(cwd)
    with pytest.raises(SystemExit) as ended:
        main(["deploy", kind, "spread.yaml"])
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert "this cluster has TLS" in said.err
    assert "give --allow-plain-learners on a network that is yours alone" in said.err


def test_a_runs_own_configuration_can_be_deployed(cwd: Path) -> None:
    shoal("train", "CartPole-v1", *RUN, "--view", "silent", cwd=cwd)
    for named in ("runs/short", "runs/short/config.yaml"):
        parts = list(yaml.safe_load_all(shoal("deploy", "kubernetes", named, cwd=cwd).stdout))
        inside = yaml.safe_load(parts[0]["data"]["config.yaml"])
        assert (inside["seed"], inside["env"]["id"], inside["stop"]["updates"]) == (3, "CartPole-v1", 1)
        assert not {"run_dir", "actors"} & set(inside)


def test_secrets_and_a_certificate_are_made_and_never_shown(cwd: Path) -> None:
    done = shoal("deploy", "secrets", "secrets", cwd=cwd)
    assert done.stdout.split() == ["secrets/token", "secrets/ca.crt", "secrets/ca.key"]
    token = (cwd / "secrets" / "token").read_text().strip()
    assert stat.S_IMODE((cwd / "secrets" / "token").stat().st_mode) == 0o600
    again = json.loads(shoal("deploy", "secrets", "secrets", "--json", cwd=cwd).stdout)
    assert again == {"files": ["secrets/token", "secrets/ca.crt", "secrets/ca.key"]}
    assert (cwd / "secrets" / "token").read_text().strip() == token
    made = shoal("deploy", "certificate", "secrets", "--out", "node", "--name", "head", "--name", "10.0.0.9", cwd=cwd)
    assert made.stdout.split() == ["node/tls.crt", "node/tls.key", "node/ca.crt"]
    assert token not in done.stdout + done.stderr + made.stdout + made.stderr
    assert "BEGIN" not in made.stdout
