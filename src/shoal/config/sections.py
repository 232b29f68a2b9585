"""The sections of the configuration, but for that of the algorithm."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from shoal.config.base import FiniteFloat, Fraction, Positive, PositiveFloat, Section


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
