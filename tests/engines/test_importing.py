"""What a run is made of is imported where it is to run, in a process that may hang or end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shoal.config import RunConfig
from shoal.engines.importing import import_all, packages_of, try_imports
from shoal.engines.roles import UserObjects
from shoal.errors import ConfigError
from shoal.settings import resolve
from shoal.supervision.zygote import Zygote

ENVIRONMENT = """
import math
import hypothesis
import numpy as np
from jsonschema import validate
import gymnasium

class Env(gymnasium.Env): ...
"""


def configured(env: str = "CartPole-v1", **settings: Any) -> RunConfig:
    return resolve(env, settings)[0]


def needs(config: RunConfig, **objects: Any) -> list[str]:
    return packages_of(import_all(config, UserObjects(**objects)))


def written(directory: Path, name: str, text: str) -> str:
    (directory / name).write_text(text)
    return str(directory / name)


def test_what_every_run_needs_is_not_named_again() -> None:
    assert needs(configured()) == []


def test_the_packages_are_those_that_the_environments_module_names(tmp_path: Path) -> None:
    file = written(tmp_path, "worlds.py", ENVIRONMENT)
    assert needs(configured(f"{file}:Env")) == ["hypothesis", "jsonschema"]


def test_a_callable_stands_for_the_module_that_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "worlds_of_mine.py", ENVIRONMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    import worlds_of_mine  # type: ignore[import-not-found]

    try:
        assert needs(configured("CartPole-v1"), env=worlds_of_mine.Env) == ["hypothesis", "jsonschema"]
    finally:
        del sys.modules["worlds_of_mine"]


@pytest.mark.parametrize(("env", "module", "package"), [("InvertedPendulum-v5", "mujoco", "mujoco"), ("ALE/Pong-v5", "ale_py", "ale-py")])
def test_known_families_bring_their_simulator(env: str, module: str, package: str) -> None:
    pytest.importorskip(module)
    assert package in needs(configured(env))


@pytest.mark.parametrize(
    ("env", "settings", "said"),
    [
        ("nowhere.at_all:Env", {}, r"^env\.id nowhere\.at_all:Env: cannot import nowhere\.at_all: No module named 'nowhere'"),
        ("CartPoll-v1", {}, r"^env\.id .?CartPoll-v1.* is no registered environment \(did you mean CartPole"),
        (
            "Foo-v9",
            {},
            r"^env\.id 'Foo-v9' is no registered environment of Gymnasium; one of a package of yours is package:NAME, your own code ",
        ),
        ("CartPole-v1", {"policy.network": "nowhere:Trunk"}, r"^policy\.network nowhere:Trunk: cannot import nowhere"),
        ("CartPole-v1", {"algorithm": "nowhere:Own"}, r"^algorithm nowhere:Own: cannot import nowhere"),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_key(env: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        import_all(configured(env, **settings), UserObjects())


def test_what_was_handed_over_as_an_object_needs_no_path() -> None:
    config = configured()
    config.env.id, config.policy.network = "callable:<lambda>", "callable:<lambda>"
    assert import_all(config, UserObjects(env=lambda: None, network=lambda: None)) is not None


# ---- in a process of its own ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[list[str], str]]]:
    """Import a file with this text, with an object besides."""
    directory = tmp_path_factory.mktemp("importing")
    zygotes: list[Zygote] = []
    numbers = iter(range(100))

    def make(text: str, limit_seconds: float = 120.0, pickled: bytes | None = None) -> tuple[list[str], str]:
        file = written(directory, f"made{next(numbers)}.py", text)
        payload = {"config": configured(f"{file}:Env").model_dump(mode="json", by_alias=True)}
        zygotes.append(Zygote.start(payload, pickled, ["torch", "gymnasium", "shoal.engines.mains"], log_path=directory / "zygote.log"))
        with closing(zygotes[-1]):
            return try_imports(zygotes[-1], f"{file}:Env", limit_seconds, directory)

    yield make
    for zygote in zygotes:
        zygote.close()


def test_a_process_of_its_own_answers_with_packages_or_with_the_reason(attempt: Callable[..., tuple[list[str], str]]) -> None:
    assert attempt(ENVIRONMENT) == (["hypothesis", "jsonschema"], "")
    packages, error = attempt("import not_there\n")
    assert packages == []
    assert error.startswith("env.id ")
    assert "raised ModuleNotFoundError while it was imported: No module named 'not_there'" in error


def test_imports_that_hang_or_end_their_process_are_reasons_too(attempt: Callable[..., tuple[list[str], str]]) -> None:
    assert "importing it has not returned" in attempt("import time\ntime.sleep(1000)\n", 0.5)[1]
    assert "its process ended in importing it: exit code 3" in attempt("import os\nos._exit(3)\n")[1]


def test_an_object_that_cannot_be_opened_is_a_reason(attempt: Callable[..., tuple[list[str], str]]) -> None:
    assert attempt(ENVIRONMENT, pickled=b"cnot_there\nthing\n.")[1] == "ModuleNotFoundError: No module named 'not_there'"
