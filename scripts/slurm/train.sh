# shellcheck shell=bash
# What single_node.sbatch and multi_node.sbatch share: look before the launch, train, save when time is over, come back.
#
# srun starts one process per GPU, as Lightning's SLURMEnvironment expects, and not torchrun: srun hands signals to every
# process and scfm's exit code to this script, where torchrun dies of SIGUSR1 and turns code 75 into 1.
set -euo pipefail

usage='usage: sbatch scripts/slurm/{single,multi}_node.sbatch RECIPE SHARDS RUN [--key value ...]'
recipe=${1:?$usage} shards=${2:?$usage} run=${3:?$usage}
shift 3
tasks=${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node, one for each GPU} nodes=${SLURM_JOB_NUM_NODES:?is set by sbatch}
recipe_of_run=(
    --config "$recipe" --data.shards "$shards" --out "$run"
    --trainer.devices "$tasks" --trainer.num_nodes "$nodes" "$@"
)

if ! command -v scfm > /dev/null; then
    echo "no scfm on PATH: activate its environment before sbatch, or in this file" >&2
    exit 2
fi

newest_checkpoint() {
    [[ ! -d $run/checkpoints ]] || find "$run/checkpoints" -maxdepth 1 -name 'step=*.ckpt' | sort | tail -n 1
}

# The name by which `scfm plan` knows this node's GPU; empty for one that it does not know
planned_device() {
    case $(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1) in
        *H200*) echo h200 ;;
        *H100*) echo h100 ;;
        *A100*40GB*) echo a100-40 ;;
        *A100*) echo a100 ;;
        *L40S*) echo l40s ;;
        *4090*) echo rtx4090 ;;
    esac
}

began_at=$(newest_checkpoint)
echo "$(date '+%F %T') job $SLURM_JOB_ID on $nodes x $tasks, from ${began_at:-the start}"

# A job that comes back was looked at before; shards at a URL are compared with their hashes when they are fetched
if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    [[ $shards == *://* ]] || scfm verify "$shards"
    if device=$(planned_device) && [[ $device ]]; then
        scfm plan "${recipe_of_run[@]}" --device "$device" --gpus $((nodes * tasks)) || echo "not planned; going on"
    fi
fi

step='' told='' signalled=''
# Whatever this script was told, the tasks are told SIGUSR1: srun hands that on, but kills them when it gets SIGTERM
# shellcheck disable=SC2329 # the traps call it
tell() {
    told=$1 signalled=yes
    [[ ! $step ]] || kill -USR1 "$step" 2> /dev/null || true
}
trap 'tell USR1' USR1
trap 'tell TERM' TERM

# --cpus-per-task: srun has not taken sbatch's since SLURM 22.05. --wait: when a process dies, those of its node end by
# themselves, and SLURM ends those that hang on other nodes five minutes later. Not --kill-on-bad-exit: code 75 is one,
# and the first process may still be writing the checkpoint, or in the end the model, when the others are done
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=300 scfm pretrain "${recipe_of_run[@]}" --resume auto &
step=$!

# A signal ends `wait` but not the step
while
    signalled='' code=0
    wait "$step" || code=$?
    [[ $signalled ]]
do :; done

now_at=$(newest_checkpoint)
echo "$(date '+%F %T') exit code $code, at ${now_at:-the start}"
if [[ $code == 0 ]]; then
    exit 0
elif [[ $told == TERM ]]; then
    echo "told to end: not put back into the queue by this script"
elif [[ $code == 2 ]]; then
    echo "something given to scfm cannot work (see above): not put back into the queue"
elif [[ $code == 143 ]]; then
    echo "back into the queue; it was pre-empted (SIGTERM) while it started"
    scontrol requeue "$SLURM_JOB_ID"
elif [[ $now_at == "$began_at" ]]; then
    echo "it got no further than where it began: not put back into the queue"
else
    # 75: it saved because it was told to. Anything else: it broke down after a checkpoint, and would go on from there
    echo "back into the queue; it goes on from $now_at"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
