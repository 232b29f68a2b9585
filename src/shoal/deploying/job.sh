#!/bin/sh
# KubeRay repeats a job that failed (backoffLimit). What ended with 2 (configuration), 3 (a fault of the environment), 4 (diverged) or 130 (told to end) would
# end so again: such a job is stopped, which KubeRay does not repeat. Its log has the message and the code.
trap : TERM # the training gets it too, and ends with a last checkpoint
code=0
sh /etc/shoal/run.sh || code=$?
case $code in
    2 | 3 | 4 | 130)
        echo "ended with $code: not repeated"
        job=$(printenv RAY_JOB_CONFIG_JSON_ENV_VAR | sed -n 's/.*"job_submission_id": *"\([^"]*\)".*/\1/p')
        ray job stop --address http://127.0.0.1:8265 --no-wait "$job" && sleep 60
        ;;
esac
exit "$code"
