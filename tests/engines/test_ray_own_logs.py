"""What processes on the driver's own machine print has no secrets in the run's logs, whoever prints it and however."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_ray_elastic import wait_for
from test_ray_fleet import SETTINGS, ClusterHere
from test_ray_own_node import OwnHere

import shoal
from faults.living import TINY, command
from shoal.engines import ray_fleet
from shoal.engines.ray_own_logs import OwnLogs
from shoal.engines.ray_security import make_secrets
from shoal.errors import EnvironmentFault

PRINTS = """
import os, subprocess, sys, time
from pathlib import Path
import gymnasium, torch

def say(secrets):
    for name in ("token", "node/tls.key", "ca.key"):
        if (secrets / name).exists():
            text = (secrets / name).read_text().strip()
            for piece in (text[:20], text[20:] + " said\\n"):  # in two writes
                os.write(1, piece.encode())
            print(text, file=sys.stderr)
            subprocess.run(["echo", text])  # by a process of its own

class Prints(gymnasium.Wrapper):
    def step(self, action):
        say({secrets})
        os.write(1, b"unfinished " + ({secrets} / "token").read_bytes().strip())
        return self.env.step(action)

def make():
    say({secrets})
    return Prints(gymnasium.make("CartPole-v1"))

def dies():
    os.write(1, b"last words " + ({secrets} / "token").read_bytes().strip())
    os._exit(3)

def hangs():
    print(({secrets} / "token").read_text())
    time.sleep(600)

class Network(torch.nn.Module):
    def __init__(self, spec, config):
        super().__init__()
        say({secrets})
        self.num_features = 4

    def forward(self, observation):
        return observation["observation"]
"""


@pytest.fixture
def logs() -> Any:
    made = OwnLogs()
    yield made
    made.close()


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    make_secrets(tmp_path / "secrets")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "secrets" / "token"))
    return tmp_path / "secrets"


class Ending(ClusterHere):
    """Its secrets end with it, as those of a cluster that a run started."""

    def __init__(self, names: list[str], secrets: Path) -> None:
        super().__init__(names)
        self.directory = secrets

    def close(self) -> None:
        super().close()
        (self.directory / "token").unlink()


def written(directory: Path, secrets: str) -> Path:
    """A module whose environments and networks print secrets; `secrets`: an expression of their directory."""
    file = directory / "printing.py"
    file.write_text(PRINTS.replace("{secrets}", secrets))
    return file


def train_here(module: Path, made: str, run: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """On a cluster whose only node is the driver's machine."""
    cluster = Ending(["a"], secrets=run.parent / "secrets")
    cluster.own, cluster.kinds["a"] = "a", OwnHere
    monkeypatch.setattr(ray_fleet, "connect", lambda config, warn: cluster)
    shoal.train(f"{module}:{made}", run_dir=str(run), **{**SETTINGS, "engine": "ray", "stop": {"updates": 3}, **settings})


def holds_no_secret(run: Path, token: str) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert (run / "run.db") in files
    assert [str(path) for path in files if token.encode() in (content := path.read_bytes()) or b"PRIVATE KEY" in content] == []


def test_the_probe_actors_and_the_learner_of_the_drivers_machine_print_no_secret(
    secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, run = written(tmp_path, f"Path({str(secrets)!r})"), tmp_path / "run"
    token = (secrets / "token").read_text().strip()

    def breaks(facts: Any) -> None:
        raise RuntimeError("abrupt")  # all that were printing are killed

    how: dict[str, Any] = {"policy": {"network": f"{module}:Network"}, "env": {"form": "python"}}
    with pytest.raises(RuntimeError, match="abrupt"):
        train_here(module, "make", run, monkeypatch, callbacks=[breaks], **how)
    for name in ("probe-0", "actor-0", "actor-1", "learner-0"):
        said = (run / "logs" / f"{name}.log").read_text().split()
        assert {"***", "said"} <= set(said), name
    holds_no_secret(run, token)


def test_the_last_words_of_a_process_are_told_without_the_token(secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, token = tmp_path / "run", (secrets / "token").read_text().strip()
    with pytest.raises(EnvironmentFault) as raised:
        train_here(written(tmp_path, f"Path({str(secrets)!r})"), "dies", run, monkeypatch)
    assert (run / "logs" / "probe-0.log").read_text() == "last words ***"
    assert "last words ***" in f"{raised.value} {raised.value.report}"
    holds_no_secret(run, token)


def test_the_stack_of_a_process_that_hangs_is_told(secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, token = tmp_path / "run", (secrets / "token").read_text().strip()
    with pytest.raises(EnvironmentFault) as raised:
        train_here(written(tmp_path, f"Path({str(secrets)!r})"), "hangs", run, monkeypatch, env={"step_timeout_seconds": 3.0})
    assert "in hangs" in f"{raised.value} {raised.value.report}"
    holds_no_secret(run, token)


def test_a_local_cluster_of_ray_has_its_token_in_no_file_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("ray", path=os.path.dirname(sys.executable)):
        pytest.skip("Ray is not installed, so no cluster can be started: pip install 'ray>=2.52'")
    temporary, kept = Path(tempfile.mkdtemp(prefix="t")), tmp_path / "kept"  # Ray's sockets want a short path
    monkeypatch.setenv("TMPDIR", str(temporary))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    found = f"next(Path({str(temporary)!r}).glob('shoal-ray-*'))"
    module = written(tmp_path, found)
    module.write_text(module.read_text() + f"\nPath({str(kept)!r}).write_text(({found} / 'token').read_text())\n")
    try:
        args = ["--engine", "ray", "--actors-per-node", "1", "--env.form", "python", "--stop.updates", "2", "--run-dir", "run"]
        code, _, said = command("train", f"{module}:make", *TINY, *args, cwd=tmp_path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert code == 0, said
    assert "***" in (tmp_path / "run" / "logs" / "actor-0.log").read_text()
    holds_no_secret(tmp_path / "run", kept.read_text().strip())


# ---- the pipes
def test_a_log_is_whole_once_who_wrote_it_has_ended(logs: OwnLogs, tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(50_000)) + "unfinished"  # more than a pipe holds
    for _ in range(2):  # one after the other
        with logs.open(tmp_path / "a.log").open("ab") as pipe:
            copy = [sys.executable, "-c", "import sys; sys.stdout.write(sys.stdin.read())"]
            subprocess.run(copy, input=text, text=True, stdout=pipe, check=True)
        logs.ended(tmp_path / "a.log")
    assert (tmp_path / "a.log").read_text() == 2 * text


def test_what_is_written_comes_soon_and_the_rest_at_the_end(logs: OwnLogs, tmp_path: Path) -> None:
    with logs.open(tmp_path / "a.log").open("ab", buffering=0) as pipe:
        pipe.write(b"one\ntwo")
        wait_for(lambda: (tmp_path / "a.log").read_text() == "one\n")
    logs.close()
    assert (tmp_path / "a.log").read_text() == "one\ntwo"
    logs.close()


def test_a_log_that_cannot_be_written_stops_nobody(logs: OwnLogs, tmp_path: Path) -> None:
    with logs.open(tmp_path / "nowhere" / "a.log").open("ab") as pipe:
        pipe.write(b"x" * (1 << 20) + b"\n")
