"""`shoal deploy`: files that put a training on a cluster, ready to edit, and the secrets that they name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import shoal
from shoal.cli.common import debug_option, json_option, say, work_on
from shoal.cli.output import print_json

_CLUSTER_OPTIONS = [
    click.argument("run_config", metavar="RUN_CONFIG", type=click.Path(path_type=Path)),
    click.option("--name", metavar="NAME", help="Of everything that is made there (default: environment, algorithm, seed)."),
    click.option(
        "--nodes",
        type=click.IntRange(min=1),
        help="Nodes of the cluster, its head included (default: ray.nodes of the configuration, or 2).",
    ),
    click.option(
        "--actors-per-node",
        type=click.IntRange(min=1),
        help="Default: ray.actors_per_node of the configuration, or one per core, as far as there are groups.",
    ),
    click.option("--learners", type=click.IntRange(min=1), help="Default: as the configuration says."),
    click.option("--cpus", type=click.IntRange(min=1), default=8, show_default=True, help="Cores of each node."),
    click.option("--memory", "memory_gib", type=click.IntRange(min=1), default=16, show_default=True, help="GiB of each node."),
    click.option(
        "--gpus",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="GPUs of the head, where the learners are (Slurm: of each node; where learners are on nodes, each other one has one).",
    ),
]
image_option = click.option(
    "--image", metavar="IMAGE", default=f"shoal:{shoal.__version__}", show_default=True, help="With shoal, Ray and the environment."
)


def runs_option(default: str) -> Callable[..., Any]:
    return click.option(
        "--runs",
        metavar="DIR",
        default=default,
        show_default=True,
        help="Where runs lie on the nodes (a run_dir of the configuration that is a URL is kept instead).",
    )


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_CLUSTER_OPTIONS):
        command = option(command)
    return command


@click.group()
def deploy() -> None:
    """Print a file that puts a training on a cluster, ready to edit; or make the secrets that such a file names.

    RUN_CONFIG is a configuration file, or a run whose configuration is taken.
    """


@deploy.command()
@cluster_options
@image_option
@click.option("--namespace", metavar="NAMESPACE", default="default", show_default=True, help="Of Kubernetes.")
@runs_option("/runs")
@click.option("--ray-version", metavar="VERSION", default="2.60.0", show_default=True, help="Of the image.")
@json_option
@debug_option
def kubernetes(image: str, namespace: str, runs: str, ray_version: str, as_json: bool, debug: bool, **cluster: Any) -> None:
    """A KubeRay RayJob with its configuration and volume; an attempt that fails is followed by one that resumes."""
    from shoal.deploying import deployment as checks
    from shoal.deploying.rendering import kubernetes as render

    places = {
        "image": checks.check_image(image),
        "namespace": checks.check_namespace(namespace),
        "runs": checks.check_runs(runs),
        "ray_version": checks.check_ray_version(ray_version),
    }
    _print(cluster, as_json, lambda planned: render(planned, **places))


@deploy.command()
@cluster_options
@runs_option("$SLURM_SUBMIT_DIR/runs")
@click.option("--partition", metavar="NAME", help="Of Slurm (default: the cluster's).")
@click.option("--time", "time_limit", metavar="TIME", default="24:00:00", show_default=True, help="After which it is requeued.")
@json_option
@debug_option
def slurm(runs: str, partition: str | None, time_limit: str, as_json: bool, debug: bool, **cluster: Any) -> None:
    """A script for sbatch, which saves and requeues itself before its time is over, and resumes."""
    from shoal.deploying import deployment as checks
    from shoal.deploying.rendering import slurm as render

    places = {"runs": checks.check_runs(runs, variables=True), "time": checks.check_time(time_limit)}
    chosen = checks.check_partition(partition)
    _print(cluster, as_json, lambda planned: render(planned, partition=chosen, **places))


@deploy.command()
@cluster_options
@image_option
@runs_option("/runs")
@json_option
@debug_option
def compose(image: str, runs: str, as_json: bool, debug: bool, **cluster: Any) -> None:
    """A Compose file: the nodes of the cluster are containers of one machine."""
    from shoal.deploying import deployment as checks
    from shoal.deploying.rendering import compose as render

    places = {"image": checks.check_image(image), "runs": checks.check_runs(runs)}
    _print(cluster, as_json, lambda planned: render(planned, **places))


@deploy.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@json_option
@debug_option
def secrets(directory: Path, as_json: bool, debug: bool) -> None:
    """Make a cluster's token and certificate authority in DIR, readable by you alone; what is there is kept."""

    def work() -> Any:
        from shoal.engines.ray_security import make_secrets

        with _writing(directory):
            return make_secrets(directory)

    _say_files(work_on(work, as_json), as_json)


@deploy.command()
@click.argument("authority", metavar="SECRETS", type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", metavar="DIR", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where it is put.")
@click.option(
    "--name",
    "names",
    metavar="NAME",
    multiple=True,
    help="A host name, an address or a network (10.0.0.0/28) besides this host's own; may be repeated.",
)
@json_option
@debug_option
def certificate(authority: Path, out: Path, names: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Make the certificate of this node, signed by the authority that `shoal deploy secrets` made in SECRETS."""

    def work() -> Any:
        from shoal.engines import ray_security

        with _writing(out):
            ray_security.make_certificate(authority, out, [*ray_security.own_names(), *names])
        return [out / name for name in (ray_security.CERTIFICATE, ray_security.KEY, ray_security.AUTHORITY)]

    _say_files(work_on(work, as_json), as_json)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    from shoal.errors import ConfigError

    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write into {directory}: {error.strerror or error}") from error


def _print(cluster: dict[str, Any], as_json: bool, render: Callable[[Any], str]) -> None:
    from shoal.deploying.deployment import plan_deployment

    planned = plan_deployment(cluster.pop("run_config"), **cluster)
    text = render(planned)
    if as_json:
        print_json({"name": planned.name, "file": text, "warnings": planned.warnings})
        return
    for warning in planned.warnings:
        say(f"warning: {warning}", "lines")
    print(text, end="", flush=True)


def _say_files(files: list[Path], as_json: bool) -> None:
    if as_json:
        print_json({"files": files})
        return
    for file in files:
        print(file)
