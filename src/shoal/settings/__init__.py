"""From what the user wrote to one complete `RunConfig`: layers, their order, and messages that say what was meant.

Lowest first: the defaults of the models, those that the algorithm has of other sections, the preset of a known environment, a YAML file, what was given by hand. Naming another
algorithm drops the keys of the one below it, and the mode that went with it; giving a stop condition drops those of the preset.
No torch here: the command line and the supervisor import this file.

`layers` reads what was written, `resolving` puts it together, `completing` fills what follows from other keys, `idle` refuses those without an effect,
`text` is the YAML of it all; `secret_names` knows what had better not be written down; `spread` is what learners on nodes ask of a cluster.
"""

from __future__ import annotations

from shoal.imports import load_object, nearest, object_path
from shoal.settings.completing import NO_REPLAY_ON_NODES, WAITING_ACTORS_PER_CORE, adapt_actors, available_cores
from shoal.settings.layers import PRESETS, preset_names, preset_words
from shoal.settings.resolving import file_settings, load_config, resolve
from shoal.settings.secret_names import named_secrets
from shoal.settings.spread import check_spread
from shoal.settings.text import Raw, dump_config, dump_tree, read_yaml

__all__ = [
    "NO_REPLAY_ON_NODES",
    "PRESETS",
    "WAITING_ACTORS_PER_CORE",
    "Raw",
    "adapt_actors",
    "available_cores",
    "check_spread",
    "dump_config",
    "dump_tree",
    "file_settings",
    "load_config",
    "load_object",
    "named_secrets",
    "nearest",
    "object_path",
    "preset_names",
    "preset_words",
    "read_yaml",
    "resolve",
]
