"""Images that are stacks of frames: told from others by their shape and first rows, so that each frame is stored once.

Legend: T rows, B environments of a group, K frames of a stack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shoal.types import Array

_LARGEST = 16  # frames of a stack
_COLOURS = 3  # an axis of this size is taken for colours where only the shape is known


class Stack(NamedTuple):
    """The axis of one observation along which its frames lie, oldest first (0, or -1 for the last), and how many there are."""

    axis: int
    size: int

    def frame_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:] if self.axis == 0 else shape[:-1]

    def frames(self, image: Array, lead: int) -> Array:
        """A view with the frames' axis right after the `lead` leading ones."""
        return image if self.axis == 0 else np.moveaxis(image, -1, lead)


def possible_stacks(dtype: str, shape: tuple[int, ...]) -> list[Stack]:
    """What a uint8 image of this shape could be a stack along: its first and last axes, the shorter first."""
    if dtype != "uint8" or len(shape) < 3:
        return []
    return sorted((Stack(axis, shape[axis]) for axis in (0, -1) if 2 <= shape[axis] <= _LARGEST), key=lambda stack: stack.size)


def likely_stack(dtype: str, shape: tuple[int, ...]) -> Stack | None:
    """The shortest by the shape alone, which takes three planes for colours."""
    return next((stack for stack in possible_stacks(dtype, shape) if stack.size != _COLOURS), None)


def follows(newer: Array, older: Array, stack: Stack, lead: int) -> Array:
    """Where a stack begins with the last K-1 frames of another: bool over the `lead` leading dimensions of both."""
    first, last = stack.frames(newer, lead), stack.frames(older, lead)
    index = (slice(None),) * lead
    same = first[*index, :-1] == last[*index, 1:]
    return np.asarray(same.all(axis=tuple(range(lead, same.ndim))))


def follows_rows(image_T1B: Array, stack: Stack) -> Array:
    """For each row t >= 1, whether its stack continues row t-1's: bool [T, B]. Row by row, so that what is compared stays in the cache."""
    return np.array([follows(image_T1B[t], image_T1B[t - 1], stack, 1) for t in range(1, len(image_T1B))], np.bool_)


def is_stacked(image_T1B: Array, goes_on_TB: Array, stack: Stack) -> bool:
    """Whether rows of one rollout are stacks: most continue the row before, and something moves.

    goes_on_TB: bool, a step was made in this row whose episode goes on in the next.
    """
    moved_TB = goes_on_TB & (image_T1B[1:] != image_T1B[:-1]).any(axis=tuple(range(2, image_T1B.ndim)))
    return bool(moved_TB.any() and follows_rows(image_T1B, stack)[moved_TB].mean() > 0.5)
