"""Actors: they host environment groups, ask a behaviour for actions and fill rollouts."""
