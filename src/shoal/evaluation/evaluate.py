"""How good a policy is: whole episodes from fixed seeds, and the statistics of their returns.

Which episodes are played is decided before the first begins: the n-th is reset with a seed that depends on (seed, n) only, and each is
played to its end. So short episodes are not preferred, and the result does not depend on how many environments step side by side
(inference always runs on the same number of rows).
Legend: B rows, one for each environment side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from shoal.environments.instance import Instance
from shoal.environments.make import environment_factory
from shoal.environments.probe import MAKING, Tell, quiet
from shoal.environments.spaces import all_fit, allocate, which_fit
from shoal.errors import ConfigError, EnvironmentFault
from shoal.evaluation.bundle import LoadedPolicy, load_policy
from shoal.evaluation.video import EpisodeVideo
from shoal.imports import OPAQUE
from shoal.streams import Purpose, stream
from shoal.types import CURSOR, Array, Arrays

MAX_ENVS = 8  # side by side; also the rows of every forward pass
ENDLESS_STEPS = 200_000  # no whole Atari game is longer than 27,000
_RESAMPLES = 10_000
_BOOTSTRAP = 1  # the `group` of the stream that resamples; episodes have group 0


def evaluate(
    policy: LoadedPolicy | str | Path,
    episodes: int = 100,
    *,
    seed: int = 0,
    deterministic: bool = True,
    video: str | Path | None = None,
    environment: Callable[..., Any] | None = None,
    num_envs: int = MAX_ENVS,
    max_episode_steps: int | None = None,
    tell: Tell = quiet,
) -> dict[str, Any]:
    """Play whole episodes and say how they went. Atari is played to the end of the game, with the game's own score.

    Args:
      policy: one that is loaded, or the path of a run, a checkpoint or a bundle.
      video: an mp4 of the first episode is written here.
      environment: the user's own factory, where the policy was trained on one that no import path leads to.
      num_envs: environments side by side, at most MAX_ENVS; speed only.
      max_episode_steps: episodes are cut here; without it, one of more than ENDLESS_STEPS is an EnvironmentFault.
      tell: is told what an environment is asked for before it is, and "" once it is asked for nothing: so that whoever watches sees one hang.
    Returns:
      episodes, mean_return, std_return (population), iqm (mean of the middle half, Agarwal et al. 2021, arXiv:2108.13264),
      ci95 ([low, high] of the mean, percentile bootstrap), min, max, mean_length (environment steps).
    Raises:
      ConfigError: the environment cannot be made or cannot be filmed. EnvironmentFault: it broke its contract.
      CheckpointError, RunError: as `load_policy`.
    """
    if episodes < 1 or not 1 <= num_envs <= MAX_ENVS:
        raise ConfigError(
            f"episodes is {episodes} and num_envs {num_envs}; at least 1 episode, and 1 to {MAX_ENVS} environments are allowed"
        )
    if not isinstance(policy, LoadedPolicy):
        policy = load_policy(policy)
    factory = environment or policy.environment
    env_config = policy.env_config
    if max_episode_steps is not None:
        env_config = env_config.model_copy(update={"max_episode_steps": max_episode_steps})
    env_id = env_config.id
    if factory is None and env_id.startswith(OPAQUE):
        raise ConfigError(f"the policy was trained on {env_id}, a Python object; give it again: shoal.load(path, env=factory).evaluate()")
    creates = [environment_factory(env_config, factory, training=False)] * min(num_envs, episodes)
    with ExitStack() as stack:
        if video is not None:
            film = stack.enter_context(EpisodeVideo(Path(video)))
            creates[0] = film.wrap(environment_factory(env_config, factory, training=False, render_mode="rgb_array"))
        try:
            endless = ENDLESS_STEPS if max_episode_steps is None else max_episode_steps + 1
            returns, lengths = _play(policy, creates, episodes, seed, deterministic, endless, tell)
        except EnvironmentFault as fault:
            if isinstance(fault.__cause__, ConfigError):  # it cannot be filmed
                raise fault.__cause__ from None
            raise
    return summarise(returns, lengths, seed)


def summarise(returns: Array, lengths: Array, seed: int = 0) -> dict[str, Any]:
    """The statistics of `evaluate`, of returns [n] and lengths [n]."""
    cut = len(returns) // 4
    means = _resampled_means(returns, stream(seed, Purpose.EVALUATION, group=_BOOTSTRAP))
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "episodes": len(returns),
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "iqm": float(np.mean(np.sort(returns)[cut : len(returns) - cut])),
        "ci95": [float(low), float(high)],
        "min": float(np.min(returns)),
        "max": float(np.max(returns)),
        "mean_length": float(np.mean(lengths)),
    }


def _resampled_means(values: Array, rng: np.random.Generator) -> Array:
    at_once = max(1, 1_000_000 // len(values))  # bounds memory
    counts = [min(at_once, _RESAMPLES - begin) for begin in range(0, _RESAMPLES, at_once)]
    return np.concatenate([values[rng.integers(len(values), size=(count, len(values)))].mean(axis=1) for count in counts])


class _Seat:
    """One environment, and the episode that it plays; `episode` is None once none is left."""

    def __init__(
        self, policy: LoadedPolicy, create: Callable[[], Any], rows: Arrays, index: int, waiting: Iterator[int], seed: int, tell: Tell
    ) -> None:
        self._policy, self._waiting, self._seed, self._tell = policy, waiting, seed, tell
        self._next: int | None = None
        self.index = index
        self.instance = Instance(create, policy.spec, rows, 0, index, self._seed_of_next)
        tell(MAKING, env=index)
        self.instance.restore(np.zeros((), CURSOR), [], None)
        self._take()

    def _seed_of_next(self, _: int) -> int:
        self._next = next(self._waiting, None)
        self._rng = stream(self._seed, Purpose.EVALUATION, index=self._next or 0)
        seed = int(self._rng.integers(2**31))
        self._tell("reset()", env=self.index, seed=seed, step=0)  # which follows at once
        return seed

    def _take(self) -> None:
        self.episode, self.episode_return, self.length = self._next, 0.0, 0
        self._noise: Array | None = None

    def noise(self) -> Array:
        """Exploration noise of the coming step, [size]; with gSDE the same in the whole episode."""
        if self._noise is None or self._policy.network.noise.per == "step":
            self._noise = self._policy.draw_noise(1, self._rng)[0]
        return self._noise

    def step(self, action: Any, returns: Array, lengths: Array) -> bool:
        """Whether its episode ended."""
        self._tell("step()", env=self.index, seed=self.instance.seed, step=self.length + 1)
        ended = self.instance.advance(action)
        self.episode_return += self.instance.reward
        self.length += 1
        if ended:
            returns[self.episode], lengths[self.episode] = self.episode_return, self.length
            self._take()
        return ended

    def does_not_end(self) -> EnvironmentFault:
        """The fault of an episode that goes on and on."""
        message = (
            f"{self._policy.env_config.id}: episode {self.episode} (seed {self.instance.seed}) has not ended after {self.length:,} steps; "
            "end it, or cut episodes with --max-episode-steps"
        )
        return EnvironmentFault(message, {"kind": "endless", "seed": self.instance.seed, "step": self.length})


def _play(
    policy: LoadedPolicy, creates: list[Callable[[], Any]], episodes: int, seed: int, deterministic: bool, endless: int, tell: Tell
) -> tuple[Array, Array]:
    """Returns and lengths of episodes 0 to `episodes` - 1. One of `endless` steps is a fault."""
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    rows_B = allocate(policy.spec, MAX_ENVS)
    float_rows = {name: rows for name, rows in rows_B.items() if rows.dtype.kind == "f"}
    noise_B = None if deterministic else np.zeros((MAX_ENVS, policy.network.noise.size), np.float32)
    memory_B = policy.initial_memory(MAX_ENVS)
    waiting = iter(range(episodes))
    seats: list[_Seat] = []
    try:
        for index, create in enumerate(creates):
            seats.append(_Seat(policy, create, rows_B, index, waiting, seed, tell))
        playing = list(seats)
        while playing:
            tell("")
            for name, rows in float_rows.items():
                if not all_fit(rows):
                    row = int(np.argmin(which_fit(rows.reshape(MAX_ENVS, -1)).all(axis=1)))
                    raise seats[row].instance.not_finite(name, rows[row])
            if noise_B is not None:
                for seat in playing:
                    noise_B[seat.index] = seat.noise()
            action_B, memory_B = policy.act(rows_B, noise_B, memory_B)
            for seat in playing:
                if seat.step(action_B[seat.index], returns, lengths):
                    for array_B in memory_B.values():
                        array_B[seat.index] = 0
                if seat.length >= endless:
                    raise seat.does_not_end()
            playing = [seat for seat in playing if seat.episode is not None]
    finally:
        for seat in seats:
            tell("close()", env=seat.index)
            seat.instance.close()
        tell("")
    return returns, lengths
