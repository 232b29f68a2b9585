"""`shoal chaos`: train while faults come at random moments, and say what they cost."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from shoal.cli.common import debug_option, give_answer, given_settings, json_option, work_on
from shoal.cli.options import ConfigCommand
from shoal.cli.output import plain

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType[float]):
    """`5s`, `500ms`, `2m`, or seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|)", value.strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is no time; write 5s, 500ms or 2m", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


@click.command(cls=ConfigCommand)
@click.argument("env_or_config", metavar="ENV_OR_CONFIG")
@click.option("--kill", type=Duration(), help="SIGKILL an actor about this often.", metavar="5s")
@click.option("--stop", type=Duration(), help="SIGSTOP an actor.", metavar="20s")
@click.option("--slow", type=Duration(), help="Slow an actor down to less than half, for a second.", metavar="10s")
@click.option("--nan", type=Duration(), help="Let an environment show a NaN.", metavar="30s")
@click.option("--learner", type=Duration(), help="SIGKILL the learner.", metavar="60s")
@click.option(
    "--seconds", type=Duration(), default=60.0, show_default="60s", help="Time with faults; as long again without.", metavar="120"
)
@click.option(
    "--compare/--no-compare",
    default=True,
    help="Sync mode: execute the run again without faults and compare the weights; takes as long as the run.",
)
@click.option("--chaos-seed", type=click.IntRange(min=0), default=0, help="Names the moments and the victims.")
@json_option
@debug_option
@click.pass_context
def chaos(
    ctx: click.Context,
    /,
    env_or_config: str,
    seconds: float,
    compare: bool,
    chaos_seed: int,
    as_json: bool,
    debug: bool,
    **every: float | None,
) -> None:
    """Train while faults come at random moments, and report what they cost.

    Stretches with faults and without take turns. Ends with 1 where the ledger does not balance, or where a sync run ends with other weights
    than the same training without faults (which is executed again to see).
    """
    settings = given_settings(ctx)

    def work() -> Any:
        from shoal.chaos import chaos as run_chaos
        from shoal.monitoring.live import open_view

        view = open_view("lines" if as_json else "auto")
        try:
            chosen = {kind: often for kind, often in every.items() if often is not None}
            return run_chaos(env_or_config, chosen, seconds, seed=chaos_seed, compare=compare, progress=view, **settings)
        finally:
            view.close()

    result = plain(work_on(work, as_json))
    give_answer(result, as_json, "print_chaos")
    if not result["ok"]:
        sys.exit(1)
