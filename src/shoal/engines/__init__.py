"""Engines: they place roles, lease slots and move bytes, and never look inside a rollout's contents."""
