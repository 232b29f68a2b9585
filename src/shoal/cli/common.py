"""What the commands share: options, the settings that were given, and how work is done and answered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from shoal.cli.options import SETTINGS
from shoal.cli.output import only_json_on_stdout, plain, print_json, print_tree

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, at the end.")
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


def given_settings(ctx: click.Context) -> dict[str, Any]:
    from shoal.settings import Raw

    return {name: Raw(value) for name, value in ctx.meta[SETTINGS].items()}


def work_on(work: Callable[[], Any], as_json: bool) -> Any:
    with only_json_on_stdout(as_json):
        return work()


def give_answer(result: Any, as_json: bool, report: str = "", **how: Any) -> None:
    """One JSON object; or, for a person, as the function of this name in cli.report says it."""
    if as_json:
        print_json(result)
    elif report:
        from shoal.cli import report as reports

        getattr(reports, report)(plain(result), **how)
    else:
        print_tree(plain(result))


def say(text: str, view: str) -> None:
    if view != "silent":
        print(text, file=sys.stderr, flush=True)
