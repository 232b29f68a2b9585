"""The Kubernetes file: what KubeRay's schema says of it, and what its parts say of each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from schema_checks import faults, schema, strict

from shoal.deploying.deployment import Deployment
from shoal.deploying.rendering import kubernetes

Planned = Callable[..., Deployment]
PLACES = {"image": "registry.example.com/me/shoal:1", "namespace": "learning", "runs": "/runs", "ray_version": "2.60.0"}


def documents(planned: Deployment, **places: str) -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(kubernetes(planned, **{**PLACES, **places}))}


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("how", [{}, {"nodes": 1}, {"nodes": 4, "gpus": 2, "cpus": 64, "memory_gib": 256, "learners": 2}])
def test_the_job_is_what_the_schema_of_kuberay_says(planned: Planned, how: dict[str, int]) -> None:
    job = documents(planned(**how))["RayJob"]
    assert faults(job, strict(schema("rayjob.json"))) == []


def test_the_schema_would_see_a_fault(planned: Planned) -> None:
    job = documents(planned())["RayJob"]
    against = strict(schema("rayjob.json"))
    pods(job)[0]["containers"][0]["volumeMount"] = []
    job["spec"]["backofLimit"] = 3
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "none"
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "two"
    found = "\n".join(faults(job, against))
    assert all(
        part in found
        for part in ("'backofLimit' was unexpected", "'none' is not one of", "'template' is a required", "'two' is not of type")
    )
    job = documents(planned())["RayJob"]
    pods(job)[1]["containers"][0]["volumeMount"] = []
    assert "'volumeMount' was unexpected" in "\n".join(faults(job, against))


def test_nodes_and_what_each_of_them_has(planned: Planned) -> None:
    job = documents(planned(nodes=4, cpus=4, memory_gib=32, gpus=2))["RayJob"]
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (3, 3, 3)
    head, worker = (pod["containers"][0]["resources"] for pod in pods(job))
    assert head["requests"] == worker["requests"] == worker["limits"] == {"cpu": "4", "memory": "32Gi"}
    assert head["limits"] == {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "2"}, "the learners are on the head, and actors need no GPU"
    assert all(pod["restartPolicy"] == "Never" for pod in pods(job))
    without = pods(documents(planned())["RayJob"])
    assert "nvidia" not in str(without)
    assert documents(planned(nodes=1))["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 0


def test_the_pod_of_a_learner_has_a_gpu_where_the_head_has_some(spread: Planned) -> None:
    job = documents(spread(nodes=2, cpus=4, memory_gib=32, gpus=2))["RayJob"]
    head, worker = (pod["containers"][0]["resources"] for pod in pods(job))
    assert (head["limits"]["nvidia.com/gpu"], worker["limits"]["nvidia.com/gpu"]) == ("2", "1")
    assert faults(job, strict(schema("rayjob.json"))) == []
    assert "nvidia" not in str(pods(documents(spread(nodes=2))["RayJob"]))


def test_an_attempt_that_fails_is_followed_by_another(planned: Planned) -> None:
    spec = documents(planned())["RayJob"]["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["entrypoint"] == "sh /etc/shoal/job.sh"


def test_token_and_tls_are_on_in_every_pod_and_no_secret_is_in_the_file(planned: Planned) -> None:
    job = documents(planned())["RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    secret = f"{job['metadata']['name']}-secrets"
    assert cluster["authOptions"] == {"mode": "token", "secretName": secret}
    assert cluster["rayVersion"] == "2.60.0"
    for pod in pods(job):
        env = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"] == {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": secret, "key": "auth_token"}}}
        assert env["RAY_USE_TLS"]["value"] == "1"
        (certificate,) = pod["initContainers"]
        out = certificate["command"][certificate["command"].index("--out") + 1]
        files = {env[name]["value"] for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")}
        assert files == {f"{out}/tls.crt", f"{out}/tls.key", f"{out}/ca.crt"}
        assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "tls"] == [out]
        assert "authority" not in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}, (
            "its key is for the init container alone"
        )
    assert not re.search(r"[0-9a-f]{32}|BEGIN", kubernetes(planned(), **PLACES))


def test_every_volume_that_is_mounted_is_there_and_every_name_belongs_together(planned: Planned) -> None:
    parts = documents(planned(name="one"))
    assert {part["metadata"]["namespace"] for part in parts.values()} == {"learning"}
    for pod in pods(parts["RayJob"]):
        there = {volume["name"]: volume for volume in pod["volumes"]}
        used = {mount["name"] for container in (*pod["containers"], *pod["initContainers"]) for mount in container["volumeMounts"]}
        assert used == set(there)
    head = {volume["name"]: volume for volume in pods(parts["RayJob"])[0]["volumes"]}
    assert head["config"]["configMap"]["name"] == parts["ConfigMap"]["metadata"]["name"]
    assert head["runs"]["persistentVolumeClaim"]["claimName"] == parts["PersistentVolumeClaim"]["metadata"]["name"]
    mounted = {mount.get("subPath") for mount in pods(parts["RayJob"])[0]["containers"][0]["volumeMounts"]} - {None}
    assert mounted == set(parts["ConfigMap"]["data"])


def test_the_configuration_is_in_it_to_the_letter(planned: Planned) -> None:
    deployment = planned()
    assert documents(deployment)["ConfigMap"]["data"]["config.yaml"] == deployment.settings
    assert "costs $5, {{name}}" in deployment.settings


def test_the_commands_in_its_head_make_the_secret_that_it_names(planned: Planned) -> None:
    text = kubernetes(planned(name="one"), **PLACES)
    assert "create secret generic one-secrets" in text
    assert "--from-file=auth_token=secrets/token --from-file=secrets/ca.crt --from-file=secrets/ca.key" in text


def test_the_entry_point_trains_and_resumes_what_it_began(planned: Planned, executable: Callable[[str, str], Path], tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    runs = tmp_path / "runs"
    script.write_text(documents(planned(name="one", nodes=4, learners=2), runs=str(runs))["ConfigMap"]["data"]["run.sh"])
    fakes = executable("shoal", '#!/bin/sh\nprintf "%s\\n" "$*"\n')

    def says() -> str:
        environment = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}"}
        return subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert says() == (
        f"train /etc/shoal/config.yaml --run-dir {runs}/one --engine ray --address auto --actors-per-node 4 --learners 2 --nodes 4 --view lines"
    )
    (runs / "one").mkdir(parents=True)
    (runs / "one" / "config.yaml").write_text("")
    assert says() == f"resume {runs}/one --view lines"


@pytest.mark.parametrize(("code", "stopped"), [(0, False), (1, False), (137, False), (2, True), (3, True), (4, True), (130, True)])
def test_a_job_that_would_fail_so_again_is_stopped_which_is_not_repeated(
    code: int, stopped: bool, planned: Planned, executable: Callable[[str, str], Path], tmp_path: Path
) -> None:
    data = documents(planned())["ConfigMap"]["data"]
    (tmp_path / "run.sh").write_text(f"exit {code}\n")
    (tmp_path / "job.sh").write_text(data["job.sh"].replace("/etc/shoal", str(tmp_path)))
    executable("ray", f'#!/bin/sh\necho "$@" >> {tmp_path}/ray\n')
    fakes = executable("sleep", "#!/bin/sh\n")
    job = json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "one-x7", "job_name": "one-x7"}})
    environment = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}", "RAY_JOB_CONFIG_JSON_ENV_VAR": job}
    assert subprocess.run(["sh", tmp_path / "job.sh"], env=environment, check=False).returncode == code
    said = (tmp_path / "ray").read_text() if (tmp_path / "ray").exists() else ""
    assert said == ("job stop --address http://127.0.0.1:8265 --no-wait one-x7\n" if stopped else "")


def test_a_run_in_an_object_store_needs_no_volume(stored: Planned, executable: Callable[[str, str], Path], tmp_path: Path) -> None:
    deployment = stored(name="one", nodes=4)
    parts = documents(deployment)
    assert set(parts) == {"ConfigMap", "RayJob"}
    assert faults(parts["RayJob"], strict(schema("rayjob.json"))) == []
    for pod in pods(parts["RayJob"]):
        there = {volume["name"] for volume in pod["volumes"]}
        used = {mount["name"] for container in (*pod["containers"], *pod["initContainers"]) for mount in container["volumeMounts"]}
        assert used == there
        assert "runs" not in there
    script = tmp_path / "run.sh"
    script.write_text(parts["ConfigMap"]["data"]["run.sh"])
    fakes = executable("shoal", '#!/bin/sh\nif [ "$1" = show ]; then [ -e "$FAKE_BEGUN" ] && exit 0 || exit 2; fi\nprintf "%s\\n" "$*"\n')

    def says() -> str:
        environment = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}", "FAKE_BEGUN": str(tmp_path / "begun")}
        return subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert says() == (
        "train /etc/shoal/config.yaml --run-dir s3://bucket/runs/one --engine ray --address auto --actors-per-node 4 --nodes 4 --view lines"
    )
    (tmp_path / "begun").touch()
    assert says() == "resume s3://bucket/runs/one --view lines"
