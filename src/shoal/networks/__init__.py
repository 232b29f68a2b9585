"""Policies as torch modules: from observations by field name to a distribution over actions and a value.

    inputs.py     raw observation fields -> float tensors (one-hot, images to [C, H, W] / 255, running normalisation)
    encoders.py   float tensors -> features (MLP, Nature CNN, both combined)
    evaluation.py log-probability, entropy, value, and the gradient of a loss of them
    computing.py  mixed precision and torch.compile, for learners
    fast.py       a small policy's acting in numpy
    memory.py     LSTM and GRU, stepped and unrolled
    recurrent.py  policies with one
    recurrent_q.py  action values with one
    policy.py     Policy = inputs + encoders + heads; `build_policy`, `named_tensors`, `weights_sha256`

A network of your own replaces the encoders: a callable `(spec, config) -> nn.Module` whose forward takes the prepared observation
(by field name: [N, size] float32 for vectors and one-hot choices, [N, C, H, W] in 0..1 for images) and returns features [N, D], with D as its
attribute `num_features`. The memory, where `policy.memory` asks for one, and heads for the action and the value are put on top:

    class Trunk(nn.Module):
        num_features = 32

        def __init__(self, spec, config):
            super().__init__()
            self.layer = nn.Linear(spec.observation[0].size, 32)

        def forward(self, observation):
            return torch.relu(self.layer(observation["observation"]))

    shoal.train("CartPole-v1", policy={"network": "trunk.py:Trunk"})

A callable that returns a `Policy` (a subclass with its own `distribution` and `value`, say) is taken as it is.
"""
