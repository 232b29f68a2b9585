"""The state of a numpy generator (PCG64, gymnasium's own) as 40 bytes, and back."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_PCG64 = struct.Struct("<16s16sII")
STATE_BYTES = _PCG64.size


def pack_generator(generator: np.random.Generator) -> bytes:
    """The whole state of a PCG64 generator in a fixed layout."""
    state: Any = generator.bit_generator.state
    if state["bit_generator"] != "PCG64":
        raise TypeError(f"a PCG64 generator was expected, not {state['bit_generator']}")
    words = state["state"]
    return _PCG64.pack(words["state"].to_bytes(16, "little"), words["inc"].to_bytes(16, "little"), state["has_uint32"], state["uinteger"])


def unpack_generator(packed: bytes) -> np.random.Generator:
    """The inverse of `pack_generator`."""
    state, increment, has_uint32, uinteger = _PCG64.unpack(packed)
    bits = np.random.PCG64(0)
    words: Any = {"state": int.from_bytes(state, "little"), "inc": int.from_bytes(increment, "little")}
    bits.state = {"bit_generator": "PCG64", "state": words, "has_uint32": has_uint32, "uinteger": uinteger}
    return np.random.Generator(bits)
