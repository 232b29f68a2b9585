"""Gymnasium and friends behind one interface: the environment group."""

from shoal.environments.checks import CheckReport, Finding, check_environment
from shoal.environments.make import environment_factory, environment_spec, make_group
from shoal.environments.probe import Probe, choose_form, probe

__all__ = [
    "CheckReport",
    "Finding",
    "Probe",
    "check_environment",
    "choose_form",
    "environment_factory",
    "environment_spec",
    "make_group",
    "probe",
]
