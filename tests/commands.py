"""The command line in this process, where the command is what is asked and not its process: a process that learns or plays imports torch first."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest

from shoal.cli import main


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def said_here(*args: str, env: Mapping[str, str] | None = None) -> Said:
    """env: variables beside those of this process. What the command sets of them and of warnings ends with it."""
    out, err = io.StringIO(), io.StringIO()
    kept = patch.dict(os.environ, env or {}), patch.object(warnings, "showwarning")
    with kept[0], kept[1], redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(list(args))
    return Said(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def answer_here(*args: str, code: int = 0, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The answer (`--json`) of a command that ended with this code."""
    said = said_here(*args, "--json", env=env)
    assert said.code == code, said.err
    found = json.loads(said.out)
    assert isinstance(found, dict)
    return found
