"""The user's own code by a path: `package.module:name`, or `file.py:name`, and back from an object to its path."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal.errors import ConfigError, ShoalError

OPAQUE = "callable:"  # marks an object that no path leads to: a lambda, or something of `__main__`


def nearest(word: str, options: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing where no option is like `word`."""
    known = list(options)
    close = [option for option in known if option.lower() == word.lower()] or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def load_object(path: str) -> Any:
    """The object that `package.module:name` or `file.py:name` leads to. A file is executed once per process.

    Raises:
      ConfigError: no such file, module or name, or the module raised while it was imported; says which, and the nearest name.
    """
    if path.startswith(OPAQUE):
        raise ConfigError(
            f"{path} was a Python object that no import path leads to; give it again from Python, or put it into a module and name it `module:name`"
        )
    location, colon, name = path.rpartition(":")
    if not colon or not location or not name:
        raise ConfigError(f"{path!r} is no import path; write `package.module:name` or `file.py:name`")
    module = _load_file(Path(location)) if location.endswith(".py") else _load_module(location)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigError(f"{location} has no {name!r}{nearest(part, vars(module))}") from None
    return found


def object_path(obj: Any) -> str:
    """An import path that leads back to a function or class, or `callable:NAME` where there is none."""
    name = str(getattr(obj, "__qualname__", type(obj).__qualname__))
    module = sys.modules.get(str(getattr(obj, "__module__", "")))
    if module is None or module.__name__ == "__main__" or "<" in name:
        return OPAQUE + name
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not obj:
        return OPAQUE + name
    if module.__name__.startswith(_FILE_PREFIX):
        return f"{module.__file__}:{name}"
    return f"{module.__name__}:{name}"


_FILE_PREFIX = "shoal_user_file_"


def _reach(directory: str) -> None:
    """Let modules of this directory be imported, after everything that is installed."""
    if directory not in sys.path:
        sys.path.append(directory)


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    name = f"{_FILE_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _reach(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(_raised(str(path), error)) from error
    return module


def _raised(what: str, error: BaseException) -> str:
    """One line; a script that trains when it is imported is told how not to."""
    first = next(iter(str(error).strip().splitlines()), "")
    hint = (
        '; what it is to do as a script belongs under `if __name__ == "__main__":`' if isinstance(error, (ShoalError, SystemExit)) else ""
    )
    return f"{what} raised {type(error).__name__} while it was imported: {first}{hint}"


def _load_module(name: str) -> ModuleType:
    _reach(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import {name}: {error}; is it installed, or in the current directory?") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(_raised(name, error)) from error
