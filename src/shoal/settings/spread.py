"""What several learners on the nodes of a cluster ask of it: a training is refused without, and its deployment before that, with the same words."""

from __future__ import annotations

from shoal.config import RunConfig
from shoal.errors import ConfigError

_PLAIN = "what learners on nodes tell each other, the policy and its gradients, is neither encrypted nor authenticated (gloo)"


def check_spread(config: RunConfig, *, others: int, tls: bool) -> str:
    """Of a configuration whose learners are on nodes: what to warn of before they are.

    Args:
      others: nodes besides the driver's own. tls: the cluster encrypts what it sends.
    Raises:
      ConfigError: there are too few nodes, or the cluster has TLS and nobody allowed to go without.
    """
    if others < config.learners - 1:
        raise ConfigError(
            f"ray.learners_on: the first of {config.learners} learners is on the driver's machine and each other one has a node to itself, and besides "
            f"that machine the run has {others} nodes (--address, --nodes); add machines, or give --learners {others + 1} or --learners-on driver"
        )
    if tls and not config.ray.allow_plain_learners:
        raise ConfigError(
            f"ray.learners_on: this cluster has TLS (RAY_USE_TLS), and {_PLAIN}; give --allow-plain-learners on a network that is yours alone, "
            "or --learners-on driver"
        )
    return f"{_PLAIN}: whoever is on the network between them can read and change it"
