"""Where else a run is kept besides the driver's disk: nowhere, unless its directory is a URL (storage/mirror.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

Event = Callable[..., None]  # as Observer.event


class Elsewhere:
    """What a run tells of itself, to nobody. All of it returns at once but for `begin`, `finish`, `failed`, `settle` and `discard`.

    Attributes:
      url: what names the run, where that is not its directory.
    """

    url: str | None = None

    def begin(self, part: int, keep: int) -> None:
        """The run begins, or goes on, in the directory as it is now: the part-th time, counted from 0, with `keep` checkpoints to be kept."""

    def saved(self, path: Path) -> None:
        """A checkpoint is whole."""

    def held(self) -> Collection[Path]:
        """Checkpoints that are not to be removed yet."""
        return ()

    def tell(self, event: Event) -> None:
        """Say what happened there since the last call. Raises StorageError where the run belongs to another driver now."""

    def finish(self, event: Event) -> None:
        """The run ended, and its result is written: wait until its last checkpoint and its result are there. Raises StorageError where they cannot be."""

    def failed(self, event: Event) -> None:
        """An error ended the run: what can be there in a moment is to be."""

    def settle(self, part: int, keep: int) -> None:
        """A run that is over is not gone on with: what an earlier part could not leave there is to be there. Raises StorageError."""

    def discard(self) -> None:
        """The run never began: nothing of it is to stay."""
