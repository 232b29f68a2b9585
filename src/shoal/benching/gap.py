"""What lies between a run and its ceiling, in figures and in words.

Every core's time is used by a role or idle, so with C cores and T microseconds per environment step of the run, C T = actors + learner +
supervisor + idle; at the ceiling, with T_c, C T_c = costs + the idleness that the mode brings. The difference of the two, share by share, is
the whole gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SPOKEN = 0.5  # percent: less than this is not worth a sentence


def explain(found: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
    """{missing, words}: percent of the cores' time that the ceiling would not need, by cause (negative: cheaper than alone); and sentences."""
    missing = _missing(found, costs)
    fraction = 100.0 * found["fraction"]
    words = [f"{found['env_steps_per_second']:,.0f} of {found['ceiling']:,.0f} env steps/s: {fraction:.0f} % of the ceiling"]
    words += _role_words(found["time_by_role"], costs["settings"]["mode"])
    for name, share in sorted(missing.items(), key=lambda item: -item[1]):
        if share >= _SPOKEN:
            words.append(f"{_CAUSES[name]}: {share:.1f} % of the cores' time{_of_it(name, found, costs)}")
    queued = found["processor"].get("queued", 0.0)
    if queued >= _SPOKEN:
        words.append(
            f"processes were ready and waited for a processor for {queued:.1f} % of the cores' time: more processes than cores, or other programs"
        )
    return {"missing": missing, "words": words}


_CAUSES = {
    "actors": "actors take more processor time per env step than their parts alone",
    "learner": "the learner takes more processor time per env step than its parts alone",
    "supervisor": "the supervisor (records, checkpoints, words) takes more than words and decisions alone",
    "idle": "cores are idle more than the mode demands (or other programs had them)",
}


def _of_it(cause: str, found: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    mixed = costs["mixed"] * found["env_steps_per_second"] / (costs["cores"] * 1e4)
    known = cause == "actors" and mixed >= _SPOKEN
    return f"; of it {mixed:.1f} because environment, inference and recording take turns at every row (caches, branches)" if known else ""


def _missing(found: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, float]:
    """Percent of the cores' time beyond what the ceiling needs; empty where the processor's shares are not known or environments wait."""
    shares, cores = found["processor"], costs["cores"]
    if "learner" not in shares or costs["ceilings"]["waiting"] is not None or costs["learning"]["own_device"]:
        return {}
    per_step = cores * 1e6 / found["env_steps_per_second"]  # core microseconds
    e, i, learn = (costs["costs"][name] for name in "eil")
    x = costs["transport"]
    needed = {
        "actors": e + i + x["record"] + x["weights"] / 2,
        "learner": learn + x["consume"] + x["weights"] / 2,
        "supervisor": x["words"] + x["decide"],
    }
    needed["idle"] = max(0.0, cores * 1e6 / found["ceiling"] - sum(needed.values()))
    return {name: shares.get(name, 0.0) - 100.0 * alone / per_step for name, alone in needed.items()}


def _role_words(roles: Mapping[str, Mapping[str, float]], mode: str) -> list[str]:
    words = []
    for role, shares in roles.items():
        parts = ", ".join(f"{name} {share:.0f} %" for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= _SPOKEN)
        if parts:
            words.append(f"{role}: {parts}")
    waiting = roles.get("actors", {}).get("waiting", 0.0)
    if waiting >= _SPOKEN:
        why = "their turn is over until the next weights are there" if mode == "sync" else "two batches are ahead of the learner already"
        words.append(f"actors wait {waiting:.0f} % of their time for the learner ({why})")
    return words
