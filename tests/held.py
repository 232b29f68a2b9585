"""The command line, with runs that wait after every update until whoever started them lets them go on; so what happens to a run happens at the update it was
meant for, however fast the machine is.

    python -m held train CartPole-v1 ...    with one end of a `Line` in the environment

After an update the run says its number and waits, in its supervisor's process, before anything follows from the update (a checkpoint, the next rollouts).
Actors and learner are at leisure then: in sync mode they have nothing to do, in async mode actors go on as far as they may. At its end such a run
waits PATIENCE_SECONDS for an update that is under way, and is not sent back by a machine that is slow.

Without a line, the same command line goes on by itself, with the same patience.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

HELD = "SHOAL_TEST_HELD"  # environment variable: the descriptor of the run's end
FOR_GOOD = b"go on, and ask no more"
REACH_SECONDS = 600.0  # generous: it only ends what hangs
FIRST_SECONDS = 0.15  # what an update is taken to last before one was seen
PATIENCE_SECONDS = 300.0


class Line:
    """The tester's end, through all parts of a run.

    Attributes:
      update: the highest that was told.
      seconds: the least that an update took, from the word that let the run go on to the next of its words.
      waits: whether the run waits now.
    """

    def __init__(self) -> None:
        self.update, self.seconds, self.waits = 0, FIRST_SECONDS, False
        self._ours: socket.socket | None = None
        self._went_on_at: float | None = None

    def start(self, args: Sequence[str], env: Mapping[str, str], **more: Any) -> subprocess.Popen[str]:
        """The command line, with a held run: its next part, where others have ended. more: of subprocess.Popen."""
        self.close()
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._went_on_at, self.waits = None, False
        with theirs:
            held = {**env, HELD: str(theirs.fileno())}
            return subprocess.Popen([sys.executable, "-m", "held", *args], env=held, pass_fds=(theirs.fileno(),), text=True, **more)

    def hear(self, seconds: float) -> bool:
        """Wait for a word, so long at most. True: it came, and the run waits."""
        assert self._ours is not None, "start() comes first"
        if self.waits or not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            word = self._ours.recv(32)
        except ConnectionResetError:
            word = b""
        if not word:  # it ended
            time.sleep(seconds)
            return False
        if self._went_on_at is not None:
            self.seconds = min(self.seconds, time.monotonic() - self._went_on_at)
        self.update, self.waits = max(self.update, int(word)), True
        return True

    def go_on(self, *, for_good: bool = False) -> None:
        """Let a run that waits make its next update."""
        assert self._ours is not None
        assert self.waits, "it does not wait"
        self.waits, self._went_on_at = False, time.monotonic()
        self._ours.send(FOR_GOOD if for_good else b"go on")

    def reach(self, update: int, process: subprocess.Popen[str], log: Path) -> None:
        """Have the run make so many updates, unless it did; it waits then."""
        deadline = time.monotonic() + REACH_SECONDS
        while self.update < update:
            said = log.read_text(errors="replace")[-4000:] if process.poll() is not None else ""
            assert process.poll() is None, f"the run ended with {process.returncode} before update {update}: {said}"
            assert time.monotonic() < deadline, f"the run made no update {update}"
            if self.waits:
                self.go_on()
            self.hear(0.05)

    def close(self) -> None:
        if self._ours is not None:
            self._ours.close()


def main() -> None:
    """The command line, whose `train` and `resume` ask at the line after every update."""
    import shoal
    from shoal.cli.main import main as command_line

    line = socket.socket(fileno=int(os.environ[HELD])) if HELD in os.environ else None
    if line is not None:
        line.set_inheritable(False)
    free = line is None

    def ask(facts: Any) -> None:
        nonlocal free
        if free or line is None:
            return
        line.send(str(facts["update"]).encode())
        word = line.recv(64)
        if not word:
            raise RuntimeError("whoever holds this run is gone")
        free = word == FOR_GOOD

    def asking(name: str) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            api = import_module("shoal.api")  # once the command line set what numpy reads
            import_module("shoal.engines.ending").UPDATE_SECONDS = PATIENCE_SECONDS
            return getattr(api, name)(*args, callbacks=[ask], **settings)

        return call

    shoal.train, shoal.resume = asking("train"), asking("resume")
    command_line()


if __name__ == "__main__":
    main()
