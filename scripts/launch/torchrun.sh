#!/usr/bin/env bash
# Pretraining by torchrun, on one machine or on several that ssh reaches:
#   scripts/launch/torchrun.sh RECIPE SHARDS RUN [--key value ...]
#   HOSTS="node1 node2" scripts/launch/torchrun.sh RECIPE SHARDS RUN [--key value ...]
# All hosts see this folder, the environment and the shards under the same paths. PROCESSES=2 overrides a process per GPU,
# PORT=29400 where the first host's processes meet. When a process dies, torchrun starts all of them again, three times at
# the most, and they go on from the last checkpoint.
set -euo pipefail

usage='usage: [HOSTS="node1 node2"] scripts/launch/torchrun.sh RECIPE SHARDS RUN [--key value ...]'
recipe=${1:?$usage} shards=${2:?$usage} run=${3:?$usage}
shift 3
read -ra hosts <<< "${HOSTS:-}"
nodes=$((${#hosts[@]} ? ${#hosts[@]} : 1))
processes=${PROCESSES:-$(nvidia-smi -L | wc -l)}

if ((${#hosts[@]})); then
    meeting=(--nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:${PORT:-29400}" --rdzv-id="$run")
else
    meeting=(--standalone)
fi
# --no-python: the processes are the scfm on PATH, of the same environment as torchrun
command=(
    torchrun "${meeting[@]}" --nproc-per-node="$processes" --max-restarts=3 --no-python
    scfm pretrain --config "$recipe" --data.shards "$shards" --out "$run"
    --trainer.devices "$processes" --trainer.num_nodes "$nodes" "$@" --resume auto
)
((${#hosts[@]})) || exec "${command[@]}"

# without the variable, processes that are started again would read where those before them met
printf -v remote 'cd %q && exec env PATH=%q TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ' "$PWD" "$PATH"
remote+=$(printf '%q ' "${command[@]}")
# -tt: what runs there ends when this script does
for host in "${hosts[@]}"; do
    ssh -tt -o BatchMode=yes "$host" "$remote" < /dev/null | sed -u "s/^/$host: /" &
done
stop() { jobs -p | xargs --no-run-if-empty kill 2> /dev/null || true; }
trap stop INT TERM
code=0
for _ in "${hosts[@]}"; do # a host that fails ends the others, which would wait for it
    wait -n || {
        failed=$?
        ((code)) || code=$failed
        stop
    }
done
exit "$code"
