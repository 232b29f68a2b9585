"""Commands, and what they end with.

Exit codes: 0 a stop condition was met; 130 interrupted (checkpoint kept); 2 usage or configuration; 3 environment fault;
4 diverged; 1 anything else. An error is one message on standard error, without traceback unless `--debug`; with `--json` it is also
the one object on standard output, under `error`.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import click

from shoal.cli.bench import bench
from shoal.cli.chaos import chaos
from shoal.cli.common import debug_option, give_answer, given_settings, json_option, say, work_on
from shoal.cli.deploy import deploy
from shoal.cli.options import ConfigCommand
from shoal.cli.output import find_here, find_run, plain, print_json, print_table
from shoal.cli.plan import plan
from shoal.errors import ShoalError

INTERRUPTED = 130
STALLS_SECONDS = 10.0  # a supervisor that does not answer within this time is stuck itself
COMMANDS = ("state", "save", "pause", "continue", "stop", "scale")
view_option = click.option(
    "--view", type=click.Choice(["auto", "live", "lines", "silent"]), default="auto", help="What is shown on standard error."
)
profile_option = click.option(
    "--profile", is_flag=True, help="Write profile.json into the run's directory: what every process did when, for ui.perfetto.dev."
)
run_argument = click.argument("run", metavar="RUN")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="shoal", prog_name="shoal")
def cli() -> None:
    """Distributed reinforcement learning: every sample accounted for, every run resumable and replayable.

    RUN is a run's directory, its name in runs/, `latest`, or the URL of one in a store.
    """


cli.add_command(bench)
cli.add_command(chaos)
cli.add_command(deploy)
cli.add_command(plan)


@cli.command(cls=ConfigCommand, configuration_help=True)
@click.argument("env_or_config", metavar="ENV_OR_CONFIG")
@json_option
@view_option
@profile_option
@debug_option
@click.pass_context
def train(ctx: click.Context, env_or_config: str, as_json: bool, view: str, profile: bool, debug: bool) -> None:
    """Train on an environment until a stop condition is met.

    ENV_OR_CONFIG is a Gymnasium id (CartPole-v1), package.module:factory, file.py:factory, an Atari id (ALE/Pong-v5), a YAML file,
    or the directory of a run whose configuration is taken. Known environments have tuned presets. Ctrl-C stops and keeps a checkpoint.
    """
    settings = given_settings(ctx)

    def work() -> Any:
        from shoal.settings import preset_words, resolve

        config, preset = resolve(env_or_config, settings)
        chosen = preset_words(preset, config.algorithm.name, settings.get("preset"))
        sampling = config.sampling
        say(
            f"{config.env.id}: {config.algorithm.name} ({config.mode or 'its own mode'}), {chosen}, seed {config.seed}, {_count(config)}, "
            f"{sampling.groups} groups of {sampling.group_size}",
            view,
        )
        import shoal

        return _with_view(view, lambda progress: shoal.train(env_or_config, progress=progress, profile=profile, **settings))

    _finish_training(work_on(work, as_json), as_json)


@cli.command(cls=ConfigCommand)
@run_argument
@click.option(
    "--take-over",
    is_flag=True,
    help="Of a run in a store: also where its lock says that another driver is alive, because you know that it is not.",
)
@json_option
@view_option
@profile_option
@debug_option
@click.pass_context
def resume(ctx: click.Context, run: str, take_over: bool, as_json: bool, view: str, profile: bool, debug: bool) -> None:
    """Go on with a run from its newest whole checkpoint, exactly."""
    settings = given_settings(ctx)

    def work() -> Any:
        import shoal

        forced: dict[str, Any] = {"take_over": True} if take_over else {}
        return _with_view(view, lambda progress: shoal.resume(find_run(run), progress=progress, profile=profile, **forced, **settings))

    _finish_training(work_on(work, as_json), as_json)


@cli.command()
@run_argument
@click.option("--episodes", type=click.IntRange(min=1), default=100, show_default=True, help="Episodes to play.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Names the episodes' seeds.")
@click.option("--video", type=click.Path(dir_okay=False, path_type=Path), help="Record the first episode to FILE.mp4.", metavar="FILE.mp4")
@click.option(
    "--max-episode-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cut episodes after N steps. Without it, one of more than 200,000 is a fault.",
)
@json_option
@debug_option
def evaluate(run: str, episodes: int, seed: int, video: Path | None, max_episode_steps: int | None, as_json: bool, debug: bool) -> None:
    """Play a run's newest policy, and give the returns with an interval."""

    def work() -> Any:
        import shoal

        return shoal.evaluate(find_run(run), episodes=episodes, seed=seed, video=video, max_episode_steps=max_episode_steps)

    give_answer(work_on(work, as_json), as_json)


@cli.command(cls=ConfigCommand)
@click.argument("env", metavar="ENV")
@json_option
@debug_option
@click.pass_context
def check(ctx: click.Context, env: str, as_json: bool, debug: bool) -> None:
    """Check an environment: its interface, spaces, determinism, speed. Ends with 3 where something is wrong."""
    settings = given_settings(ctx)

    def work() -> Any:
        import shoal

        return shoal.check(env, **settings)

    report = plain(work_on(work, as_json))
    give_answer(report, as_json, "print_check")
    if any(finding.get("severity") == "error" for finding in report.get("findings", [])):
        sys.exit(3)


@cli.command()
@click.argument("directory", metavar="[DIR]", default="runs")
@json_option
@debug_option
def runs(directory: str, as_json: bool, debug: bool) -> None:
    """List the runs in a directory, or right below a URL."""

    def work() -> Any:
        from shoal.runs import list_runs

        return list_runs(directory)

    rows = plain(work_on(work, as_json))
    if as_json:
        print_json({"runs": rows})
    elif rows:
        print_table(rows, list(dict.fromkeys(column for row in rows for column in row)))
    else:
        say(f"no runs in {directory.rstrip('/')}/", "lines")


@cli.command()
@run_argument
@json_option
@debug_option
def show(run: str, as_json: bool, debug: bool) -> None:
    """Show a run: configuration, schema, results, ledger balance, lag, faults."""

    def work() -> Any:
        from shoal.runs import show as show_run

        return show_run(find_run(run))

    give_answer(work_on(work, as_json), as_json, "print_show")


@cli.command()
@run_argument
@json_option
@debug_option
def replay(run: str, as_json: bool, debug: bool) -> None:
    """Execute a run again, update by update, in one process.

    It ends with the weights of the newest checkpoint, and with 1 where it does not.
    """

    def work() -> Any:
        from shoal.api import replay as replay_run
        from shoal.files import CheckpointDirectory, without_replay
        from shoal.monitoring.live import CountView
        from shoal.runs import find_run as directory_of

        named = find_run(run)
        directory = directory_of(named)
        total = CheckpointDirectory(directory / "checkpoints").newest(without_replay).json("learner")["version"]
        with closing(CountView("replay: update", int(total))) as told:
            found = replay_run(directory, progress=told)
        return {**found, "run": named if isinstance(named, str) else found["run"]}

    result = work_on(work, as_json)
    give_answer(result, as_json, "print_replay")
    if not result["equal"]:
        say("shoal: the replay ends with other weights than the run", "lines")
        sys.exit(1)


@cli.command()
@run_argument
@click.argument("command", metavar="state|save|pause|continue|stop|scale", type=click.Choice(COMMANDS))
@click.argument("number", metavar="[N]", required=False, type=click.IntRange(min=1))
@json_option
@debug_option
def control(run: str, command: str, number: int | None, as_json: bool, debug: bool) -> None:
    """Ask a living run for its state, or tell it what to do.

    \b
    state      where it stands
    save       write a checkpoint now; answers once it is whole
    pause      order no more rollouts
    continue   go on after a pause
    stop       end after this update, with a checkpoint, as after Ctrl-C
    scale N    go on with N actors
    """
    if (number is not None) != (command == "scale"):
        raise click.UsageError(
            "scale needs the number of actors: shoal control RUN scale 4" if number is None else f"{command} takes no number"
        )

    def work() -> Any:
        from shoal.cli.control import tell_run

        return tell_run(find_here(run), command, {} if number is None else {"actors": number})

    answer = plain(work_on(work, as_json))
    give_answer(answer, as_json, "print_control", command=command)


@cli.command()
@run_argument
@click.option("--actors", type=click.IntRange(min=1), metavar="N", help="Go on with N actors; it follows the load no more.")
@click.option(
    "--autoscale",
    metavar="MIN:MAX",
    help="Follow the load from now on, between these numbers of actors; `none`: no more, and stay as it is.",
)
@json_option
@debug_option
def scale(run: str, actors: int | None, autoscale: str | None, as_json: bool, debug: bool) -> None:
    """Have a living run go on with more or fewer actors.

    Groups move to others once what they are making is finished, with their random streams and states. On a cluster actors are spread evenly over its nodes.
    """
    if (actors is None) == (autoscale is None):
        raise click.UsageError("give either --actors N or --autoscale MIN:MAX")

    def work() -> Any:
        from shoal.cli.control import tell_run

        return tell_run(find_here(run), "scale", {"actors": actors} if autoscale is None else {"autoscale": autoscale})

    give_answer(plain(work_on(work, as_json)), as_json, "print_control", command="scale")


@cli.command()
@run_argument
@json_option
@debug_option
def stalls(run: str, as_json: bool, debug: bool) -> None:
    """Say who waits for whom in a living run, for how long, and show every process's stack."""

    def work() -> Any:
        from shoal.cli.control import tell_run

        return tell_run(find_here(run), "stalls", timeout_seconds=STALLS_SECONDS)

    give_answer(plain(work_on(work, as_json)), as_json, "print_stalls")


# ------------------------------------------------------------------------------------------------------------ around the commands


def _count(config: Any) -> str:
    if config.engine == "ray":
        nodes = "all nodes" if config.ray.nodes is None else "1 node" if config.ray.nodes == 1 else f"{config.ray.nodes} nodes"
        return f"on {nodes} of a cluster" if config.ray.address or os.environ.get("RAY_ADDRESS") else "on a local Ray"
    bounds = f" (autoscale {config.autoscale})" if config.autoscale else ""
    return "all in this process" if not config.actors else f"1 actor{bounds}" if config.actors == 1 else f"{config.actors} actors{bounds}"


def _with_view(kind: Any, work: Callable[[Any], Any]) -> Any:
    from shoal.monitoring.live import open_view

    view = open_view(kind)
    try:
        return work(view)
    finally:
        view.close()


def _finish_training(run: Any, as_json: bool) -> None:
    give_answer(run.result, as_json, "print_training")
    if run.result["reason"] == "interrupted":
        sys.exit(INTERRUPTED)


def main(args: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    args = sys.argv[1:] if args is None else args
    if "--debug" not in args:
        warnings.showwarning = _warn
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything imports torch: spinning threads starve the other processes
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # and numpy: the bits of a run in this process may depend on it
    try:
        cli.main(args, prog_name="shoal", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        _fail(error, error.format_message(), 2, args, said=True)
    except (click.Abort, KeyboardInterrupt) as interrupt:
        _fail(None, str(interrupt.__cause__ or interrupt) or "interrupted", INTERRUPTED, args)
    except ShoalError as error:
        _fail(error, str(error), error.exit_code, args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output has gone; Python flushes it once more at exit
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EIO and not os.isatty(2):
            sys.exit(1)  # the terminal was closed; what was to be printed is in result.json
        _fail(error, f"{type(error).__name__}: {error} (--debug shows where)", 1, args)
    sys.exit(0)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A Python warning as the views say one, without the line of source."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _fail(error: Exception | None, message: str, code: int, args: list[str], *, said: bool = False) -> NoReturn:
    if "--debug" in args and error is not None:
        import traceback

        traceback.print_exception(error)
    if not said:
        print(f"shoal: {message}", file=sys.stderr, flush=True)
    if "--json" in args:
        kind = type(error).__name__ if error is not None else "Interrupted"
        print_json({"error": {"kind": kind, "message": message, "exit_code": code, "report": getattr(error, "report", {})}})
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit. A Ray that was not shut down, since its head is gone, would wait for that on the way out, or crash."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
