"""An algorithm of your own: a class with an `update`, and a Config where it has settings. This one is A2C (Mnih et al. 2016).

A batch holds [T, N] tensors: T rows, N environments side by side. The helpers take care of episodes' ends, true last observations and rows
that are not valid. An update must be a function of the batch, the policy and `context`: draw only from `context.rng`.
"""

import shoal
from shoal.algorithms.base import Algorithm, cut_TN, discount_TN, minibatches, values_TN
from shoal.config import OnPolicyConfig
from shoal.ops.gae import gae


class A2CConfig(OnPolicyConfig):
    gae_lambda: float = 1.0


class A2C(Algorithm[A2CConfig]):
    Config = A2CConfig
    modes = ("sync",)

    def update(self, batch, context):
        config = self.config
        value_TN, next_value_TN = values_TN(self.policy, batch)
        returns = gae(value_TN, next_value_TN, batch.reward_TN, discount_TN(batch, config.gamma), cut_TN(batch), lambda_=config.gae_lambda)
        columns = {"advantage": returns.advantage_TB, "target": returns.target_TB}
        for rows in minibatches(batch, None, context.rng, **columns):  # None: the whole batch at once
            distribution, value = self.policy.distribution_and_value(rows.observation, rows.action_mask)
            policy_loss = -(distribution.log_prob(rows.action) * rows["advantage"]).mean()
            value_loss = (value - rows["target"]).square().mean()
            self.optimizer.step(policy_loss + config.value_coefficient * value_loss, config.learning_rate)
        return {"policy_gradient_loss": policy_loss.item(), "value_loss": value_loss.item()}


if __name__ == "__main__":  # so that it can be named, too: --algorithm own_algorithm.py:A2C
    run = shoal.train(
        "CartPole-v1",
        algorithm={"name": A2C, "gae_lambda": 0.95, "learning_rate": 1e-3},
        sampling={"rollout_length": 16},
        stop={"updates": 20},
        actors=2,
    )
    print(run.result["updates"], "updates, mean return", run.result["mean_return"])
