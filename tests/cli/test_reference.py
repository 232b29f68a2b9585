"""docs/reference.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from shoal.cli.main import cli
from shoal.cli.reference import reference
from shoal.config import BUILT_IN
from shoal.keys import all_keys

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m shoal.cli.reference > docs/reference.md (or make docs)"


def test_the_page_names_every_key_and_every_command() -> None:
    text = reference()
    for algorithm in BUILT_IN:
        assert all(f"`{key.name}" in text for key in all_keys(algorithm))
    assert all(f"### shoal {name} " in text for name in cli.commands)
