"""The Compose file: what the specification's schema says of it, and what its parts say of each other."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from schema_checks import faults, schema

from shoal.cli import main
from shoal.deploying.deployment import Deployment
from shoal.deploying.rendering import compose

Planned = Callable[..., Deployment]


def composed(planned: Deployment) -> Any:
    return yaml.safe_load(compose(planned, image="shoal:1", runs="/runs"))


@pytest.mark.parametrize("how", [{}, {"nodes": 1}, {"nodes": 4, "gpus": 2}])
def test_it_is_what_the_specification_says(planned: Planned, how: dict[str, int]) -> None:
    assert faults(composed(planned(**how)), schema("compose-spec.json")) == []


def test_the_schema_would_see_a_fault(planned: Planned) -> None:
    file = composed(planned())
    file["services"]["head"]["healthchek"] = {}
    file["services"]["worker"]["deploy"]["replicas"] = [2]
    found = "\n".join(faults(file, schema("compose-spec.json")))
    assert "services.head: 'healthchek'" in found
    assert "[2] is not of type" in found


def test_nodes_and_what_each_of_them_has(planned: Planned) -> None:
    services = composed(planned(nodes=4, cpus=4, memory_gib=10, gpus=2))["services"]
    assert services["worker"]["deploy"]["replicas"] == 3
    for service in services.values():
        assert service["deploy"]["resources"]["limits"] == {"cpus": "4", "memory": "10g"}
        assert service["shm_size"] == "3gb"
        assert service["healthcheck"]["test"][:3] == ["CMD", "ray", "health-check"]
    head, worker = (services[name]["deploy"]["resources"] for name in ("head", "worker"))
    assert head["reservations"]["devices"] == [{"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}]
    assert "reservations" not in worker, "the learners are on the head, and actors need no GPU"
    assert "nvidia" not in str(composed(planned()))
    assert services["worker"]["depends_on"] == {"head": {"condition": "service_healthy"}}


def test_the_container_of_a_learner_has_a_gpu_where_the_head_has_some(spread: Planned) -> None:
    file = composed(spread(nodes=2, gpus=2))
    head, worker = (file["services"][name]["deploy"]["resources"]["reservations"]["devices"] for name in ("head", "worker"))
    assert [device["count"] for device in (*head, *worker)] == [2, 1]
    assert faults(file, schema("compose-spec.json")) == []
    assert "nvidia" not in str(composed(spread(nodes=2)))


def test_token_and_tls_are_on_in_every_container_and_no_secret_is_in_the_file(planned: Planned) -> None:
    file = composed(planned())
    for service in file["services"].values():
        env = service["environment"]
        assert env["RAY_AUTH_MODE"] == "token"
        assert env["RAY_USE_TLS"] == "1"
        named = {env[name] for name in ("RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")}
        assert named == {f"/run/secrets/{name}" for name in service["secrets"]}
        assert set(service["secrets"]) == set(file["secrets"])
    assert all(set(secret) == {"file"} for secret in file["secrets"].values())
    assert not re.search(r"[0-9a-f]{32}|BEGIN", compose(planned(), image="shoal:1", runs="/runs"))


def test_no_container_sees_the_authoritys_key_and_a_worker_no_configuration_and_no_runs(planned: Planned) -> None:
    file = composed(planned())
    assert {secret["file"] for secret in file["secrets"].values()} == {
        "./secrets/token", "./secrets/node/tls.crt", "./secrets/node/tls.key", "./secrets/node/ca.crt",
    }  # fmt: skip
    assert not {"configs", "volumes"} & set(file["services"]["worker"])


@pytest.mark.parametrize("nodes", [1, 4, 16])
def test_the_commands_in_its_head_make_what_it_names_for_every_address_of_its_network(
    nodes: int, planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography import x509

    deployment = planned(nodes=nodes)
    text, file = compose(deployment, image="shoal:1", runs="/runs"), composed(deployment)
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"^#   shoal (deploy .*)$", text, re.M):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command))
        assert ended.value.code == 0
    for secret in file["secrets"].values():
        assert (tmp_path / secret["file"]).stat().st_mode & 0o777 == 0o600
    (pool,) = file["networks"]["default"]["ipam"]["config"]
    containers = list(ipaddress.ip_network(pool["subnet"]).hosts())[1:]  # the first is the gateway
    assert len(containers) >= 2 * nodes
    certificate = x509.load_pem_x509_certificate((tmp_path / "secrets/node/tls.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(containers) <= set(names.get_values_for_type(x509.IPAddress))
    assert "head" in names.get_values_for_type(x509.DNSName)


def test_what_services_name_is_there(planned: Planned) -> None:
    file = composed(planned())
    head = file["services"]["head"]
    assert {config["source"] for config in head["configs"]} == set(file["configs"])
    assert {volume.partition(":")[0] for volume in head["volumes"]} == set(file["volumes"])


@dataclass
class Head:
    """head.sh as the container executes it, with executables that stand for Ray and the training, whose attempts end with `codes`."""

    root: Path
    path: Path

    def start(self, *codes: str) -> subprocess.Popen[str]:
        (self.root / "codes").write_text("".join(f"{code}\n" for code in codes))
        return subprocess.Popen(
            ["bash", self.root / "head.sh"],
            env={**os.environ, "PATH": f"{self.path}:{os.environ['PATH']}", "FAKE": str(self.root)},
            cwd=self.root,
        )

    def said(self, name: str) -> list[str]:
        file = self.root / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def head(planned: Planned, tmp_path: Path, executable: Callable[[str, str], Path]) -> Head:
    configs = composed(planned())["configs"]
    for name in ("head.sh", "run.sh"):
        (tmp_path / name).write_text(configs[name]["content"].replace("$$", "$").replace("/etc/shoal", str(tmp_path)))
    executable("ray", '#!/bin/bash\necho "$1" >> "$FAKE/ray"\n')
    return Head(tmp_path, executable("shoal", """#!/bin/bash
echo "$1" >> "$FAKE/shoal"
code=$(sed -n "$(wc -l < "$FAKE/shoal")p" "$FAKE/codes")
if [ "$code" = wait ]; then trap 'exit 130' TERM; touch "$FAKE/trains"; while :; do sleep 0.05; done; fi
exit "$code"
"""))  # fmt: skip


@pytest.mark.parametrize("code", ["0", "2", "3", "4", "130"])
def test_what_would_end_so_again_is_not_repeated(code: str, head: Head) -> None:
    assert head.start(code).wait(60) == int(code)
    assert (head.said("shoal"), head.said("ray")) == (["train"], ["start"])


@pytest.mark.parametrize("codes", [["1", "137", "0"], ["1", "2"], ["1"] * 6])
def test_whatever_else_failed_is_tried_again_on_a_new_head(codes: list[str], head: Head) -> None:
    assert head.start(*codes).wait(60) == int(codes[-1])
    assert len(head.said("shoal")) == len(codes)
    assert head.said("ray") == ["start", *["stop", "start"] * (len(codes) - 1)]


def test_a_head_that_is_told_to_end_waits_for_the_last_checkpoint(head: Head) -> None:
    started = head.start("wait")
    deadline = time.monotonic() + 60.0
    while not (head.root / "trains").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.terminate()
    assert started.wait(60) == 130
    assert head.said("shoal") == ["train"]


def test_the_configuration_is_in_it_with_every_dollar_twice(planned: Planned) -> None:
    deployment = planned(name="one", nodes=4)
    configs = composed(deployment)["configs"]
    assert configs["config.yaml"]["content"].replace("$$", "$") == deployment.settings
    assert "costs $$5, {{name}}" in configs["config.yaml"]["content"]
    assert not re.search(r"(?<!\$)\$(\$\$)*(?!\$)", compose(deployment, image="shoal:1", runs="/runs")), (
        "Compose would take it for a variable"
    )
    assert '--run-dir "$$run" --engine ray --address auto --actors-per-node 4 --nodes 4' in configs["run.sh"]["content"]


def test_a_run_in_an_object_store_needs_no_volume(stored: Planned) -> None:
    file = composed(stored(name="one"))
    assert faults(file, schema("compose-spec.json")) == []
    assert "volumes" not in file
    assert not any("volumes" in service for service in file["services"].values())
    script = file["configs"]["run.sh"]["content"]
    assert "run=s3://bucket/runs/one\n" in script
    assert 'if shoal show "$$run" > /dev/null 2>&1; then' in script
