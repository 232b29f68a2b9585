"""The Compose file: what the specification's schema says of it, and what its parts say of each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from schema_checks import faults, schema

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


def test_token_and_tls_are_on_in_every_container_and_no_secret_is_in_the_file(planned: Planned) -> None:
    file = composed(planned())
    for service in file["services"].values():
        env = service["environment"]
        assert env["RAY_AUTH_MODE"] == "token"
        assert env["RAY_USE_TLS"] == "1"
        assert env["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/token"
        assert set(service["secrets"]) == set(file["secrets"])
        out = re.search(r"shoal deploy certificate /run/secrets --out (\S+)", service["command"][-1])
        assert out is not None
        files = {env[name] for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")}
        assert files == {f"{out[1]}/tls.crt", f"{out[1]}/tls.key", f"{out[1]}/ca.crt"}
    assert all(set(secret) == {"file"} for secret in file["secrets"].values())
    assert not re.search(r"[0-9a-f]{32}|BEGIN", compose(planned(), image="shoal:1", runs="/runs"))


def test_what_services_name_is_there(planned: Planned) -> None:
    file = composed(planned())
    for service in file["services"].values():
        assert {config["source"] for config in service["configs"]} == set(file["configs"])
        assert {volume.partition(":")[0] for volume in service["volumes"]} == set(file["volumes"])


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
