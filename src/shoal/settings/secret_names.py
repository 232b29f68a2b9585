"""Keys of a configuration whose names say that their texts are secrets."""

from __future__ import annotations

import re
from typing import Any

_SECRET = re.compile(r"(^|[._-])((api|access|private|secret)[_-]?keys?|secrets?|tokens?|passw(or)?ds?|credentials?)(\.\d+)?$", re.I)


def named_secrets(tree: Any, path: str = "") -> list[str]:
    """The dotted keys of all texts that are secrets by their names. The texts themselves are not shown."""
    if isinstance(tree, str) and _SECRET.search(path):
        return [path]
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in pairs for found in named_secrets(value, f"{path}.{key}" if path else str(key))]
