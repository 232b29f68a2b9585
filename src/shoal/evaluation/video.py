"""An mp4 of one episode, through the ffmpeg that the optional package imageio-ffmpeg brings."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Self

import gymnasium
import numpy as np

from shoal.errors import ConfigError
from shoal.types import Array


class EpisodeVideo:
    """Films the first episode of the environment that `wrap` makes: its reset and every step, the last one included."""

    def __init__(self, path: Path) -> None:
        try:
            import imageio_ffmpeg
        except ImportError:
            raise ConfigError("a video needs the package imageio-ffmpeg: pip install imageio-ffmpeg") from None
        if path.suffix != ".mp4":
            raise ConfigError(f"video: {path} does not end in .mp4, the one format that is written")
        if not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:  # no screen: pygame's SDL complains while it looks for one
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
            os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
        self._write_frames = imageio_ffmpeg.write_frames
        self._path = path
        self._writer: Generator[None, Any, None] | None = None
        self._over = False

    def wrap(self, create: Callable[[], Any]) -> Callable[[], Any]:
        """`create`, whose environments are filmed; they must render `rgb_array`."""
        return lambda: _Filmed(create(), self)

    def take(self, env: Any) -> None:
        """Add what the environment renders now."""
        if self._over:
            return
        frame = env.render()
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ConfigError(
                f"video: render() gave {_what(frame)}, but uint8 [height, width, 3] was expected; "
                "the environment must take render_mode='rgb_array' (a factory of yours: as an argument)"
            )
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), "edge")  # H.264 wants even sides
        if self._writer is None:
            self._writer = self._open(frame, float(env.metadata.get("render_fps") or 30))
        self._writer.send(np.ascontiguousarray(frame))

    def end(self) -> None:
        """The episode is over: what comes now is not filmed."""
        self._over = True
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _open(self, frame: Array, fps: float) -> Generator[None, Any, None]:
        height, width, _ = frame.shape
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer: Generator[None, Any, None] = self._write_frames(str(self._path), (width, height), fps=fps, macro_block_size=1)
            writer.send(None)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"video: {self._path} cannot be written: {error}") from error
        return writer


class _Filmed(gymnasium.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: Any, film: EpisodeVideo) -> None:
        super().__init__(env)
        self._film = film

    def reset(self, **kwargs: Any) -> Any:
        result = self.env.reset(**kwargs)
        self._film.take(self.env)
        return result

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self._film.take(self.env)
        if result[2] or result[3]:
            self._film.end()
        return result


def _what(frame: Any) -> str:
    return f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
