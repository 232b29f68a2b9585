"""A network of your own: a callable (spec, config) that returns a module from prepared observations to features [N, num_features].

Observations come by field name (`observation`, or `observation/KEY` for a Dict), float32, one row for each environment. Heads for action and
value are put on top. It must hold float32 parameters only, and no random numbers or running statistics of its own.
"""

import torch
from torch import nn

import shoal


class ResidualTrunk(nn.Module):
    """Two layers around which the input goes, too."""

    def __init__(self, spec, config):
        super().__init__()
        self.num_features = 32
        self.first = nn.Linear(spec.observation[0].size, self.num_features)
        self.second = nn.Linear(self.num_features, self.num_features)

    def forward(self, observation):
        hidden = torch.relu(self.first(observation["observation"]))
        return hidden + torch.relu(self.second(hidden))


if __name__ == "__main__":  # so that it can be named, too: --policy.network own_network.py:ResidualTrunk
    run = shoal.train("CartPole-v1", policy={"network": ResidualTrunk}, stop={"updates": 4}, actors=2)
    print(run.policy().network.actor)
