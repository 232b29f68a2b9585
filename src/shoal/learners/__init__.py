"""Learners: they turn rollouts into updates and publish weights."""
