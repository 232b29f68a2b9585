"""The configuration of a whole run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from shoal.config.algorithms import BUILT_IN, AlgorithmConfig, CustomConfig, PPOConfig
from shoal.config.base import Positive, Section
from shoal.config.sections import (
    CheckpointConfig,
    EnvConfig,
    EvaluationConfig,
    LearnerConfig,
    PolicyConfig,
    RayConfig,
    ReplayConfig,
    SamplingConfig,
    StopConfig,
)

MAX_ACTORS = 1024


def actor_bounds(text: str) -> tuple[int, int]:
    """MIN and MAX of `autoscale`. Raises ValueError."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most) <= MAX_ACTORS):
        raise ValueError(f"should be MIN:MAX with 1 <= MIN <= MAX <= {MAX_ACTORS}, such as 1:8")
    return int(least), int(most)


def _checked_bounds(value: Any) -> Any:
    if value is None or value == "none":
        return None
    actor_bounds(value if isinstance(value, str) else "")
    return value


class RunConfig(Section):
    """A whole run."""

    env: EnvConfig = Field(default_factory=EnvConfig)
    algorithm: SerializeAsAny[AlgorithmConfig] = Field(default_factory=PPOConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    stop: StopConfig = Field(default_factory=StopConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    engine: Literal["local", "ray"] = Field("local", description="where roles run: processes of this machine, or a Ray cluster")
    ray: RayConfig = Field(default_factory=RayConfig)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="names every random stream of the run")
    actors: Annotated[int, Field(ge=0, le=MAX_ACTORS)] | None = Field(
        None,
        description="processes that host environments; 0 runs all in this process, which an environment that crashes takes along "
        "(default: one per core; where environments wait, one per group)",
    )
    autoscale: Annotated[str | None, BeforeValidator(_checked_bounds)] = Field(
        None,
        description="MIN:MAX: the number of actors follows the load between these: more while the learner waits for data, fewer while data waits for the learner "
        "(default: it stays as it is, unless `shoal scale` says otherwise)",
    )
    learners: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="processes that learn together: each takes its part of every batch, and gradients are added up over all; what learns from a replay divides that too",
    )
    mode: Literal["sync", "async"] | None = Field(
        None,
        description="sync: exact, one policy version per update; async: actors go on while the learner learns (default: the algorithm's)",
    )
    max_policy_lag: Positive = Field(
        4, description="async: no sample is trained that is more updates old; what learns from a replay samples those of any age"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the learner computes")
    run_dir: str | None = Field(
        None,
        description="directory of this run, or a URL (s3://bucket/runs/x) of one in a store of objects (default: runs/{env}__{algorithm}__{seed}__{time})",
    )
    preset: str | None = Field(None, description="the preset that was taken; `none` takes none")

    @model_validator(mode="before")
    @classmethod
    def _pick_algorithm(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("algorithm"), dict):
            chosen = value["algorithm"]
            model = BUILT_IN.get(chosen.get("name", "ppo"), CustomConfig)
            value = {**value, "algorithm": model.model_validate(chosen)}
        return value


def against_divergence(config: RunConfig, *, replayed: bool) -> str:
    """What to try where the numbers of a run diverged, in keys that its algorithm takes.

    replayed: it learns from a replay, which takes observations and rewards as they are.
    """
    if replayed:
        return (
            "lower algorithm.learning_rate or algorithm.max_gradient_norm, or have a wrapper of the environment scale its observations and rewards: "
            "what learns from a replay takes them as they are"
        )
    left = [f"policy.{key}" for key in ("normalise_observations", "normalise_rewards") if not getattr(config.policy, key)]
    return "lower algorithm.learning_rate" + (f", or set {' and '.join(left)}" if left else " or algorithm.max_gradient_norm")
