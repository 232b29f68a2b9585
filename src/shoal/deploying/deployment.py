"""What a deployed training is, checked before any file is printed: its configuration, its nodes, and what each of them has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.imports import OPAQUE
from shoal.settings import dump_tree, file_settings, resolve

NAME_LENGTH = 40  # KubeRay allows 47, of which "-secrets" takes its part; labels have 63
OLDEST_RAY = (2, 52)  # the first with token authentication
_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"


@dataclass(frozen=True)
class Deployment:
    """One training on a cluster of equal nodes; the head of the cluster is one of them, and drives the run."""

    name: str  # a DNS label
    settings: str  # the run's configuration, YAML in ASCII
    nodes: int
    actors_per_node: int
    learners: int | None  # None: as the configuration says
    cpus: int  # of each node, as are memory and GPUs
    memory_gib: int
    gpus: int
    warnings: tuple[str, ...] = ()

    @property
    def options(self) -> str:
        """How `shoal train` is told of the cluster, but for the number of nodes. The address is always `auto`, so that a run can be resumed on another one."""
        learners = "" if self.learners is None else f" --learners {self.learners}"
        return f"--engine ray --address auto --actors-per-node {self.actors_per_node}{learners}"


def plan_deployment(
    run_config: Path,
    *,
    name: str | None = None,
    nodes: int = 2,
    actors_per_node: int | None = None,
    learners: int | None = None,
    cpus: int = 8,
    memory_gib: int = 16,
    gpus: int = 0,
) -> Deployment:
    """The deployment of a configuration file, or of the configuration in a run's directory.

    Args:
      name: of everything that is made there (default: environment, algorithm and seed).
      actors_per_node: default: one for each core, as far as there are groups for them.
    Raises:
      ConfigError: names the key that is wrong, or says why it cannot be deployed.
    """
    file = config_file(run_config)
    config, _ = resolve(str(file))
    groups = config.sampling.groups or 1
    if nodes > groups:
        raise ConfigError(
            f"nodes: {nodes} nodes cannot share {groups} groups, since each has one at least; give --nodes {groups} or less, or raise sampling.groups in {file}"
        )
    actors = min(cpus, groups // nodes) if actors_per_node is None else actors_per_node
    if nodes * actors > groups:
        raise ConfigError(
            f"actors-per-node: {nodes} nodes of {actors} actors cannot share {groups} groups; give --actors-per-node {groups // nodes} or less, "
            f"or raise sampling.groups in {file} to {nodes * actors}"
        )
    if actors > cpus:
        raise ConfigError(f"actors-per-node: {actors} actors need as many cores, and a node has {cpus}; give --cpus {actors} or more")
    if name is not None and (len(name) > NAME_LENGTH or not re.fullmatch(_LABEL, name)):
        raise ConfigError(
            f"name: {name!r} is no name for a cluster; take lower-case letters, digits and dashes, a letter first, {NAME_LENGTH} at most"
        )
    return Deployment(
        name or _label(config),
        _embedded(file),
        nodes,
        actors,
        learners,
        cpus,
        memory_gib,
        gpus,
        tuple(_warnings(config)),
    )


def config_file(path: Path) -> Path:
    """The configuration that a path names: itself, or `config.yaml` in a run's directory. Raises ConfigError."""
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such configuration; name a YAML file (`env: {{id: CartPole-v1}}` is the shortest) or a run")
    return path


def _embedded(file: Path) -> str:
    """The configuration without what the deployment says itself: where the run lies, and how many actors there are."""
    return dump_tree({key: value for key, value in file_settings(file).items() if key not in ("run_dir", "actors")})


def _label(config: RunConfig) -> str:
    """A DNS label out of what names a run. A file's or a module's name stands for its environment."""
    location, _, made = str(config.env.id).rpartition(":")
    env = f"{Path(location).name.removesuffix('.py')}-{made}" if location else made
    tail = f"-{re.sub(r'[^a-z0-9]+', '-', config.algorithm.name.rpartition(':')[2].lower()).strip('-')[:12]}-{str(config.seed)[:8]}"
    head = re.sub(r"[^a-z0-9]+", "-", env.lower()).strip("-")
    head = head if head[:1].isalpha() else f"run-{head}"
    return f"{head[: NAME_LENGTH - len(tail)].strip('-')}{tail}"


def _warnings(config: RunConfig) -> list[str]:
    """What the cluster must have, that this machine has. Raises ConfigError for an object that only one Python program has."""
    found = []
    for key, path in (("env.id", config.env.id), ("algorithm", config.algorithm.name), ("policy.network", config.policy.network)):
        if path and path.startswith(OPAQUE):
            raise ConfigError(
                f"{key}: {path} was a Python object that no import path leads to; put it into a module, and name it `module:name`"
            )
        if path and re.search(r"\.py:", path):
            found.append(
                f"{key} is a file of this machine, {path}: the nodes need it under the same path, or make it a module of the image"
            )
    return found


def check_image(image: str) -> str:
    return _checked("image", image, r"[a-zA-Z0-9][\w./:@-]*", "a container image, such as registry.example.com/me/shoal:1")


def check_namespace(namespace: str) -> str:
    return _checked("namespace", namespace, r"(?=.{1,63}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?", "a Kubernetes namespace")


def check_runs(directory: str, *, variables: bool = False) -> str:
    """A directory as it can stand in a file: absolute; `$SCRATCH/runs` only where a shell reads it (`variables`)."""
    start = r"[/$]" if variables else "/"
    return _checked("runs", directory, start + (r"[\w./${}-]*" if variables else r"[\w./-]*"), "an absolute path without spaces")


def check_ray_version(version: str) -> str:
    _checked("ray-version", version, r"\d+\.\d+\.\d+", "a version of Ray, such as 2.60.0")
    if tuple(map(int, version.split(".")[:2])) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise ConfigError(f"ray-version: Ray {version} has no token authentication (CVE-2023-48022); take {oldest} or newer")
    return version


def check_partition(partition: str | None) -> str | None:
    return partition and _checked("partition", partition, r"[\w.,-]+", "a partition of Slurm, or several with commas")


def check_time(limit: str) -> str:
    return _checked("time", limit, r"(\d+-)?\d+(:\d+){0,2}", "a time as Slurm writes it, such as 24:00:00 or 2-12")


def _checked(key: str, value: str, pattern: str, wanted: str) -> str:
    """Values stand in other files' syntax, so each has a form that needs no quotes there."""
    if not re.fullmatch(pattern, value, re.ASCII):
        raise ConfigError(f"{key}: {value!r} is not {wanted}")
    return value
