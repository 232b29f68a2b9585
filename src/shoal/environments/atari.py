"""Atari 2600 games with the standard preprocessing (Mnih et al. 2015; Machado et al. 2018, arXiv:1709.06009), exactly restorable.

Gymnasium's own Atari environment loads the ROM again at each seeded reset (175 ms). Here the emulator keeps one fixed seed, every
game begins from one saved state, and all chance (no-op starts, sticky actions) is drawn outside of the emulator from the episode's seed.

One environment step is `frame_skip` emulator frames.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from shoal.config import EnvConfig
from shoal.environments.generators import STATE_BYTES, pack_generator, unpack_generator
from shoal.errors import ConfigError
from shoal.types import Array

SIZE = 84  # pixels of a side
_HEADER = struct.Struct(f"<iiBI{STATE_BYTES}s")  # lives, previous action, whether a life was just lost, length of ALE's state, generator
_SPARE_BYTES = 1024  # ALE's serialised state varies by some tens of bytes within one game


def atari_factory(spec: Any, env: EnvConfig, *, training: bool, render_mode: str | None) -> Callable[[], Any]:
    """A function that makes the game which gymnasium registered as `spec`, preprocessed.

    Raises:
      ConfigError: observations of RAM or sound cannot be preprocessed; OpenCV or the emulator is not installed.
    """
    kwargs: dict[str, Any] = {key: value for key, value in spec.kwargs.items() if key not in ("frameskip", "obs_type")}
    if spec.kwargs.get("obs_type", "rgb") == "ram" or "obs_type" in env.kwargs or env.kwargs.get("sound_obs"):
        raise ConfigError(
            f"env.id {env.id}: preprocessing makes its own images; for RAM, sound or raw frames set env.atari_preprocessing to false"
        )
    kwargs |= {"episodic_life": training, "reward_signs": training, "render_mode": render_mode} | env.kwargs

    def create() -> Any:
        made = AtariGame(**kwargs)
        return made if env.max_episode_steps is None else gymnasium.wrappers.TimeLimit(made, env.max_episode_steps)

    return create


class AtariGame(gymnasium.Env[Array, np.int64]):
    """Observations: uint8 [frame_stack, 84, 84], newest frame last; actions: the game's minimal set.

    Args:
      episodic_life: a lost life terminates the episode; the next reset then goes on with the same game.
      reward_signs: rewards are -1, 0 or 1.
      noop_max: a new game begins with 1 to `noop_max` frames without action.
      repeat_action_probability: at each frame, the action of the frame before is kept with this probability (sticky actions).
      max_num_frames_per_episode: emulator frames after which a game is truncated.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012  (so declared by gymnasium)

    def __init__(
        self,
        game: str,
        *,
        frame_skip: int = 4,
        frame_stack: int = 4,
        noop_max: int = 30,
        episodic_life: bool = True,
        reward_signs: bool = True,
        repeat_action_probability: float = 0.0,
        full_action_space: bool = False,
        max_num_frames_per_episode: int = 108_000,
        mode: int | None = None,
        difficulty: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self._frame_skip, self._noop_max = frame_skip, noop_max
        self._episodic_life, self._reward_signs = episodic_life, reward_signs
        self._sticky = repeat_action_probability
        self._ale, self._ale_state, self._resize = _emulator(game, max_num_frames_per_episode, mode, difficulty)
        self._actions = self._ale.getLegalActionSet() if full_action_space else self._ale.getMinimalActionSet()
        self._noop = self._actions[0]
        names = [action.name for action in self._actions]
        self._fire = names.index("FIRE") if "FIRE" in names else None
        self._beginning = self._ale.cloneState(include_rng=True)
        self._screens = np.zeros((2, *self._ale.getScreenDims()), np.uint8)
        self._stack = np.zeros((frame_stack, SIZE, SIZE), np.uint8)
        self._rng = np.random.Generator(np.random.PCG64(0))
        self._lives, self._previous, self._life_lost = 0, 0, False
        self.observation_space = gymnasium.spaces.Box(0, 255, self._stack.shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(self._actions))
        self._state_bytes = len(self._beginning.serialize()) + _SPARE_BYTES
        self.snapshot_bytes = _HEADER.size + self._state_bytes + self._stack.size

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """A new game, or the next life of the running one where `episodic_life` ended the last episode."""
        super().reset(seed=seed)
        if seed is not None:
            self._rng = np.random.Generator(np.random.PCG64(seed))
        self._previous = 0
        if self._life_lost:
            self._run(0)
        if not self._life_lost or self._ale.game_over():
            self._begin_game()
        self._life_lost = False
        if self._fire is not None:
            self._run(self._fire)
        self._lives = self._ale.lives()
        self._stack[:] = self._frame()
        return self._stack.copy(), {"lives": self._lives}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        reward = self._run(int(action))
        self._stack[:-1] = self._stack[1:]
        self._stack[-1] = self._frame()
        terminated, truncated = self._ale.game_over(with_truncation=False), self._ale.game_truncated()
        lives = self._ale.lives()
        self._life_lost = self._episodic_life and 0 < lives < self._lives and not (terminated or truncated)
        self._lives = lives
        if self._reward_signs:
            reward = float(np.sign(reward))
        return self._stack.copy(), reward, bool(terminated or self._life_lost), bool(truncated), {"lives": lives}

    def _begin_game(self) -> None:
        self._ale.restoreState(self._beginning)
        if self._noop_max:
            for _ in range(int(self._rng.integers(1, self._noop_max + 1))):
                self._ale.act(self._noop)

    def _run(self, action: int) -> float:
        """Up to `frame_skip` frames; keeps the last two screens. Returns the sum of rewards."""
        ale, skip = self._ale, self._frame_skip
        stays = self._rng.random(skip) < self._sticky if self._sticky else None
        reward = 0.0
        for frame in range(skip):
            if stays is None or not stays[frame]:
                self._previous = action
            reward += ale.act(self._actions[self._previous])
            if frame == skip - 2:
                ale.getScreenGrayscale(self._screens[1])
            if ale.game_over():
                break
        ale.getScreenGrayscale(self._screens[0])
        if frame < skip - 1 or skip == 1:
            self._screens[1] = self._screens[0]
        return reward

    def _frame(self) -> Array:
        """uint8 [84, 84]: the brighter of the last two screens (sprites flicker), averaged down."""
        return self._resize(np.maximum(self._screens[0], self._screens[1]))

    def render(self) -> Any:
        return self._ale.getScreenRGB()

    def snapshot(self) -> bytes:
        """Everything the future depends on: ALE's own state, lives, sticky action, generator, frames."""
        state = self._ale.cloneState(include_rng=True).serialize()
        if len(state) > self._state_bytes:
            raise RuntimeError(f"the emulator's state has {len(state)} bytes, more than the {self._state_bytes} that were planned for")
        header = _HEADER.pack(self._lives, self._previous, self._life_lost, len(state), pack_generator(self._rng))
        return b"".join((header, state, self._stack.tobytes()))

    def restore_snapshot(self, data: bytes) -> tuple[Array, dict[str, Any]]:
        """Stand where `snapshot` was taken, in this instance or another of the same game."""
        self._lives, self._previous, life_lost, size, generator = _HEADER.unpack_from(data)
        if len(data) != _HEADER.size + size + self._stack.size:
            raise ValueError(f"a snapshot of {_HEADER.size + size + self._stack.size} bytes was expected, not {len(data)}")
        self._life_lost, self._rng = bool(life_lost), unpack_generator(generator)
        self._ale.restoreState(self._ale_state(data[_HEADER.size : _HEADER.size + size]))
        self._stack[:] = np.frombuffer(data, np.uint8, offset=_HEADER.size + size).reshape(self._stack.shape)
        return self._stack.copy(), {"lives": self._lives}


def _emulator(game: str, max_frames: int, mode: int | None, difficulty: int | None) -> tuple[Any, Any, Callable[[Array], Array]]:
    """An emulator that has loaded `game` and stands at its beginning, ALE's class of states, and the function that shrinks a screen."""
    import ale_py
    import cv2
    from ale_py import roms

    path = roms.get_rom_path(game)
    if path is None:
        raise ConfigError(f"there is no Atari game {game!r}; names are written as in ms_pacman")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else each emulator prints a banner
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.setInt("max_num_frames_per_episode", max_frames)
    ale.setInt("random_seed", 0)
    ale.loadROM(path)
    if mode is not None:
        ale.setMode(mode)
    if difficulty is not None:
        ale.setDifficulty(difficulty)
    ale.reset_game()
    cv2.setNumThreads(1)  # an actor has one core
    return ale, ale_py.ALEState, lambda screen: cv2.resize(screen, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
