"""How commands answer: one JSON object on standard output, or text for a person; errors and progress on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """What JSON can hold of a result: dataclasses and models become objects, numpy numbers plain, NaN and infinities null."""
    for method in ("to_json", "model_dump", "tolist"):
        convert = getattr(value, method, None)
        if callable(convert) and not isinstance(value, type):
            return plain(convert())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(plain(value), allow_nan=False), flush=True)


@contextmanager
def only_json_on_stdout(wanted: bool) -> Iterator[None]:
    """While a command works, whatever prints to standard output (an environment, a library, a child) goes to standard error."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_tree(tree: Mapping[str, Any], indent: int = 0) -> None:
    """Nested names and values as aligned text."""
    width = max((len(str(key)) for key in tree), default=0)
    for key, value in tree.items():
        name = " " * indent + str(key)
        if isinstance(value, Mapping) and value:
            print(name)
            print_tree(value, indent + 2)
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and all(isinstance(item, Mapping) for item in value):
            print(name)
            for item in value:
                print(" " * (indent + 2) + "  ".join(f"{inner}={word(text)}" for inner, text in item.items()))
        else:
            print(f"{name.ljust(width + indent)}  {word(value)}")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], indent: int = 0) -> None:
    """Rows under a line of column names, numbers to the right."""
    cells = [[word(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) if cells else len(column) for i, column in enumerate(columns)]
    right = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
    for line in [list(columns), *cells]:
        padded = (text.rjust(width) if to_right else text.ljust(width) for text, width, to_right in zip(line, widths, right, strict=True))
        print(" " * indent + "  ".join(padded).rstrip())


def word(value: Any) -> str:
    """A value as a person reads it: thousands apart, four digits of a fraction, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(word, value)) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {word(item)}" for key, item in value.items()) or "-"
    return str(value)


def find_here(name: str) -> Path:
    """The directory of a run on this disk; of a URL, its working copy. Raises NoRunError."""
    from shoal.errors import NoRunError
    from shoal.runs import find_run as run_at
    from shoal.urls import is_url, local_directory

    if not is_url(name):
        return run_at(find_run(name))
    directory = local_directory(name)
    if not directory.is_dir():
        raise NoRunError(f"{name} is not driven from this machine: give the command where it is, or `shoal show {name}` here")
    return directory


def find_run(name: str, runs: Path = Path("runs")) -> Path | str:
    """The directory of a run: a path to it or into it, its name in `runs`, or `latest`; a URL as it is, once it was checked. Raises NoRunError, ConfigError."""
    from shoal.errors import NoRunError
    from shoal.imports import nearest
    from shoal.runs import find_run as run_at
    from shoal.urls import check_url, is_url

    if is_url(name):
        return check_url(name)
    known = sorted(runs.glob("*/config.yaml"), key=lambda file: file.stat().st_mtime)
    if name == "latest" and not Path(name).exists():
        if not known:
            raise NoRunError(f"there is no run in {runs}/ yet; `shoal train CartPole-v1` makes one")
        return known[-1].parent
    if Path(name).expanduser().exists():
        return run_at(name)
    if (runs / name).exists():
        return run_at(runs / name)
    raise NoRunError(f"there is no run {name}{nearest(name, [file.parent.name for file in known])}; `shoal runs` lists those in {runs}/")
