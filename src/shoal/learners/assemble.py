"""From slots to a batch: the rollouts of one update are copied side by side, so that their slots are free again at once.

Legend: T rows, B environments of a group, N columns of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.experience.batch import Batch
from shoal.experience.ring import Slot
from shoal.learners.transfer import HostStaging, Staging
from shoal.types import Array


def assemble(slots: Sequence[Slot], version: int, max_lag: int, staging: Staging | None = None) -> Batch:
    """The batch of `slots` on the host, columns in their order.

    Args:
      version: the learner's policy version now; policy lag is counted from it.
      max_lag: rows whose lag is larger are not valid in the batch (a straggler's in a paced rollout; others were refused as a whole).
      staging: gives the memory, and is told of each field that is whole.
    """
    staging = staging or HostStaging()
    num_rows = [int(s.envelope["num_rows"]) for s in slots]
    t_max = max(num_rows)
    full = min(num_rows) == t_max

    def beside(name: str, extra: int = 0, dtype: npt.DTypeLike | None = None) -> Array:
        """[t_max + extra, N, ...], zero below each column's last row."""
        parts = [s.arrays[name][: rows + extra] for s, rows in zip(slots, num_rows, strict=True)]
        sizes = [p.shape[1] for p in parts]
        out = staging.array(name, (t_max + extra, sum(sizes), *parts[0].shape[2:]), dtype or parts[0].dtype)
        if full:
            return np.concatenate(parts, axis=1, out=out)
        out[:] = 0
        at = 0
        for part, size in zip(parts, sizes, strict=True):
            out[: len(part), at : at + size] = part
            at += size
        return out

    first = slots[0]
    observations = [n for n in first.observation_names if n != "action_mask"]
    finals = [int(s.envelope["num_finals"]) for s in slots]
    offsets = np.cumsum([0, *(s.schema.num_envs for s in slots[:-1])])
    index = [
        np.stack([s.arrays["final/row"][:f], s.arrays["final/env"][:f] + offset], axis=1)
        for s, f, offset in zip(slots, finals, offsets, strict=True)
    ]
    states = first.schema.state_names
    lag = version - beside("policy_version")
    valid = beside("valid") & (lag <= max_lag)
    tensor = staging.begin
    return Batch(
        observation={n: tensor(beside(n, 1)) for n in observations},
        action_mask=tensor(beside("action_mask", 1)) if "action_mask" in first.arrays else None,
        action=tensor(beside("action")),
        log_prob_TN=tensor(beside("log_prob")),
        reward_TN=tensor(beside("reward", dtype=np.float32)),
        terminated_TN=tensor(beside("terminated")),
        truncated_TN=tensor(beside("truncated")),
        valid_TN=tensor(valid),
        policy_lag_TN=tensor(np.where(valid, lag, 0)),
        final_observation={n: tensor(_finals(slots, finals, n, staging)) for n in observations},
        final_index=tensor(np.concatenate(index).astype(np.int64)),
        policy_state={n: tensor(np.concatenate([s.arrays[n] for s in slots])) for n in states},
        reset_T1N=tensor(_resets(slots, t_max)) if states else None,
    )


def _resets(slots: Sequence[Slot], t_max: int) -> Array:
    """Slot.resets side by side, [t_max + 1, N]; below a column's last row nothing matters."""
    parts = [slot.resets() for slot in slots]
    return np.concatenate([np.pad(part, ((0, t_max + 1 - len(part)), (0, 0))) for part in parts], axis=1)


def _finals(slots: Sequence[Slot], finals: Sequence[int], name: str, staging: Staging) -> Array:
    parts = [s.arrays[f"final/{name}"][:f] for s, f in zip(slots, finals, strict=True)]
    return np.concatenate(parts, out=staging.array(f"final/{name}", (sum(finals), *parts[0].shape[1:]), parts[0].dtype))
