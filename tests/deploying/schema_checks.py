"""Schemas that came from elsewhere (see schemas/README.md), and strict validation against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).parent / "schemas"


def schema(name: str) -> Any:
    return json.loads((SCHEMAS / name).read_text(encoding="utf-8"))


def strict(node: Any) -> Any:
    """The schema with every field refused that it does not list, as a server refuses it that validates strictly (it would drop it otherwise)."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and "type" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def faults(instance: Any, against: Any) -> list[str]:
    validator = jsonschema.validators.validator_for(against, default=jsonschema.Draft202012Validator)(against)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(instance)]
