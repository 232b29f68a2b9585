"""Trained policies outside of training: the bundle that holds one, and how good it is."""

from shoal.evaluation.bundle import LoadedPolicy, load_policy, save_bundle
from shoal.evaluation.evaluate import evaluate

__all__ = ["LoadedPolicy", "evaluate", "load_policy", "save_bundle"]
