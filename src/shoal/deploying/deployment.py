"""What a deployed training is, checked before any file is printed: its configuration, its nodes, and what each of them has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.imports import OPAQUE
from shoal.settings import check_spread, dump_tree, file_settings, named_secrets, resolve

NAME_LENGTH = 40  # KubeRay allows 47, of which "-secrets" takes its part; labels have 63
OLDEST_RAY = (2, 52)  # the first with token authentication
NODES = 2
_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_STORE = r"[a-z][a-z0-9+.-]*://[\w./:-]+"  # without a user, a password or a query
_SAID_BY_THE_DEPLOYMENT = ("run_dir", "actors", "engine")  # keys of the configuration


@dataclass(frozen=True)
class Deployment:
    """One training on a cluster of equal nodes; the head of the cluster is one of them, and drives the run."""

    name: str  # a DNS label
    settings: str  # the run's configuration, YAML in ASCII
    nodes: int
    actors_per_node: int
    learners: int | None  # None: as the configuration says
    cpus: int  # of each node, as is memory
    memory_gib: int
    gpus: int  # of the head, where the learners are, or the first of them
    worker_gpus: int = 0  # of each other node, where learners are there
    warnings: tuple[str, ...] = ()
    run_url: str | None = None  # of the run in an object store; None: it lies in a directory

    @property
    def options(self) -> str:
        """How `shoal train` is told of the cluster, but for the number of nodes. The address is always `auto`, so that a run can be resumed on another one."""
        learners = "" if self.learners is None else f" --learners {self.learners}"
        return f"--engine ray --address auto --actors-per-node {self.actors_per_node}{learners}"


def plan_deployment(
    run_config: Path,
    *,
    name: str | None = None,
    nodes: int | None = None,
    actors_per_node: int | None = None,
    learners: int | None = None,
    cpus: int = 8,
    memory_gib: int = 16,
    gpus: int = 0,
) -> Deployment:
    """The deployment of a configuration file, or of the configuration in a run's directory.

    Args:
      name: of everything that is made there (default: environment, algorithm and seed).
      nodes: default: as the configuration says, else NODES.
      actors_per_node: default: as the configuration says, else one for each core, as far as there are groups for them.
    Raises:
      ConfigError: names the key that is wrong, or says why it cannot be deployed: what `shoal train` would refuse on the cluster is refused here.
    """
    file = config_file(run_config)
    config = _on_a_cluster(file, learners)
    groups = config.sampling.groups or 1
    nodes = nodes or config.ray.nodes or NODES
    if nodes > groups:
        raise ConfigError(
            f"nodes: {nodes} nodes cannot share {groups} groups, since each has one at least; give --nodes {groups} or less, or raise sampling.groups in {file}"
        )
    actors = actors_per_node or config.ray.actors_per_node or min(cpus, groups // nodes)
    if nodes * actors > groups:
        raise ConfigError(
            f"actors-per-node: {nodes} nodes of {actors} actors cannot share {groups} groups; give --actors-per-node {groups // nodes} or less, "
            f"or raise sampling.groups in {file} to {nodes * actors}"
        )
    if actors > cpus:
        raise ConfigError(f"actors-per-node: {actors} actors need as many cores, and a node has {cpus}; give --cpus {actors} or more")
    if config.device == "cuda" and not gpus:
        raise ConfigError(
            "device: cuda was asked for, and the head, where the learners are, would have no GPU; give --gpus, or device auto"
        )
    if name is not None and (len(name) > NAME_LENGTH or not re.fullmatch(_LABEL, name)):
        raise ConfigError(
            f"name: {name!r} is no name for a cluster; take lower-case letters, digits and dashes, a letter first, {NAME_LENGTH} at most"
        )
    on_nodes = config.ray.learners_on == "nodes"
    plain = [_plain_learners(config, nodes, file)] if on_nodes else []
    run_url, settings = _run_url(file), _embedded(file)
    return Deployment(
        name or _label(config),
        settings,
        nodes,
        actors,
        learners,
        cpus,
        memory_gib,
        gpus,
        min(gpus, 1) if on_nodes else 0,
        (*plain, *_warnings(config, gpus, run_url), *_secrets(file_settings(file))),
        run_url,
    )


def _plain_learners(config: RunConfig, nodes: int, file: Path) -> str:
    """What to warn of where learners are on nodes. Every file has TLS, so the run would be refused unless the configuration allows to go without."""
    try:
        return check_spread(config, others=nodes - 1, tls=True)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {file}: ray.learners_on, ray.allow_plain_learners)") from None


def config_file(path: Path) -> Path:
    """The configuration that a path names: itself, or `config.yaml` in a run's directory. Raises ConfigError."""
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such configuration; name a YAML file (`env: {{id: CartPole-v1}}` is the shortest) or a run")
    return path


def _on_a_cluster(file: Path, learners: int | None) -> RunConfig:
    """The configuration as `shoal train` there resolves it."""
    given: dict[str, Any] = {"engine": "ray", "ray.address": "auto", "actors": None}
    return resolve(str(file), given if learners is None else {**given, "learners": learners})[0]


def _embedded(file: Path) -> str:
    """The configuration without what the deployment says itself: where the run lies, where it is placed, and how many actors there are."""
    tree = {key: value for key, value in file_settings(file).items() if key not in _SAID_BY_THE_DEPLOYMENT}
    ray = {key: value for key, value in (tree.pop("ray", None) or {}).items() if key not in ("address", "nodes", "actors_per_node")}
    return dump_tree({**tree, "ray": ray} if ray else tree)


def _secrets(tree: Any) -> list[str]:
    """A warning for each text of the configuration whose name says that it is a secret."""
    return [
        f"{path}: by its name a secret, and it stands in the file as it is: take it out of the configuration, and let the environment read it "
        "from a variable or a file of the node"
        for path in named_secrets(tree)
    ]


def _run_url(file: Path) -> str | None:
    """Of the run in an object store, where a file says so; a run whose configuration is taken stays where it is, and another is made."""
    run_dir = file_settings(file).get("run_dir")
    if (file.parent / "run.db").exists() or not isinstance(run_dir, str) or "://" not in run_dir:
        return None
    if not re.fullmatch(_STORE, run_dir, re.ASCII):  # not shown, since it may hold a secret
        raise ConfigError(
            "run_dir: not the URL of a run, such as s3://bucket/runs/one; secrets belong into the head's environment, and no user into it"
        )
    return run_dir


def _label(config: RunConfig) -> str:
    """A DNS label out of what names a run. A file's or a module's name stands for its environment."""
    location, _, made = str(config.env.id).rpartition(":")
    env = f"{Path(location).name.removesuffix('.py')}-{made}" if location else made
    tail = f"-{re.sub(r'[^a-z0-9]+', '-', config.algorithm.name.rpartition(':')[2].lower()).strip('-')[:12]}-{str(config.seed)[:8]}"
    head = re.sub(r"[^a-z0-9]+", "-", env.lower()).strip("-")
    head = head if head[:1].isalpha() else f"run-{head}"
    return f"{head[: NAME_LENGTH - len(tail)].strip('-')}{tail}"


def _warnings(config: RunConfig, gpus: int, run_url: str | None) -> list[str]:
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
    if gpus and config.device == "cpu":
        found.append(f"gpus: the configuration says `device: cpu`, so the learners leave {'the GPU' if gpus == 1 else f'{gpus} GPUs'} idle")
    if 0 < gpus < config.learners and config.device != "cpu" and config.ray.learners_on == "driver":
        found.append(
            f"gpus: {config.learners} learners want a GPU each, and the head has {gpus}; give --gpus {config.learners}, or --learners {gpus}"
        )
    if run_url is not None:
        scheme = run_url.partition(":")[0]
        found.append(
            f"run_dir: the run lies at {run_url}: the image needs the package that opens {scheme}://, and the head its credentials, which no file here has"
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
