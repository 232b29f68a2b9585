"""The configuration of a run: one tree of pydantic models, from which names, defaults, help and validation all come.

Every key has a dotted name (`algorithm.learning_rate`; on the command line `--algorithm.learning-rate`). Resolution, lowest
first: defaults here, the preset of a known environment, a YAML file, the command line or keyword arguments.
No torch here: the command line and the supervisor import this file.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
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


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, `a-b` on the command line is `a_b` here."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, populate_by_name=True)


class EnvConfig(Section):
    """Which environment, in which form, and what it is allowed."""

    id: str = Field("", description="Gymnasium id, package.module:factory, file.py:factory, or an Atari id such as ALE/Pong-v5")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the environment's factory, such as --env.kwargs.gravity -3"
    )
    form: Literal["auto", "python", "native", "threads"] = Field(
        "auto",
        description="step one by one, by the environment's own vector form, or in threads (for environments that wait); auto measures",
    )
    max_episode_steps: Positive | None = Field(
        None, description="truncate episodes here (default: what the environment's registration says)"
    )
    atari_preprocessing: bool = Field(
        True,
        description="Atari ids: 84x84 grey, 4 frames stacked, frame skip 4, no-op starts, life loss ends an episode in training, signs of rewards",
    )
    step_timeout_seconds: PositiveFloat = Field(60.0, description="a step or reset that takes longer is a fault")
    restart_budget: Annotated[int, Field(ge=0)] = Field(
        10,
        description="faults of the environment that are mended by a restart before the run ends with code 3; an episode that always breaks costs two",
    )


class SamplingConfig(Section):
    """How much is made at once: groups, environments of each, rows of a rollout."""

    groups: Positive | None = Field(
        None, description="environment groups; what they produce does not depend on the number of actors (default: 4)"
    )
    group_size: Positive | None = Field(None, description="environments of a group, which share one inference call (default: 8)")
    rollout_length: Positive = Field(128, description="steps of a rollout")
    batch_rollouts: Positive | None = Field(None, description="async: rollouts of one update (default: as many as there are groups)")


class PolicyConfig(Section):
    """The network, its exploration and normalisation, and where its actions are chosen."""

    hidden_sizes: list[Positive] = Field(default_factory=lambda: [64, 64], description="hidden layers of the actor's and the critic's MLP")
    activation: Literal["tanh", "relu", "elu", "silu"] = Field("tanh", description="between hidden layers")
    encoder: Literal["auto", "mlp", "nature_cnn", "compact_cnn"] = Field(
        "auto",
        description="auto: Nature CNN for uint8 images, MLP for the rest, combined for Dict; compact_cnn: a third of the Nature CNN's cost",
    )
    share_encoder: bool | None = Field(None, description="actor and critic share the encoder (default: for images, and with a memory)")
    memory: Literal["none", "lstm", "gru"] = Field(
        "none",
        description="what is remembered of an episode's earlier steps, between the encoder (which actor and critic then share) and the heads",
    )
    memory_size: Positive = Field(64, description="units of the memory")
    normalise_observations: bool = Field(False, description="running mean and variance of every non-image observation")
    normalise_rewards: bool = Field(False, description="divide rewards by the running deviation of the discounted return")
    exploration: Literal["gaussian", "gsde"] = Field(
        "gaussian", description="continuous actions: independent noise, or state-dependent (Raffin et al. 2020)"
    )
    log_std_init: FiniteFloat = Field(0.0, description="continuous actions: logarithm of the initial standard deviation")
    orthogonal_init: bool = Field(True, description="orthogonal initial weights, with small ones at the policy's head")
    inference: Literal["auto", "actor", "server"] = Field(
        "auto",
        description="who chooses actions: each actor on the processor, or one process on the learner's device for all of them; "
        "auto: a server where that device is a GPU and the network is large (images, or a million weights)",
    )
    network: str | None = Field(
        None,
        description="your own: package.module:factory or file.py:factory, called with (spec, config), returns a torch module; "
        "of sac and td3 it is the actor's, their critics stay as they are",
    )


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


class StopConfig(Section):
    """Conditions of which the first that is met ends the run."""

    return_: FiniteFloat | None = Field(None, alias="return", description="mean return of the last 100 training episodes")
    env_steps: Positive | None = Field(None, description="environment steps trained")
    updates: Positive | None = Field(None, description="policy versions made")
    seconds: PositiveFloat | None = Field(None, description="seconds since the first environment step")


class LearnerConfig(Section):
    """How the learner computes, and how long an update may take."""

    threads: Annotated[int, Field(gt=0, le=256)] = Field(1, description="torch threads; part of what the bits of a run depend on")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the encoders while learning; weights, optimizer, log-probabilities and losses are float32 with either"
    )
    compile: bool = Field(
        False, description="torch.compile for the learner's policy; needs a C++ compiler, and up to half a minute at each start"
    )
    timeout_seconds: PositiveFloat = Field(600.0, description="an update that takes longer is a hang: the learner is made anew")


class ReplayConfig(Section):
    """The experience replay of off-policy algorithms (experience/replay.py)."""

    capacity_steps: Positive = Field(100_000, description="env steps that it holds at most, divided evenly over all environments")
    capacity_bytes: Positive | None = Field(None, description="memory that it takes at most; fewer steps are held where they do not fit")
    prioritised: bool | None = Field(
        None, description="sample in proportion to priorities (Schaul et al. 2016) instead of uniformly (default: the algorithm's)"
    )
    alpha: Fraction = Field(0.6, description="exponent of priorities; 0 is uniform")
    beta: Fraction = Field(0.4, description="exponent of importance weights at the start; rises to 1 over algorithm.schedule_env_steps")
    n_step: Positive | None = Field(None, description="steps of a return before it bootstraps (default: the algorithm's)")
    samples_per_insert: PositiveFloat | None = Field(
        None, description="how often each env step is sampled on average (default: the algorithm's)"
    )
    tolerance: PositiveFloat = Field(
        2.0,
        description="async: batches by which inserting may run ahead of sampling (one at least), or fall behind, before one waits for the other; "
        "rollouts that wait take memory",
    )
    learning_starts: Annotated[int, Field(ge=0)] = Field(1_000, description="env steps that are inserted before the first is sampled")
    shards: Positive = Field(
        1,
        description="parts that the groups are spread over in memory, which changes nothing but where arrays lie; each of several learners has one",
    )
    sequence_length: Positive | None = Field(
        None,
        description="rows of a sampled sequence, burn-in included (default: the algorithm's); one begins with every rollout, so it shares "
        "sequence_length - sampling.rollout_length rows with the next",
    )
    burn_in: Annotated[int, Field(ge=0)] = Field(
        0, description="first rows of a sequence, which warm the recurrent state up and are not trained"
    )

    @property
    def trained_rows(self) -> int:
        """Of what is drawn at a time: a step, or the rows of a sequence behind its burn-in."""
        return 1 if self.sequence_length is None else max(1, self.sequence_length - self.burn_in)


class EvaluationConfig(Section):
    """What the final policy plays at the end of the run."""

    episodes: Annotated[int, Field(ge=0)] = Field(
        0, description="episodes that the final policy plays when a stop condition has ended the run, as `shoal evaluate` does; 0: none"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="names the seeds of those episodes")


class CheckpointConfig(Section):
    """When checkpoints are made, and how many are kept."""

    every_seconds: PositiveFloat | None = Field(30.0, description="wall time between checkpoints")
    every_updates: Positive | None = Field(None, description="updates between checkpoints, besides those by time")
    keep: Annotated[int, Field(ge=2)] = Field(3, description="newest checkpoints kept")
    replay: bool = Field(True, description="save the replay too; without it a resumed run fills it anew, and ends with other weights")


class RayConfig(Section):
    """Where `engine: ray` places a run."""

    address: str | None = Field(None, description="of the cluster: auto, HOST:PORT or ray://HOST:PORT (default: a local one is started)")
    nodes: Positive | None = Field(None, description="nodes that host actors (default: all that the cluster has)")
    actors_per_node: Positive | None = Field(None, description="processes that host environments on each node (default: one per CPU)")
    allow_insecure_cluster: bool = Field(
        False, description="join a cluster without a token: whoever reaches its ports can run any code on it (CVE-2023-48022)"
    )
    learners_on: Literal["driver", "nodes"] = Field(
        "driver",
        description="where several learners are: all where the command runs, or each but the first on a node of its own (ppo, appo, impala)",
    )
    allow_plain_learners: bool = Field(
        False, description="let learners on nodes of a cluster with TLS add up without: whoever is on their network can read and change it"
    )


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
