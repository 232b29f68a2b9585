"""`shoal plan`: how a training would go on machines that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from shoal.cli.common import debug_option, given_settings, json_option, say, work_on
from shoal.cli.options import ConfigCommand
from shoal.cli.output import plain, print_json, print_table, word

_MOST_NODES = 1_000_000


class _Sizes(click.ParamType[tuple[int, ...]]):
    """Numbers of nodes with commas between them."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        texts = str(value).split(",")
        if not all(text.strip().isdecimal() and 1 <= int(text) <= _MOST_NODES for text in texts):
            self.fail(f"{value!r} is not one or more whole numbers from 1 to {_MOST_NODES:,} with commas between them", param, ctx)
        return tuple(sorted({int(text) for text in texts}))


_positive = click.FloatRange(min=0.0, min_open=True)


@click.command(cls=ConfigCommand)
@click.argument("env", metavar="ENV")
@click.option("--nodes", type=_Sizes(), metavar="N[,N...]", help="Nodes; several make a table. [1]")
@click.option("--table", is_flag=True, help="The same as --nodes 1,10,100,1000,10000.")
@click.option(
    "--costs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What `shoal bench costs ENV --json` printed; without it the costs are measured here.",
)
@click.option("--seconds", type=click.FloatRange(min=0.0), default=10, show_default=True, help="For measuring them.")
@click.option("--cores", type=click.IntRange(min=1), help="Cores of a node. [those of the machine that was measured]")
@click.option(
    "--learners",
    type=click.IntRange(min=1),
    help="Learners, on the driver's machine, or with --learners-on nodes each but the first on another node. Default: as the configuration says.",
)
@click.option(
    "--link-latency", type=click.FloatRange(min=0.0), default=100, show_default=True, metavar="US", help="Microseconds between nodes."
)
@click.option("--link-bandwidth", type=_positive, default=10, show_default=True, metavar="GBIT", help="Of a node each way, in Gbit/s.")
@click.option("--learner-bandwidth", type=_positive, metavar="GBIT", help="Of a node with a learner. [--link-bandwidth]")
@click.option(
    "--driver-us", type=click.FloatRange(min=0.0), metavar="US", help="Microseconds of the driver for each rollout. [as the costs say]"
)
@click.option(
    "--message-us",
    type=click.FloatRange(min=0.0),
    metavar="US",
    help="Microseconds of a core that a message through Ray takes at each end. [measured once]",
)
@click.option("--one-machine", is_flag=True, help="All nodes share the cores of one machine, as while a cluster is tried.")
@json_option
@debug_option
@click.pass_context
def plan(
    ctx: click.Context,
    env: str,
    nodes: tuple[int, ...] | None,
    table: bool,
    costs: Path | None,
    seconds: float,
    cores: int | None,
    learners: int | None,
    link_latency: float,
    link_bandwidth: float,
    learner_bandwidth: float | None,
    driver_us: float | None,
    message_us: float | None,
    one_machine: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Predict throughput, policy lag and bottleneck of a training on any number of nodes, and what would move them.

    A simulation of the pipeline under the rules of a run, fed with measured costs. --sampling.groups and --actors are those of each node.

    Several nodes are a cluster of Ray; --engine ray plans one of a single node too.
    """
    if nodes and table:
        raise click.UsageError("--table is --nodes with sizes of its own; give one of them")
    settings = given_settings(ctx) | ({} if learners is None else {"learners": learners})

    def work() -> Any:
        from shoal.planning.inputs import Asked
        from shoal.planning.plan import TABLE
        from shoal.planning.plan import plan as predict

        asked = Asked(
            sizes=TABLE if table else nodes or (1,), cores=cores, link_latency_us=link_latency,
            link_gbit=link_bandwidth, learner_gbit=learner_bandwidth, driver_us=driver_us,
            message_us=message_us, one_machine=one_machine,
        )  # fmt: skip
        return predict(env, settings, asked, costs_file=costs, seconds=seconds, told=lambda text: say(f"{text} ...", "lines"))

    result = work_on(work, as_json)
    if as_json:
        print_json(result)
    else:
        for warning in result["warnings"]:
            say(f"warning: {warning}", "lines")
        _print(plain(result))


def _print(found: Mapping[str, Any]) -> None:
    what, links, costs = found["settings"], found["links"], found["costs"]
    print(
        f"{what['env']} ({what['form']}), {what['algorithm']} {what['mode']}; a node: {what['cores']} cores{_shared(what)}, {what['actors']} actors, {what['groups']} groups "
        f"of {what['group_size']}, rollouts of {what['rollout_length']}{_learners(what)}"
    )
    print(
        f"links: {8e-9 * links['node_bandwidth']:g} Gbit/s, of a learner {8e-9 * links['learner_bandwidth']:g}, {1e6 * links['latency']:g} us; "
        f"costs of {costs['measured_on'].get('cpu')}, {costs['date']}"
    )
    if (fit := found["fit"]) is not None:
        waits = "" if costs["blocking"] is None else f", waits {fit['blocking']:.2f}"
        print(
            f"fitted to a trial run: steps take {fit['acting']:.2f} times as long as their parts alone, learning {fit['learning']:.2f}{waits}; "
            f"{1e3 * fit['pause']:.2f} ms of an update nobody works"
        )
    print()
    rows = found["rows"]
    print_table([_cells(row) for row in rows], list(_cells(rows[0])), indent=2)
    print()
    for row in rows:
        print(f"{row['nodes']:,} node{'s' if row['nodes'] > 1 else ''}: {row['bottleneck']['words']}")
    if len(rows) == 1:
        _print_moves(rows[0]["moves"])
    elif found["breaks"] is not None:
        print(f"\n{_broken(found['breaks'])}")
    else:
        print(f"\nnothing breaks up to {rows[-1]['nodes']:,} nodes: each gives more than half of what it gives with {rows[0]['nodes']:,}")


def _shared(what: Mapping[str, Any]) -> str:
    return " of one machine that all share" if what["one_machine"] else ""


def _learners(what: Mapping[str, Any]) -> str:
    if what["learners"] == 1:
        return ""
    where = "all on the driver's machine" if what["learners_on"] == "driver" else "each but the first on another node"
    return f"; {what['learners']} learners, {where}"


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    used = row["utilisation"]
    return {
        "nodes": row["nodes"],
        "learners": row["learners"],
        "env steps/s": f"{row['env_steps_per_second']:,.0f}",
        "of a node": f"{row['env_steps_per_second_and_node']:,.0f}",
        "lag": f"{row['lag']['mean']:.1f}, max {row['lag']['max']}",
        **{name: f"{100 * used[key]:.0f} %" for name, key in _USED.items()},
        "bottleneck": row["bottleneck"]["name"] or "-",
    }


_USED = {"cores": "cores", "learner": "learner", "driver": "driver", "learner's link": "learner_link", "node links": "node_links"}


def _print_moves(moves: list[Mapping[str, Any]]) -> None:
    for move in moves:
        print(f"  {move['what']}, {move['better']}: {100 * move['gain']:+.0f} %  ({move['advice']})")


def _broken(breaks: Mapping[str, Any]) -> str:
    said = f"first breaks, at {breaks['nodes']:,} nodes, where each gives less than half of what it did at first: {breaks['words']}"
    if breaks["name"] is None:
        return said
    to = "beyond the sizes asked for" if breaks["moved_to"] is None else f"to {word(breaks['moved_to'])} nodes"
    return f"{said}\nmade twice as good, that moves {to}: {breaks['advice']}"
