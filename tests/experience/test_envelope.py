"""The envelope: values that are written to files never change."""

from __future__ import annotations

import numpy as np

from shoal.experience.envelope import ENVELOPE, REMADE, Fate, Identity, Source


def test_fates_are_a_closed_list_with_fixed_numbers():
    assert {fate.label: fate.value for fate in Fate} == {
        "in_flight": 0,
        "trained": 1,
        "actor_died": 2,
        "over_lag": 3,
        "invalid": 4,
        "superseded": 5,
        "rolled_back": 6,
        "shutdown": 7,
        "environment_fault": 8,
        "replayed": 9,
    }
    assert {source.name: source.value for source in Source} == {"STEPPED": 0, "CLIENT": 1}


def test_a_sequence_stays_open_after_exactly_these_fates():
    assert {fate.label for fate in REMADE} == {"actor_died", "rolled_back", "superseded", "shutdown", "environment_fault"}


def test_the_envelope_has_exactly_these_fields_on_their_natural_alignment():
    names = ENVELOPE.names
    assert names is not None
    found = {name: ENVELOPE.fields[name][0].str.lstrip("<|=") for name in names}
    assert found == {
        "schema_hash": "V16", "run_id": "V16", "policy_id": "u4", "group": "u4", "sequence": "u8", "attempt": "u4", "actor": "u4",
        "incarnation": "u4", "source": "u1", "paced": "b1", "fate": "u1", "num_rows": "i4", "num_env_steps": "i8", "num_episodes": "i4", "num_finals": "i4",
        "version_min": "i8", "version_max": "i8", "stream_epoch": "i8", "checksum": "u4", "begun_ns": "i8", "finished_ns": "i8",
        "received_ns": "i8", "consumed_ns": "i8", "num_agents": "u4", "member": "u4", "behaviour_id": "i8",
    }  # fmt: skip
    for name in names:
        dtype, offset = ENVELOPE.fields[name][:2]
        assert offset % dtype.alignment == 0
    assert ENVELOPE.isalignedstruct


def test_an_identity_is_group_sequence_attempt():
    assert Identity(1, 2, 3)._asdict() == {"group": 1, "sequence": 2, "attempt": 3}
    assert np.zeros((), ENVELOPE).nbytes == ENVELOPE.itemsize
