"""A deployment put into the templates beside this file: `kubernetes.yaml` (with `claim.yaml` and `job.sh`), `slurm.sh`, `compose.yaml` (with `head.sh`), and `run.sh`,
which all but Slurm execute.

No secret is in what they print: they name where the secrets will lie.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from pathlib import Path

from shoal.deploying.deployment import Deployment

_HERE = Path(__file__).parent
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_SHARED_MEMORY = 0.3  # of a node's memory: what Ray takes for its objects


def kubernetes(deployment: Deployment, *, image: str, namespace: str, runs: str, ray_version: str) -> str:
    """ConfigMap, PersistentVolumeClaim and KubeRay RayJob. `runs` is where the volume is mounted; a run in an object store has none."""
    values = {**_common(deployment, runs), "image": image, "namespace": namespace, "ray_version": ray_version}
    claim = fill(_template("claim.yaml"), values) if values["runs"] else None
    return fill(_template("kubernetes.yaml"), {**values, "claim": claim, "run": _run_script(deployment, runs), "job": _template("job.sh")})


def slurm(deployment: Deployment, *, runs: str, partition: str | None, time: str) -> str:
    """A script for sbatch. `runs` lies on a file system that all nodes share."""
    run = {"run": deployment.run_url or "$runs/$name", "exists": _exists(deployment)}
    return fill(_template("slurm.sh"), {**_common(deployment, runs), **run, "runs": runs, "partition": partition, "time": time})


def compose(deployment: Deployment, *, image: str, runs: str) -> str:
    """A Compose file. In it a dollar is written twice where it is meant."""
    common = _common(deployment, runs)
    texts = {"settings": deployment.settings, "run": _run_script(deployment, runs), "head": fill(_template("head.sh"), common)}
    doubled = {name: text.replace("$", "$$") for name, text in texts.items()}
    shared = {"shared_memory_gib": math.ceil(deployment.memory_gib * _SHARED_MEMORY)}
    values = {**common, **shared, **doubled, "image": image, "subnet": str(_subnet(deployment.nodes))}
    return fill(_template("compose.yaml"), {**values, "volume": "runs: " if values["runs"] else None})


def _subnet(nodes: int) -> ipaddress.IPv4Network:
    """Addresses of containers: twice as many as there are nodes, since one that is made again may get another, besides gateway and broadcast."""
    return ipaddress.IPv4Network(f"10.213.64.0/{32 - max(4, (2 * nodes + 3).bit_length())}")


def _common(deployment: Deployment, runs: str) -> dict[str, object]:
    return {
        "name": deployment.name,
        "settings": deployment.settings,
        "nodes": deployment.nodes,
        "workers": deployment.nodes - 1,
        "cpus": deployment.cpus,
        "memory_gib": deployment.memory_gib,
        "gpus": deployment.gpus or None,
        "worker_gpus": deployment.worker_gpus or None,
        "options": deployment.options,
        "runs": None if deployment.run_url else runs,
        "claim_name": None if deployment.run_url else f"{deployment.name}-runs",
    }


def _run_script(deployment: Deployment, runs: str) -> str:
    run = deployment.run_url or f"{runs.rstrip('/')}/{deployment.name}"
    options = f"{deployment.options} --nodes {deployment.nodes}"
    return fill(_template("run.sh"), {"run": run, "exists": _exists(deployment), "options": options})


def _exists(deployment: Deployment) -> str:
    """What asks in a shell whether `$run` was begun."""
    return '[ -f "$run/config.yaml" ]' if deployment.run_url is None else 'shoal show "$run" > /dev/null 2>&1'


def _template(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, object]) -> str:
    """The template with a value for each `{{name}}`.

    A line that names a value of None goes. A value of several lines stands alone on its line, and each of its lines is indented as that one.
    Raises KeyError for a name without a value.
    """
    lines: list[str] = []
    for line in template.splitlines():
        found = {name: values[name] for name in _PLACE.findall(line)}
        if None in found.values():
            continue
        alone = re.fullmatch(r"( *)\{\{(\w+)\}\}", line)
        if alone:
            texts = str(found[alone[2]]).rstrip("\n").split("\n")
            lines.extend(alone[1] + text if text else "" for text in texts)
        else:
            lines.append(_PLACE.sub(lambda place, found=found: str(found[place[1]]), line))  # type: ignore[misc]
    return "\n".join(lines) + "\n"
