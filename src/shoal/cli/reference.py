"""The reference page, made from the models, the commands and the docstrings: `python -m shoal.cli.reference > docs/reference.md`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from shoal.cli.main import cli
from shoal.config import BUILT_IN, AlgorithmConfig
from shoal.keys import Key, algorithm_model, all_keys
from shoal.settings import PRESETS, preset_names, read_yaml

_HEAD = """# Reference

Made from the code by `python -m shoal.cli.reference > docs/reference.md`; a test keeps it so.

Contents: [configuration](#configuration) · [presets](#presets) · [commands](#commands) · [exit codes](#exit-codes) · [Python](#python) ·
[errors](#errors)
"""
_CONFIGURATION = """
## Configuration

Every key has one dotted name. On the command line `_` becomes `-` (`--algorithm.learning-rate 3e-4`), in YAML the dots are nesting, in
Python both work (`algorithm={"learning_rate": 3e-4}`, `**{"algorithm.learning_rate": 3e-4}`). Lowest first: the defaults here, the preset of a
known environment, a YAML file, what is given by hand. A key that stands alone and is a switch means true. Those of the section `ray` need no
section on the command line (`--nodes 3`).
"""
_EXIT_CODES = """
## Exit codes

| code | meaning |
| --- | --- |
| 0 | a stop condition was met, or the command did what it was asked |
| 1 | anything else: a run that cannot be read, a role that died too often, a replay with other weights |
| 2 | usage or configuration |
| 3 | an environment fault; `shoal check` found an error |
| 4 | diverged |
| 130 | interrupted (Ctrl-C, SIGTERM, `shoal control RUN stop`, a callback that returned False); a checkpoint is kept |
"""


def reference() -> str:
    """The page as Markdown."""
    parts = [_HEAD, _CONFIGURATION, *_configuration(), *_presets(), *_commands(), _EXIT_CODES, *_python(), *_errors()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


# ---- configuration -------------------------------------------------------------------------------------------------------
def _configuration() -> Iterator[str]:
    sections: dict[str, list[Key]] = {"": [Key("algorithm", f"{'|'.join(BUILT_IN)} or an import path", "ppo", "which algorithm learns")]}
    for key in all_keys("ppo"):
        head = key.name.rpartition(".")[0].split(".")[0]
        if head != "algorithm":
            sections.setdefault(head, []).append(key)
    for head in ["", "stop", "env", "sampling", "policy", "learner", "replay", "evaluation", "checkpoint", "ray"]:
        yield f"### {head or 'Run'}\n"
        yield _key_table(sections.pop(head))
    assert not sections, f"sections without a place on the page: {list(sections)}"
    yield "### algorithm, for all\n"
    yield _key_table([key for key in all_keys("ppo") if key.name.removeprefix("algorithm.") in AlgorithmConfig.model_fields])
    for name in BUILT_IN:
        model = algorithm_model(name)
        modes = f"{' or '.join(model.modes)} mode{' (the first is its default)' if len(model.modes) > 1 else ' only'}"
        yield f"### algorithm {name}\n\n{_first_paragraph(model.__doc__)} Runs in {modes}.\n"
        own = [key for key in all_keys(name) if key.name.startswith("algorithm.")]
        yield _key_table([key for key in own if key.name.removeprefix("algorithm.") not in AlgorithmConfig.model_fields])


def _key_table(keys: list[Key]) -> str:
    lines = ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys:
        name = key.name + (".NAME" if key.takes == "value" else "")
        default = f"`{key.default}`" if key.default else ""
        lines.append(f"| `{name}` | {_cell(key.takes)} | {default} | {_cell(key.description)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    yield "`preset` names one; by default that of the environment is taken, and `none` takes none. Where you say when to stop, the preset's conditions go.\n"
    yield "| preset | algorithms | its stop | remark |\n| --- | --- | --- | --- |"
    for name in preset_names():
        file = PRESETS / f"{name.replace('/', '__')}.yaml"
        tree = read_yaml(file)
        stop = ", ".join(f"{key} {value}" for key, value in tree.get("stop", {}).items())
        remarks = " ".join(text.lstrip("# ") for text in file.read_text(encoding="utf-8").splitlines() if text.startswith("#"))
        yield f"| `{name}` | {', '.join(tree.get('algorithms', {}))} | {stop} | {_cell(remarks)} |"


# ---- commands ------------------------------------------------------------------------------------------------------------
def _commands() -> Iterator[str]:
    yield "\n## Commands\n"
    yield "RUN is a run's directory, anything in it, its name in `runs/`, `latest`, or the URL of one in a store. Every command takes `--json` and `--debug`.\n"
    with click.Context(cli, info_name="shoal") as parent:
        for name in cli.list_commands(parent):
            command = cli.get_command(parent, name)
            assert command is not None
            parts = command.commands.items() if isinstance(command, click.Group) else [("", command)]
            for part, found in parts:
                with click.Context(found, info_name=f"shoal {name} {part}".rstrip()) as context:
                    yield f"### {found.get_usage(context).removeprefix('Usage: ')}\n"
                yield _help(found.help or "")
                yield _option_table(found)


def _help(text: str) -> str:
    block = re.sub(r"\x08\n(.*?)(\n\n|$)", lambda found: f"```\n{inspect.cleandoc(found[1])}\n```\n\n", inspect.cleandoc(text), flags=re.S)
    return block + "\n"


def _option_table(command: click.Command) -> str:
    options = [option for option in command.params if isinstance(option, click.Option)]
    lines = ["| option | meaning |", "| --- | --- |"]
    for option in options:
        takes = "" if option.is_flag else f" {option.metavar or 'N'}"
        if isinstance(option.type, click.Choice):
            takes = f" {'|'.join(map(str, option.type.choices))}"
        default = f" [{option.default}]" if not option.is_flag and isinstance(option.default, (int, str)) else ""
        lines.append(f"| `{_cell(option.opts[0] + takes)}` | {_cell(option.help or '')}{default} |")
    return "\n".join(lines) + "\n"


# ---- Python --------------------------------------------------------------------------------------------------------------
def _python() -> Iterator[str]:
    import shoal
    from shoal.environments.checks import CheckReport, Finding
    from shoal.evaluation import LoadedPolicy

    yield "\n## Python\n"
    for name in ("train", "resume", "load", "evaluate", "check", "replay"):
        yield _function(f"shoal.{name}", getattr(shoal, name))
    yield _class("shoal.Run", shoal.Run)
    for method in ("policy", "evaluate"):
        yield _function(f"Run.{method}", getattr(shoal.Run, method))
    yield _class("LoadedPolicy", LoadedPolicy)
    yield _function("LoadedPolicy.predict", LoadedPolicy.predict)
    yield _class("CheckReport", CheckReport)
    yield _class("Finding", Finding)


def _function(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    without_self = [p for p in signature.parameters.values() if p.name != "self"]
    text = str(signature.replace(parameters=without_self, return_annotation=inspect.Signature.empty)).replace("'", "")
    text = re.sub(r"<function [^>]*>[^>]*>", "...", text)
    return f"### {name}\n\n```python\n{name}{text}\n```\n\n{_docstring(function)}\n"


def _class(name: str, found: type) -> str:
    return f"### {name}\n\n{_docstring(found)}\n"


def _docstring(found: Any) -> str:
    """The docstring, with its `Args:` and the like as blocks."""
    first, _, rest = inspect.cleandoc(found.__doc__ or "").partition("\n")
    return f"{first}\n" if not rest.strip() else f"{first}\n\n```text\n{rest.strip(chr(10))}\n```\n"


def _first_paragraph(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n\n")[0]


def _errors() -> Iterator[str]:
    from shoal import errors

    yield "## Errors\n"
    tree = (errors.__doc__ or "").split("\n\n")[1]
    yield f"```text\n{inspect.cleandoc(tree)}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
