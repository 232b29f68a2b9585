"""A larger network for images: the deep residual one of IMPALA (Espeholt et al. 2018, arXiv:1802.01561, figure 3, right), by default as wide as there.

    shoal train ALE/Pong-v5 --policy.network examples/residual_cnn.py:ResidualCNN
    shoal train ALE/Pong-v5 --policy.network examples/residual_cnn.py:wide

It costs twenty times what the Nature CNN costs: take it where there is a GPU.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions around which the input goes, too."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, value):
        return value + self.second(functional.relu(self.first(functional.relu(value))))


class ResidualCNN(nn.Module):
    """[N, C, H, W] between 0 and 1 -> [N, 256]: three times a convolution, a pooling that halves the sides, and two residual blocks."""

    def __init__(self, spec, config, widths=(16, 32, 32)):
        super().__init__()
        shape = spec.observation[0].shape  # of one image: channels first, as stacked Atari frames are
        channels, side = shape[0], list(shape[1:])
        stages = []
        for width in widths:
            stages += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1), Block(width), Block(width)]
            channels, side = width, [(pixels + 1) // 2 for pixels in side]
        self.stages = nn.Sequential(*stages)
        self.out = nn.Linear(channels * side[0] * side[1], 256)
        self.num_features = 256

    def forward(self, observation):
        features = functional.relu(self.stages(observation["observation"]))
        return torch.relu(self.out(features.flatten(1)))


wide = partial(ResidualCNN, widths=(64, 128, 128))

if __name__ == "__main__":
    import shoal

    run = shoal.train("ALE/Pong-v5", policy={"network": ResidualCNN}, sampling={"rollout_length": 8}, stop={"updates": 1}, actors=1)
    print(run.policy().network.actor.num_features)
