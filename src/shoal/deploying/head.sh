#!/bin/bash
# A Ray head, and the training on it. Whatever failed is tried again, on a new head, five times at most, but for what would end so again: 2 (configuration),
# 3 (a fault of the environment), 4 (diverged); and 130, which it was told to.
driver=
stopped=
# shellcheck disable=SC2329 # a trap calls it
stop() {
    stopped=yes
    [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null # shoal ends with a checkpoint and 130
}
trap stop TERM INT
for attempt in 0 1 2 3 4 5; do
    [ "$attempt" = 0 ] || ray stop --force > /dev/null
    code=1
    if ray start --head --port=6379 --num-cpus={{cpus}} --disable-usage-stats; then
        sh /etc/shoal/run.sh &
        driver=$!
        code=0
        wait "$driver" || code=$?
        while kill -0 "$driver" 2> /dev/null; do # it was a signal that ended the wait
            code=0
            wait "$driver" || code=$?
        done
        driver=
    fi
    case $code in 0 | 2 | 3 | 4 | 130) exit "$code" ;; esac
    [ -z "$stopped" ] || exit "$code"
    echo "ended with $code: tried again"
done
exit "$code"
