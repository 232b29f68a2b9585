"""Files of a run: checkpoints that are whole or not there, and text that is replaced in one step.

A checkpoint is a directory `update-000000123` of safetensors and JSON files (`write_arrays`, `write_json`, or written into
`Staging.path` by another process) and a `manifest.json` with the size and SHA-256 of each. It is made aside, every file and
directory is fsynced, it is renamed, and the parent is fsynced: a kill at any instant leaves the old ones as they were.
An update that is saved a second time becomes `update-000000123.1`, so there is no instant without a whole one; the newest
revision counts and `sweep` removes the others.

Nothing here is ever unpickled. Ground floor: numpy, no torch. `arrays` and `durable` write files, `manifest` and `names` say what a checkpoint is,
`owner` whose it is, `staging` makes one, `checkpoints` finds and reads them.
"""

from __future__ import annotations

from shoal.files.arrays import arrays_from_bytes, to_json, write_arrays
from shoal.files.checkpoints import CheckpointDirectory, Loaded, load_checkpoint, whole_state
from shoal.files.durable import write_text_atomically
from shoal.files.manifest import FORMAT, MANIFEST, ForeignError, TornError, parse_manifest, passed_over, verify_file, way_out
from shoal.files.names import REPLAY, checkpoint_name, checkpoint_place, everything, without_replay
from shoal.files.owner import FACTS, run_named
from shoal.files.staging import Staging

__all__ = [
    "FACTS",
    "FORMAT",
    "MANIFEST",
    "REPLAY",
    "CheckpointDirectory",
    "ForeignError",
    "Loaded",
    "Staging",
    "TornError",
    "arrays_from_bytes",
    "checkpoint_name",
    "checkpoint_place",
    "everything",
    "load_checkpoint",
    "parse_manifest",
    "passed_over",
    "run_named",
    "to_json",
    "verify_file",
    "way_out",
    "whole_state",
    "without_replay",
    "write_arrays",
    "write_text_atomically",
]
