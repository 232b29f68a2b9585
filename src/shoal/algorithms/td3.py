"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv:1802.09477). Legend: M rows, A action dimensions, K = 2 critics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.algorithms.base import Optimizer, UpdateContext, schedule
from shoal.algorithms.off_policy import Metrics, OffPolicyAlgorithm, Target, Transitions
from shoal.algorithms.sac import critic_loss
from shoal.config import PolicyConfig, TD3Config
from shoal.networks.acting import NetworkKind
from shoal.networks.off_policy import Critics, DeterministicPolicy, build_critics
from shoal.types import EnvironmentSpec


def smoothed(action: Tensor, noise: Tensor, deviation: float, clip: float) -> Tensor:
    """The target policy's action [M, A] in -1..1, with clipped noise (standard normal [M, A]) upon it (section 5.3)."""
    return (action + (deviation * noise).clamp(-clip, clip)).clamp(-1.0, 1.0)


class TD3(OffPolicyAlgorithm[TD3Config]):
    """The policy on the board is the actor; the critics and both target networks are the algorithm's state."""

    Config = TD3Config
    shares = True
    policy: DeterministicPolicy

    def __init__(self, policy: DeterministicPolicy, config: TD3Config, critics: Critics) -> None:
        super().__init__(policy, config)
        self.critics = critics
        self.target_critics, self.target_policy = Target(critics), Target(policy)
        self.actor_optimizer = Optimizer.of(policy, config)
        self.critic_optimizer = Optimizer.of(critics, config)

    @classmethod
    def make(cls, policy: DeterministicPolicy, config: TD3Config, spec: EnvironmentSpec, networks: PolicyConfig, seed: int) -> TD3:
        return cls(policy, config, build_critics(spec, networks, policy, seed))

    @classmethod
    def network(cls, config: TD3Config) -> NetworkKind:
        return NetworkKind("deterministic", {"exploration_noise": config.exploration_noise})

    @torch.no_grad()
    def learn(self, rows: Transitions, context: UpdateContext) -> tuple[Metrics, Tensor | None]:
        config, policy, critics, num = self.config, self.policy, self.critics, len(rows)
        rate = schedule(config.learning_rate, config.learning_rate_schedule, context.progress)
        now, later = policy.inputs.forward(rows.observation), policy.inputs.forward(rows.next_observation)
        found: dict[Tensor, Tensor] = {}
        noise = self.noise(context, num, policy.size).to(rows.return_M.device)
        raw = torch.tanh(self.target_policy.module.trunk.forward(later))
        next_action = smoothed(raw, noise, config.target_noise, config.target_noise_clip)
        next_value = self.target_critics.module.layers(later, next_action)[1][-1].squeeze(2).amin(0)
        target_M = torch.addcmul(rows.return_M, rows.discount_M, next_value)
        features, outputs = critics.layers(now, rows.action.view(num, -1))
        loss, gradient, priority_M = critic_loss(outputs[-1].squeeze(2), target_M, rows.weight_M)
        critics.backward(gradient.unsqueeze(2), features, outputs, found)
        refused = self.critic_optimizer.skipped
        grad_norm = self.critic_optimizer.descend([found[p] for p in self.critic_optimizer.parameters], rate, loss)
        metrics: Metrics = {"critic_loss": loss, "grad_norm": grad_norm, "q_mean": outputs[-1].mean(), "learning_rate": rate}
        if self.critic_optimizer.skipped > refused:  # nobody learns from values that are not to be trusted
            return metrics, priority_M
        if self.critic_optimizer.steps % config.policy_delay == 0:
            metrics["actor_loss"] = self._improve(now, num, rate, found)
            self.target_critics.follow(self.critic_optimizer.flat, config.target_tau)
            self.target_policy.follow(self.actor_optimizer.flat, config.target_tau)
        return metrics, priority_M

    def _improve(self, now: Mapping[str, Tensor], num: int, rate: float, found: dict[Tensor, Tensor]) -> Tensor:
        """One step of the policy up the first critic's value (eq. 2)."""
        output, backward = self.policy.trunk.trace(now)
        action = torch.tanh(output)
        outputs = self.critics.layers(now, action)[1]
        slope = torch.zeros_like(outputs[-1])
        slope[0] = -1.0 / num
        backward(self.critics.action_gradient(slope, outputs) * (1.0 - action.square()), found)
        loss = -outputs[-1][0].mean()
        self.actor_optimizer.descend([found[p] for p in self.actor_optimizer.parameters], rate, loss)
        return loss

    def optimizers(self) -> dict[str, Optimizer]:
        return {"critics/": self.critic_optimizer, "actor/": self.actor_optimizer}

    def vectors(self) -> dict[str, Tensor]:
        targets = {"target/critics": self.target_critics.flat, "target/policy": self.target_policy.flat}
        return {"critics/flat": self.critic_optimizer.flat, **targets}
