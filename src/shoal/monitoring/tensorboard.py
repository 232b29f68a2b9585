"""TensorBoard event files, written directly: no TensorFlow, no torch, no thread, and nothing to install but for looking at them.

A file is a sequence of TFRecords (length uint64, masked crc32c of it, payload, masked crc32c of that), each payload one
`tensorflow.Event` message: wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5; a summary holds
values = 1, each with tag = 1 (string) and simple_value = 2 (float).
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

FLUSH_SECONDS = 2.0


class TensorBoardWriter:
    """One event file in `directory`; TensorBoard reads all files of a directory as one run, so that a resumed run goes on in a second file.

    So does a run whose disk refused: a record may have been cut there, and what follows in the same file would not be read.
    Raises OSError where the disk refuses, from each method.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None

    def _open(self) -> BinaryIO:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        file = open(self._directory / name, "wb")  # noqa: SIM115  (closed by close)
        self._file, self._flushed = file, time.monotonic()
        file.write(_record(_double(1, time.time()) + _bytes(3, b"brain.Event:2")))
        file.flush()
        return file

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write all values at one step (environment steps). They reach the file within FLUSH_SECONDS of the next call, or at close."""
        summary = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items())
        try:
            file = self._file or self._open()
            file.write(_record(_double(1, time.time()) + _varint(2 << 3) + _varint(step) + _bytes(5, summary)))
            now = time.monotonic()
            if now - self._flushed >= FLUSH_SECONDS:
                file.flush()
                self._flushed = now
        except OSError:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def close(self) -> None:
        """Write what is buffered. May be called twice."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", _masked_crc(length)) + event + struct.pack("<I", _masked_crc(event))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # finite, and beyond float32
        packed = struct.pack("<f", math.copysign(math.inf, value))
    return _varint(field << 3 | 5) + packed


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(payload: bytes) -> int:
    """Castagnoli's CRC (RFC 3720, appendix B.4)."""
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in payload:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc(payload: bytes) -> int:
    crc = crc32c(payload)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
