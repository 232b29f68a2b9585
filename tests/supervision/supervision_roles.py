"""What the tests' roles do. Imported in forked children by name."""

import gc
import os
import signal
import subprocess
import time

from shoal.supervision.channel import wait
from shoal.supervision.memory import SharedMemory


def say_who(context):
    open_fds = {int(fd) for fd in os.listdir("/proc/self/fd")}
    answer = {
        "name": context.name,
        "index": context.index,
        "incarnation": context.incarnation,
        "payload": context.payload,
        "group": os.getpgrp() == os.getpid(),
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "threads": os.environ["OMP_NUM_THREADS"],
        "secrets": [name for name in os.environ if name.startswith(("RAY_AUTH_TOKEN", "RAY_TLS_"))],
        "fds": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in open_fds if os.path.lexists(f"/proc/self/fd/{fd}")),
        "int_ignored": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "term_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "collects_garbage": gc.isenabled(),
    }
    context.channel.send(repr(answer).encode())


def echo_until_gone(context):
    while True:
        wait([context.channel], 60)
        try:
            message = context.channel.receive()
        except EOFError:
            return
        if message is not None:
            context.channel.send(message)


def write_memory(context):
    size_bytes = context.payload["size_bytes"]
    for number, fd in enumerate(context.memory_fds):
        SharedMemory.attach(fd, size_bytes).buffer[:] = number + context.index


def return_three(context):
    return 3


def exit_four(context):
    raise SystemExit(4)


def raise_an_error(context):
    raise RuntimeError("the pole fell")


def apply_pickled(context):
    context.channel.send(str(context.unpickle()(1)).encode())


def breed_and_wait(context):
    """Start a grandchild in the role's own group, one in a session of its own, and a daemon (double fork); tell their pids; hang."""
    pids = breed()
    context.channel.send(repr(pids).encode())
    time.sleep(600)


def breed_and_return(context):
    context.channel.send(repr(breed()).encode())


def breed():
    plain = subprocess.Popen(["sleep", "600"])
    detached = subprocess.Popen(["sleep", "600"], start_new_session=True)
    read_fd, write_fd = os.pipe()
    if (middle := os.fork()) == 0:
        os.setsid()
        daemon = os.fork()
        if daemon == 0:
            os.close(read_fd)
            os.close(write_fd)
            time.sleep(600)
            os._exit(0)
        os.write(write_fd, str(daemon).encode())
        os._exit(0)
    daemon = int(os.read(read_fd, 100))
    os.close(read_fd)
    os.close(write_fd)
    os.waitpid(middle, 0)
    return [plain.pid, detached.pid, daemon]


def stamp(context):
    context.channel.send(str(time.monotonic_ns()).encode())


def speak_after_a_fork(context):
    if (child := os.fork()) != 0:
        os.waitpid(child, 0)
    context.channel.send(b"child" if child == 0 else b"parent")
