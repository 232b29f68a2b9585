#!/bin/sh
# Trains, or goes on with the run that an attempt before this one began.
set -eu
run={{run}}
if {{exists}}; then
    exec shoal resume "$run" --view lines
fi
exec shoal train /etc/shoal/config.yaml --run-dir "$run" {{options}} --view lines
