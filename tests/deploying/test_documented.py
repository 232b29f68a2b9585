"""The commands of the guide, executed as they stand there: what they print is what the schemas take."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from schema_checks import faults, schema, strict

from shoal.cli import main

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
CONFIGURATION = re.search(r"```yaml\n(# my\.yaml.*?)```", GUIDE, re.S)
COMMANDS = re.findall(r"^shoal (deploy (?:kubernetes|slurm|compose) .*?) > (\S+)$", GUIDE, re.M)


def test_there_is_a_command_for_each_kind_of_cluster() -> None:
    assert {command.split()[1] for command, _ in COMMANDS} == {"kubernetes", "slurm", "compose"}
    assert CONFIGURATION is not None


@pytest.mark.parametrize("command", [command for command, _ in COMMANDS])
def test_what_a_documented_command_prints_is_taken(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert CONFIGURATION is not None
    (tmp_path / "my.yaml").write_text(CONFIGURATION[1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    said = capfd.readouterr()
    assert ended.value.code == 0, said.err
    check: dict[str, Any] = {"kubernetes": check_kubernetes, "slurm": check_slurm, "compose": check_compose}
    check[command.split()[1]](said.out)


def check_kubernetes(text: str) -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all(text)}
    assert faults(parts["RayJob"], strict(schema("rayjob.json"))) == []
    assert yaml.safe_load(parts["ConfigMap"]["data"]["config.yaml"])["env"] == {"id": "CartPole-v1", "max_episode_steps": 200}


def check_compose(text: str) -> None:
    assert faults(yaml.safe_load(text), schema("compose-spec.json")) == []


def check_slurm(text: str) -> None:
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""
