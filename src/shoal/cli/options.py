"""Options that are the configuration's own keys: `--any.key value`, taken as they come, explained from the models.

`Raw` text goes to `shoal.settings.resolve`, which knows every key; so there is no second list of options here.
"""

from __future__ import annotations

from typing import Any

import click

RAY_KEYS = (
    "address",
    "nodes",
    "actors_per_node",
    "allow_insecure_cluster",
    "learners_on",
    "allow_plain_learners",
)  # these need no section before them
SETTINGS = "shoal.settings"  # where a command finds the settings in its context's meta


class ConfigCommand(click.Command):
    """A command that takes every configuration key besides its own options, in any order with its arguments.

    The settings, dotted name to text, are in `context.meta[SETTINGS]`. `--key value`, `--key=value`; a key at the end of the line or before
    another option is true (`--policy.normalise-observations`). A value may begin with one dash (`--env.kwargs.gravity -3`).
    """

    def __init__(self, *args: Any, configuration_help: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration_help = configuration_help

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        own = {name: not option.is_flag for option in options for name in (*option.opts, *option.secondary_opts)}
        rest, settings = split_settings(args, own)
        ctx.meta[SETTINGS] = settings
        return super().parse_args(ctx, rest)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        if self.configuration_help:
            write_keys(formatter)
        else:
            with formatter.section("Configuration"):
                formatter.write_text("Every key that `shoal train --help` lists may be given here too, such as --actors 4.")


def split_settings(args: list[str], own: dict[str, bool]) -> tuple[list[str], dict[str, str]]:
    """Arguments and own options on one side, settings on the other. `own` says for each own option whether it takes a value."""
    rest: list[str] = []
    settings: dict[str, str] = {}
    place = 0
    while place < len(args):
        token = args[place]
        place += 1
        name, equals, value = token.partition("=")
        if token == "--":
            rest.extend([token, *args[place:]])
            break
        if name in own or not token.startswith("--"):
            rest.append(token)
            if own.get(name) and not equals and place < len(args):
                rest.append(args[place])
                place += 1
            continue
        if not equals:
            followed = place < len(args) and not args[place].startswith("--")
            value = args[place] if followed else _alone(name)
            place += followed
        settings[_key(name)] = value
    return rest, settings


def _key(name: str) -> str:
    """`--stop.env-steps` is the key stop.env_steps, `--env.kwargs.enable-wind` the argument enable_wind, `--nodes` short for ray.nodes."""
    key = name[2:].replace("-", "_")
    return f"ray.{key}" if key in RAY_KEYS else key


def _alone(name: str) -> str:
    """What a key without a value says: true, for those that are switches."""
    from shoal.config import BUILT_IN
    from shoal.keys import all_keys

    takes = {key.name: key.takes for algorithm in BUILT_IN for key in all_keys(algorithm)}
    wanted = takes.get(_key(name), "bool")  # an unknown key is reported as such, by those who know them all
    if "bool" not in wanted:
        raise click.UsageError(f"{name} needs a value ({wanted})")
    return "true"


def write_keys(formatter: click.HelpFormatter) -> None:
    """The configuration's keys by section; those of an algorithm under its name, the shared ones once."""
    from shoal.config import BUILT_IN, AlgorithmConfig
    from shoal.keys import Key, all_keys

    sections: dict[str, list[Key]] = {}
    for algorithm in BUILT_IN:
        for key in all_keys(algorithm):
            head, _, tail = key.name.rpartition(".")
            title = "Run" if not head else head.split(".")[0]
            if title == "algorithm":
                title = "algorithm (all)" if tail in AlgorithmConfig.model_fields else f"algorithm ({algorithm})"
            if all(known.name != key.name for known in sections.setdefault(title, [])):
                sections[title].append(key)
    algorithms = Key("algorithm", f"{'|'.join(BUILT_IN)}|module:name|file.py:name", "ppo", "which algorithm learns")
    sections["Run"] = [algorithms, *sections["Run"]]
    titles = sorted(sections, key=lambda title: (title != "Run", title != "stop", not title.startswith("algorithm")))
    for title in titles:
        with formatter.section(title[:1].upper() + title[1:]):
            formatter.write_dl([_row(key) for key in sections[title]], col_max=42)


def _row(key: Any) -> tuple[str, str]:
    name = key.name + (".NAME" if key.takes == "value" else "")
    default = f"[{key.default}]" if key.default else ""
    return f"--{name.replace('_', '-')} {key.takes}", f"{key.description} {default}".strip() or " "
