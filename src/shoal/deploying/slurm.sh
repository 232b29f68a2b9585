#!/bin/bash
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{cpus}}
#SBATCH --mem={{memory_gib}}G
#SBATCH --gpus-per-node={{gpus}}
#SBATCH --partition={{partition}}
#SBATCH --time={{time}}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={{name}}-%j.log
#SBATCH --signal=B:USR1@180

# A training on the nodes of one job, as a Ray cluster of its own. The job begins the run, or goes on with it where it exists: after a requeue, and when this
# script is submitted again. Three minutes before its time is over it saves and requeues itself; where it is preempted, or loses a node, Slurm requeues it. One that
# ended by itself is not repeated, whatever its code: it would end so again with 2 (configuration), 3 (a fault of the environment) and 4 (diverged); after 1, submit it again.
# `shoal` and `ray` must be on PATH on every node, with the package cryptography: load modules or activate an environment here.

set -euo pipefail
name={{name}}
runs="{{runs}}"  # shared by all nodes
run={{run}}
export SHOAL_SECRETS=$runs/.$name-$SLURM_JOB_ID

mkdir -p "$runs"
config=$runs/$name.yaml
cat > "$config" <<'END_OF_CONFIGURATION'
{{settings}}
END_OF_CONFIGURATION

# ---- the end: by itself, by Slurm's notice (USR1: the time is nearly over; TERM: preempted or cancelled), or by a failure
steps=()
driver=
notice=
interrupted=
# shellcheck disable=SC2329 # traps call it
noticed() {
    notice=$1
    interrupted=yes
    echo "$name: notice from Slurm ($1)"
    if [ -n "$driver" ]; then
        kill -TERM "$driver" 2>/dev/null || true # shoal ends with a checkpoint and 130
    else
        exit 130
    fi
}
# shellcheck disable=SC2329 # as above
clean() {
    for step in ${steps[@]+"${steps[@]}"}; do
        kill "$step" 2>/dev/null || true
    done
    rm -rf "$SHOAL_SECRETS"
}
trap clean EXIT
trap 'noticed time' USR1
trap 'noticed stop' TERM

# ---- secrets of this attempt: a token, an authority, and a certificate for each node, readable by you alone
rm -rf "$SHOAL_SECRETS"
shoal deploy secrets "$SHOAL_SECRETS" > /dev/null
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$SHOAL_SECRETS/token
export RAY_worker_niceness=0 # actors are no nicer than a learner beside them
export RAY_USE_TLS=1 RAY_TLS_CA_CERT=$SHOAL_SECRETS/ca.crt
export RAY_TLS_SERVER_CERT=$SHOAL_SECRETS/driver/tls.crt RAY_TLS_SERVER_KEY=$SHOAL_SECRETS/driver/tls.key
shoal deploy certificate "$SHOAL_SECRETS" --out "$SHOAL_SECRETS/driver" > /dev/null

# ---- the cluster: this node, which is the job's first, is its head. Ports come from the job's number, since jobs may share a node
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
head_address=${SHOAL_HEAD_ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
port=$((20000 + SLURM_JOB_ID % 10000))
# shellcheck disable=SC2016 # these are the variables of each node
node='
set -eu
own=$SHOAL_SECRETS/$(hostname)
shoal deploy certificate "$SHOAL_SECRETS" --out "$own" > /dev/null
export RAY_TLS_SERVER_CERT=$own/tls.crt RAY_TLS_SERVER_KEY=$own/tls.key
unset RAY_ADDRESS
exec ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK" --min-worker-port=0 --max-worker-port=0 "$@"
'
srun --nodes=1 --ntasks=1 --nodelist="$head" --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "$node" node \
    --head --node-ip-address="$head_address" --port="$port" --ray-client-server-port="$((port + 10000))" --include-dashboard=false &
steps+=("$!")
export RAY_ADDRESS=$head_address:$port
ready=
for _ in $(seq 60); do
    if ray health-check --address "$RAY_ADDRESS" > /dev/null 2>&1; then
        ready=yes
        break
    fi
    sleep 2
done
if [ -z "$ready" ]; then
    echo "$name: no Ray head at $RAY_ADDRESS; if nodes reach each other by another address, set SHOAL_HEAD_ADDRESS" >&2
    exit 1
fi
workers=$((SLURM_JOB_NUM_NODES - 1))
if [ "$workers" -gt 0 ]; then
    srun --nodes="$workers" --ntasks="$workers" --exclude="$head" --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "$node" node --address="$RAY_ADDRESS" &
    steps+=("$!")
fi

# ---- the run
if {{exists}}; then
    shoal resume "$run" --view lines &
else
    shoal train "$config" --run-dir "$run" {{options}} --nodes "$SLURM_JOB_NUM_NODES" --view lines &
fi
driver=$!
code=0
wait "$driver" || code=$?
while [ -n "$interrupted" ]; do # it was a notice that ended the wait
    interrupted=
    again=0
    wait "$driver" 2>/dev/null || again=$?
    if [ "$again" -ne 127 ]; then # 127: the wait before had its code already
        code=$again
    fi
done
if [ "$notice" = time ] && [ "$code" -eq 130 ]; then
    echo "$name: saved; goes on in the same job when there is room"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
