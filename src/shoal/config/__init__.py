"""The configuration of a run: one tree of pydantic models, from which names, defaults, help and validation all come.

Every key has a dotted name (`algorithm.learning_rate`; on the command line `--algorithm.learning-rate`). Resolution, lowest
first: defaults here, the preset of a known environment, a YAML file, the command line or keyword arguments.
No torch here: the command line and the supervisor import these files. `base` has the numbers, `sections` and `algorithms` the parts, `run` the whole.
"""

from __future__ import annotations

from shoal.config.algorithms import (
    BUILT_IN,
    ActionKind,
    ActorCriticConfig,
    AlgorithmConfig,
    APPOConfig,
    CustomConfig,
    DQNConfig,
    ImpalaConfig,
    OffPolicyConfig,
    OnPolicyConfig,
    PPOConfig,
    QConfig,
    R2D2Config,
    SACConfig,
    TD3Config,
    VTraceConfig,
)
from shoal.config.base import FiniteFloat, Fraction, Positive, PositiveFloat, Section, Share, Weight
from shoal.config.run import MAX_ACTORS, RunConfig, actor_bounds, against_divergence
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

__all__ = [
    "BUILT_IN",
    "MAX_ACTORS",
    "APPOConfig",
    "ActionKind",
    "ActorCriticConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "CustomConfig",
    "DQNConfig",
    "EnvConfig",
    "EvaluationConfig",
    "FiniteFloat",
    "Fraction",
    "ImpalaConfig",
    "LearnerConfig",
    "OffPolicyConfig",
    "OnPolicyConfig",
    "PPOConfig",
    "PolicyConfig",
    "Positive",
    "PositiveFloat",
    "QConfig",
    "R2D2Config",
    "RayConfig",
    "ReplayConfig",
    "RunConfig",
    "SACConfig",
    "SamplingConfig",
    "Section",
    "Share",
    "StopConfig",
    "TD3Config",
    "VTraceConfig",
    "Weight",
    "actor_bounds",
    "against_divergence",
]
