"""Words between two processes: whole messages through a socket pair, in order, never blocking, without pickle.

The kernel keeps message boundaries (SOCK_SEQPACKET) and buffers per pair: no lock is shared, so that a `kill -9` of either
end at any instant can neither tear a message nor block the other end. macOS has no SEQPACKET and takes SOCK_DGRAM.
"""

from __future__ import annotations

import array
import errno
import select
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

MAX_MESSAGE_BYTES = 160 * 1024
MAX_FDS = 253  # SCM_MAX_FD of Linux
_BUFFER_BYTES = 1 << 20  # the kernel cuts it to net.core.wmem_max, 208 KiB on most machines
_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
_SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_FD_BYTES = array.array("i").itemsize


class Channel:
    """One end of a pair. Not for several threads at once.

    A peer is gone when every copy of its end is closed; what it sent before is received first, then `EOFError`.
    """

    def __init__(self, fd: int) -> None:
        """Take over the descriptor of one end (as inherited, or received)."""
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._inbox = bytearray(MAX_MESSAGE_BYTES + 1)
        self._view = memoryview(self._inbox)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        ends = socket.socketpair(socket.AF_UNIX, _KIND)
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            if _KIND != socket.SOCK_SEQPACKET:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        return cls(ends[0].detach()), cls(ends[1].detach())

    def send(self, message: bytes) -> bool:
        """Send one message (1 to MAX_MESSAGE_BYTES bytes), at once or not at all.

        Returns:
          False where the peer's buffer is full: nothing was sent, try again when `wait(..., writable)` says so.
        Raises:
          EOFError: the peer is gone.
          ValueError: the message is empty or too long.
        """
        _check_size(message)
        try:
            self._socket.send(message, _SEND_FLAGS)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            return _send_failed(error)
        return True

    def send_with_fds(self, message: bytes, fds: Sequence[int]) -> bool:
        """As `send`, with copies of open descriptors (at most MAX_FDS), which the caller still owns."""
        _check_size(message)
        if len(fds) > MAX_FDS:
            raise ValueError(f"at most {MAX_FDS} descriptors go with one message, got {len(fds)}")
        try:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self._socket.sendmsg([message], ancillary, _SEND_FLAGS)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            return _send_failed(error)
        return True

    def receive(self) -> bytes | None:
        """The next message, whole; None where there is none now. Descriptors sent with it are dropped.

        Raises:
          EOFError: the peer is gone and all it sent was received.
        """
        while True:
            try:
                num_bytes = self._socket.recv_into(self._inbox)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # the peer went with messages of ours unread; what it had sent comes now, then the end
            return self._message(num_bytes)

    def receive_with_fds(self) -> tuple[bytes, list[int]] | None:
        """As `receive`, with the descriptors that came with the message (close-on-exec; the caller owns them)."""
        fds = array.array("i")
        while True:
            try:
                num_bytes, ancillary, _, _ = self._socket.recvmsg_into(
                    [self._inbox], socket.CMSG_SPACE(MAX_FDS * _FD_BYTES), _RECEIVE_FLAGS
                )
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(content[: len(content) - len(content) % _FD_BYTES])
            return self._message(num_bytes), list(fds)

    def _message(self, num_bytes: int) -> bytes:
        if num_bytes == 0:
            raise EOFError("the peer of this channel is gone")
        if num_bytes > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of more than {MAX_MESSAGE_BYTES} bytes came and was cut")
        return bytes(self._view[:num_bytes])

    def fileno(self) -> int:
        """The descriptor, for `wait`; -1 once closed."""
        return self._socket.fileno()

    def detach(self) -> int:
        """Give the descriptor away: this object is closed, the descriptor is not."""
        return self._socket.detach()

    def close(self) -> None:
        self._socket.close()


def _check_size(message: bytes) -> None:
    if not 0 < len(message) <= MAX_MESSAGE_BYTES:
        raise ValueError(f"a message has 1 to {MAX_MESSAGE_BYTES} bytes, got {len(message)}")


def _send_failed(error: OSError) -> bool:
    if isinstance(error, (BrokenPipeError, ConnectionResetError, ConnectionRefusedError)):
        raise EOFError("the peer of this channel is gone") from error
    if error.errno in (errno.ENOBUFS, errno.ENOMEM):
        return False
    raise error


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Waitable = TypeVar("Waitable", bound=HasFileno)


def wait(channels: Iterable[Waitable], timeout_seconds: float | None, writable: Iterable[HasFileno] = ()) -> list[Waitable]:
    """Wait until one of `channels` (or anything with a fileno: a Zygote, a socket) has something to receive or is gone.

    Unblocked by a message, by the death of a peer, by room in one of `writable`, or by the time (None: no limit; the callers in
    this house always give one). Returns those of `channels` that are ready, in the order given; none where the time ran out.
    """
    by_fd = {channel.fileno(): channel for channel in channels}
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    for sender in writable:
        fd = sender.fileno()
        poll.register(fd, select.POLLIN | select.POLLOUT if fd in by_fd else select.POLLOUT)
    fired = {fd for fd, event in poll.poll(None if timeout_seconds is None else max(0, timeout_seconds * 1000)) if event & ~select.POLLOUT}
    return [channel for fd, channel in by_fd.items() if fd in fired]
