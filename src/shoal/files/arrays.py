"""Named arrays as safetensors, and values as JSON, with nothing lost: structured dtypes, floats bit for bit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from shoal.errors import CheckpointError, SchemaError
from shoal.types import Array, Arrays


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write named arrays as safetensors, C order. Structured arrays become bytes, with their dtype in the file's metadata.

    Raises SchemaError for a dtype without a place there; OSError where the disk refuses.
    """
    stored: Arrays = {}
    structured: dict[str, object] = {}
    for name, given in arrays.items():
        array = np.asarray(given, order="C")
        if array.dtype.names is not None and not array.dtype.hasobject:
            structured[name] = [array.dtype.descr, list(array.shape)]
            stored[name] = np.frombuffer(array.tobytes(), np.uint8)
        elif array.dtype.kind in "biuf":
            stored[name] = array
        else:
            raise SchemaError(f"array {name!r} of {path.name} has dtype {array.dtype}; numbers, booleans and records of them can be saved")
    try:
        safetensors_numpy.save_file(stored, path, {"structured": json.dumps(structured)} if structured else None)
    except SafetensorError as error:  # its words for an OSError
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def arrays_from_bytes(content: bytes) -> Arrays:
    """The inverse of `write_arrays`. Raises CheckpointError where the bytes are no safetensors file."""
    try:
        arrays: Arrays = safetensors_numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        structured = json.loads(header.get("__metadata__", {}).get("structured", "{}"))
        for name, (fields, shape) in structured.items():
            arrays[name] = arrays[name].view(np.dtype([tuple(field) for field in fields])).reshape(shape)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"not a safetensors file that shoal wrote: {error}") from error
    return arrays


def to_json(value: object) -> str:
    """JSON with sorted keys; numpy numbers and arrays become plain ones."""
    return json.dumps(value, sort_keys=True, indent=1, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
