"""The section of the algorithm: one model for each, from which its options follow, and what it cannot be combined with."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from shoal.config.base import FiniteFloat, Fraction, Positive, PositiveFloat, Section, Share, Weight

ActionKind = Literal["box", "discrete", "multi_discrete", "multi_binary"]


class AlgorithmConfig(Section):
    """What every algorithm has."""

    modes: ClassVar[tuple[Literal["sync", "async"], ...]] = ("sync", "async")  # what it can run in; the first is its default
    actions: ClassVar[tuple[ActionKind, ...]] = ("box", "discrete", "multi_discrete", "multi_binary")  # what it can choose among
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}  # keys of other sections whose defaults are others with this algorithm

    name: str
    learning_rate: PositiveFloat = Field(2.5e-4, description="of Adam")
    learning_rate_schedule: Literal["constant", "linear"] = Field("constant", description="linear: down to zero over schedule_env_steps")
    schedule_env_steps: Positive | None = Field(None, description="env steps over which schedules run to zero (default: stop.env_steps)")
    adam_epsilon: PositiveFloat = Field(1e-5, description="of Adam, for numerical stability")
    gamma: Fraction = Field(0.99, description="discount")
    max_gradient_norm: PositiveFloat = Field(0.5, description="gradients are clipped to this global norm")


class OnPolicyConfig(AlgorithmConfig):
    """What learns from what its own policy, or a recent version of it, did."""

    entropy_coefficient: Weight = Field(0.0, description="weight of the entropy bonus in the loss")
    value_coefficient: Weight = Field(0.5, description="weight of the value loss")


class PPOConfig(OnPolicyConfig):
    """Schulman et al. 2017, arXiv:1707.06347."""

    modes = ("sync",)

    name: Literal["ppo"] = "ppo"
    gae_lambda: Fraction = Field(0.95, description="lambda of generalised advantage estimation")
    epochs: Positive = Field(4, description="passes over the batch of one update")
    minibatch_size: Positive = Field(256, description="env steps of one optimizer step")
    clip_range: PositiveFloat = Field(0.2, description="epsilon of the clipped objective")
    clip_range_schedule: Literal["constant", "linear"] = Field("constant", description="linear: down to zero over schedule_env_steps")
    clip_range_value: PositiveFloat | None = Field(None, description="clip the value loss too (off by default)")
    normalise_advantage: bool = Field(True, description="to mean 0 and deviation 1, per minibatch")
    target_kl: PositiveFloat | None = Field(None, description="stop the epochs of an update once 1.5 times this is passed")


class VTraceConfig(OnPolicyConfig):
    """What the algorithms with V-trace (Espeholt et al. 2018, arXiv:1802.01561) have."""

    modes = ("async", "sync")

    vtrace: bool = Field(True, description="correct for policy lag with V-trace; without it the importance weights are 1")
    vtrace_lambda: Fraction = Field(1.0, description="lambda of V-trace's trace coefficients (Espeholt et al. 2018, remark 2)")
    clip_rho: PositiveFloat = Field(1.0, description="upper bound of the importance weight in the temporal difference")
    clip_c: PositiveFloat = Field(1.0, description="upper bound of the importance weight in the trace")


class ImpalaConfig(VTraceConfig):
    """Espeholt et al. 2018, arXiv:1802.01561."""

    name: Literal["impala"] = "impala"
    optimizer: Literal["adam", "rmsprop"] = Field("adam", description="rmsprop is what the paper used")
    minibatch_size: Positive | None = Field(None, description="env steps of one optimizer step (default: the whole batch in one)")
    normalise_advantage: bool = Field(False, description="to mean 0 and deviation 1, per minibatch")


class APPOConfig(VTraceConfig):
    """PPO's clipped objective on V-trace advantages (Luo et al. 2019, arXiv:1912.00167)."""

    name: Literal["appo"] = "appo"
    epochs: Positive = Field(4, description="passes over the batch of one update")
    minibatch_size: Positive = Field(256, description="env steps of one optimizer step")
    clip_range: PositiveFloat = Field(0.2, description="epsilon of the clipped objective")
    clip_range_schedule: Literal["constant", "linear"] = Field("constant", description="linear: down to zero over schedule_env_steps")
    normalise_advantage: bool = Field(True, description="to mean 0 and deviation 1, per minibatch")
    target_kl: PositiveFloat | None = Field(None, description="stop the epochs of an update once 1.5 times this is passed")


class OffPolicyConfig(AlgorithmConfig):
    """What learns from a replay of everything that was done; the section `replay` says from how much, and how often."""

    n_step: ClassVar[int] = 1  # default of replay.n_step
    prioritised: ClassVar[bool] = False  # default of replay.prioritised
    updates_per_step: ClassVar[float] = 1.0  # optimizer steps per env step, which replay.samples_per_insert says otherwise

    batch_size: Positive = Field(256, description="transitions of one optimizer step")


TargetTau = Annotated[
    Share | None,
    Field(description="after each optimizer step the target network goes this share of the way; none: it is copied (target_update_steps)"),
]
Exploration = Annotated[
    Literal["annealed", "ladder"],
    Field(description="share of random actions: one that falls with the env steps, or one of its own for each group (Ape-X)"),
]


class QConfig(OffPolicyConfig):
    """What the algorithms that learn action values have."""

    actions = ("discrete",)
    prioritised = True

    max_gradient_norm: PositiveFloat = Field(10.0, description="gradients are clipped to this global norm")
    double: bool = Field(True, description="the online network chooses the next action, the target network values it (arXiv:1509.06461)")
    duelling: bool = Field(True, description="state value and advantages apart (arXiv:1511.06581)")
    target_tau: TargetTau = 0.01
    target_update_steps: Positive = Field(1000, description="optimizer steps between two such copies, where target_tau is none")
    epsilon: Exploration = "annealed"
    epsilon_initial: Fraction = Field(1.0, description="annealed: at the beginning")
    epsilon_final: Fraction = Field(0.05, description="annealed: from epsilon_env_steps on")
    epsilon_env_steps: Positive = Field(10_000, description="annealed: env steps over which it falls, in a line")
    epsilon_base: Fraction = Field(0.4, description="ladder: group i of N acts with epsilon_base ^ (1 + i / (N - 1) * epsilon_exponent)")
    epsilon_exponent: Weight = Field(7.0, description="ladder: see epsilon_base")


class DQNConfig(QConfig):
    """Mnih et al. 2015, doi:10.1038/nature14236, as Rainbow improved it (arXiv:1710.02298); with async actors and the ladder of epsilons, Ape-X
    (Horgan et al. 2018, arXiv:1803.00933)."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "policy": {"activation": "relu"},
        "sampling": {"groups": 4, "group_size": 2, "rollout_length": 8},
    }
    n_step, updates_per_step = 3, 0.25

    name: Literal["dqn"] = "dqn"
    learning_rate: PositiveFloat = Field(1e-3, description="of Adam")
    batch_size: Positive = Field(128, description="transitions of one optimizer step")
    distribution: Literal["none", "c51", "quantile"] = Field(
        "none", description="learn the return's distribution: on fixed atoms (arXiv:1707.06887), or its quantiles (arXiv:1710.10044)"
    )
    atoms: Annotated[int, Field(ge=2, le=1024)] = Field(51, description="atoms or quantiles of that distribution")
    value_min: FiniteFloat = Field(-10.0, description="c51: the lowest atom, in discounted return")
    value_max: FiniteFloat = Field(10.0, description="c51: the highest atom")

    @model_validator(mode="after")
    def _atoms_in_order(self) -> DQNConfig:
        if self.value_min >= self.value_max:
            raise ValueError(f"value_min {self.value_min:g} is not below value_max {self.value_max:g}")
        return self


class R2D2Config(QConfig):
    """Kapturowski et al. 2019 (openreview.net/forum?id=r1lyTjAqYX)."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "policy": {"activation": "relu", "memory": "lstm"},
        "sampling": {"groups": 4, "group_size": 4, "rollout_length": 20},
        "replay": {"sequence_length": 40, "burn_in": 10, "alpha": 0.9, "beta": 0.6},
    }
    n_step, updates_per_step = 5, 0.05

    name: Literal["r2d2"] = "r2d2"
    learning_rate: PositiveFloat = Field(1e-3, description="of Adam")
    batch_size: Positive = Field(32, description="sequences of one optimizer step")
    target_tau: TargetTau = 0.005
    epsilon: Exploration = "ladder"
    rescaling: Weight | None = Field(
        1e-3, description="epsilon of h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x, in whose scale values are learned; none: in their own"
    )
    priority_eta: Fraction = Field(0.9, description="priority of a sequence: eta times its largest error, and (1 - eta) times its mean")


class ActorCriticConfig(OffPolicyConfig):
    """What the algorithms with an actor and two critics beside it have."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "policy": {"activation": "relu", "hidden_sizes": [256, 256]},
        "sampling": {"groups": 4, "group_size": 1, "rollout_length": 8},
    }

    adam_epsilon: PositiveFloat = Field(1e-8, description="of Adam, for numerical stability")
    max_gradient_norm: PositiveFloat = Field(1e3, description="gradients are clipped to this global norm")


class SACConfig(ActorCriticConfig):
    """Haarnoja et al. 2018, arXiv:1812.05905; for discrete actions Christodoulou 2019, arXiv:1910.07207."""

    actions = ("box", "discrete")

    name: Literal["sac"] = "sac"
    learning_rate: PositiveFloat = Field(3e-4, description="of Adam: policy, critics and temperature")
    critic_learning_rate: PositiveFloat | None = Field(None, description="of the critics, where it is another one")
    target_tau: Share = Field(0.005, description="after each optimizer step the target critics go this share of the way")
    temperature: Weight | None = Field(None, description="weight of the entropy; default: learned, so that the entropy is target_entropy")
    target_entropy: FiniteFloat | None = Field(
        None, description="nats that the learned temperature aims at (default: -1 per action dimension; discrete: 0.3 log A)"
    )


class TD3Config(ActorCriticConfig):
    """Fujimoto et al. 2018, arXiv:1802.09477."""

    actions = ("box",)

    name: Literal["td3"] = "td3"
    learning_rate: PositiveFloat = Field(1e-3, description="of Adam: policy and critics")
    target_tau: Share = Field(0.005, description="after each update of the policy the target networks go this share of the way")
    policy_delay: Positive = Field(2, description="optimizer steps of the critics for one of the policy")
    exploration_noise: Weight = Field(0.1, description="deviation of the noise on actions that are played, in -1..1")
    target_noise: Weight = Field(0.2, description="deviation of the noise on the target policy's actions")
    target_noise_clip: Weight = Field(0.5, description="that noise is clipped to this")


class CustomConfig(AlgorithmConfig):
    """An algorithm of the user's own, by import path; its own keys are checked by its own Config."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, populate_by_name=True)


BUILT_IN: dict[str, type[AlgorithmConfig]] = {
    "ppo": PPOConfig,
    "impala": ImpalaConfig,
    "appo": APPOConfig,
    "dqn": DQNConfig,
    "r2d2": R2D2Config,
    "sac": SACConfig,
    "td3": TD3Config,
}
