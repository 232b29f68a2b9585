"""`shoal bench`: how fast the parts are, what the machine could do, how close a training comes, and the replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from shoal.cli.common import debug_option, given_settings, json_option, say, work_on
from shoal.cli.options import ConfigCommand
from shoal.cli.output import plain, print_json, print_table

seconds_option = click.option(
    "--seconds",
    type=click.FloatRange(min=0.0),
    default=10.0,
    show_default=True,
    help="For the costs of the parts, and as much for a trial run; bare loops take as much again.",
)


@click.group()
def bench() -> None:
    """Measure speed: the costs of the parts and the ceilings that follow, a training against its ceiling, or the replay."""


@bench.command(cls=ConfigCommand)
@click.argument("env", metavar="ENV")
@seconds_option
@json_option
@debug_option
@click.pass_context
def costs(ctx: click.Context, env: str, seconds: float, as_json: bool, debug: bool) -> None:
    """What an environment step costs in each part, alone on one core, and the ceilings that follow for this machine's cores.

    Bare loops of Gymnasium and torch are measured beside it.
    """
    settings = given_settings(ctx)

    def work() -> Any:
        from shoal.benching.costs import bench_costs

        return bench_costs(env, settings, seconds=seconds, told=_told)

    _give(work_on(work, as_json), as_json, _print_costs)


@bench.command(cls=ConfigCommand)
@click.argument("env", metavar="ENV")
@seconds_option
@json_option
@debug_option
@click.pass_context
def train(ctx: click.Context, env: str, seconds: float, as_json: bool, debug: bool) -> None:
    """A training measured against its ceiling, where its time went, and what takes the rest.

    It trains for 15 seconds where no --stop condition is given; the costs of its parts are measured before and after that. The run is removed unless --run-dir keeps it.
    """
    settings = given_settings(ctx)

    def work() -> Any:
        from shoal.benching.training import bench_train

        return bench_train(env, settings, seconds=seconds, told=_told)

    _give(work_on(work, as_json), as_json, _print_train)


@bench.command()
@click.option("--seconds", type=click.FloatRange(min=0.0), default=5.0, show_default=True, help="Of each figure.")
@json_option
@debug_option
def replay(seconds: float, as_json: bool, debug: bool) -> None:
    """How many transitions a second the experience replay takes in, and gives out by priority, alone on one core.

    With observations like CartPole's, and with stacks of four 84x84 frames like Atari's.
    """

    def work() -> Any:
        from shoal.benching.replays import bench_replay

        return bench_replay(seconds=seconds, told=_told)

    _give(work_on(work, as_json), as_json, _print_replay)


def _told(text: str) -> None:
    say(f"{text} ...", "lines")


def _give(result: Any, as_json: bool, report: Callable[[Mapping[str, Any]], None]) -> None:
    if as_json:
        print_json(result)
    else:
        report(plain(result))


def _print_replay(found: Mapping[str, Any]) -> None:
    what, machine = found["settings"], found["machine"]
    print(
        f"prioritised, {what['n_step']}-step returns, batches of {what['batch']} with their priorities updated, rollouts of "
        f"{what['groups']} groups of {what['group_size']}; one core of {machine['cpu']}, load {machine['load']}\n"
    )
    rows = [
        {
            "observations": name,
            "rollouts of": case["rollout_length"],
            "steps held": f"{case['capacity_steps']:,}",
            "MB": round(case["size_bytes"] / 1e6),
            "inserted/s": f"{case['insert_per_second']:,.0f}",
            "sampled/s": f"{case['sample_per_second']:,.0f}",
        }
        for name, case in found["cases"].items()
    ]
    print_table(rows, ["observations", "rollouts of", "steps held", "MB", "inserted/s", "sampled/s"], indent=2)


def _print_train(found: Mapping[str, Any]) -> None:
    for text in found["words"]:
        print(text)
    if found["processor"]:
        print("cores: " + ", ".join(f"{name} {share:.0f} %" for name, share in found["processor"].items() if name != "queued"))
    print()
    _print_costs(found)


def _print_costs(found: Mapping[str, Any]) -> None:
    what, machine = found["settings"], found["machine"]
    print(
        f"{what['env']} ({what['form']}), {what['algorithm']} {what['mode']}, {what['groups']} groups of {what['group_size']}, "
        f"rollouts of {what['rollout_length']}, batch {what['batch_env_steps']}, {what['epochs']} epochs; "
        f"{machine['cpu']}, {found['cores']} cores, load {machine['load']}"
    )
    print("\nmicroseconds of one core per environment step")
    print_table(list(_cost_rows(found)), ["part", "shoal", "bare loop", "times"], indent=2)
    if found["references"]["missing"]:
        print(f"  no bare loop beside inference and learning: {found['references']['missing']}")
    bounds = found["ceilings"]
    several = found["several"]
    learning = found["learning"]["cores"] if several is None else several["cores"]
    print(f"\nceilings for {found['cores']} cores, of which learning can use {learning:.2f} (env steps/s)")
    rows = [{"mode": name, "ceiling": round(bounds[name])} for name in ("async", "sync", "waiting") if bounds[name] is not None]
    print_table(rows, ["mode", "ceiling"], indent=2)
    if (trial := found["trial"]) is not None:
        print(
            f"\na trial run: {trial['env_steps_per_second']:,.0f} env steps/s; actors step and choose {100 * trial['acting']:.0f} % of their time, "
            f"the learner learns {100 * trial['learning']:.0f} % of its"
        )


def _cost_rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = {"e": "environment", "i": "inference", "l": "learning", "x": "transport"}
    for key, name in names.items():
        row: dict[str, Any] = {"part": f"{key} {name}", "shoal": round(found["costs"][key], 2)}
        beside = found["references"].get(name)
        if beside is not None and name != "environment":
            row |= {"bare loop": round(beside["bare_us"], 2), "times": f"{beside['times']:.2f}"}
        yield row
        if beside is not None and name == "environment":
            yield {
                "part": "  under random actions",
                "shoal": round(beside["shoal_us"], 2),
                "bare loop": round(beside["bare_us"], 2),
                "times": f"{beside['times']:.2f}",
            }
    for name, cost in found["transport"].items():
        yield {"part": f"  of it {name}", "shoal": round(cost, 2)}
    if (several := found["several"]) is not None:
        yield {"part": f"each of {several['learners']} learners: its part", "shoal": round(several["share_us"], 2)}
        yield {"part": f"  {several['exchanges']} exchanges an update, on one machine", "shoal": round(several["exchange_us"], 2)}
    yield {"part": "taking turns (in no ceiling)", "shoal": round(found["mixed"], 2)}
    for name, cost in found["crossing"].items():
        yield {"part": f"{name} (on a cluster; in no ceiling)", "shoal": round(cost, 2)}
