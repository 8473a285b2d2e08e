#!/usr/bin/env bash
# Pretraining on all GPUs of one machine, started again where it stops, until it is done:
#   scripts/launch/box.sh RECIPE SHARDS RUN [--key value ...] &
# It outlives the terminal; the log is RUN.out. `kill -TERM` saves and ends it, `kill -USR1` saves and starts it again.
# CUDA_VISIBLE_DEVICES=0,1 before it leaves the other GPUs alone. CRASHES=5 allows that many in a row without progress.
set -uo pipefail

usage='usage: scripts/launch/box.sh RECIPE SHARDS RUN [--key value ...]'
recipe=${1:?$usage} shards=${2:?$usage} run=${3:?$usage}
shift 3
crashes_allowed=${CRASHES:-3}
log=${run%/}.out

# A shell in a SLURM allocation was not started by srun, which Lightning would take it for
unset "${!SLURM_@}"

newest_checkpoint() {
    [[ ! -d $run/checkpoints ]] || find "$run/checkpoints" -maxdepth 1 -name 'step=*.ckpt' | sort | tail -n 1
}

say() { echo "$(date '+%F %T') $*"; }

mkdir -p "$(dirname "$log")"
echo "log: $log; stop: kill -TERM $$"
exec >> "$log" 2>&1

process='' ended='' signalled=''
tell() {
    signalled=yes
    [[ $1 == USR1 ]] || ended=$1
    [[ ! $process ]] || kill "-$1" "$process" 2> /dev/null
}
trap '' HUP
trap 'tell USR1' USR1
trap 'tell TERM' TERM INT

crashes=0
while :; do
    began_at=$(newest_checkpoint)
    say "from ${began_at:-the start}"
    scfm pretrain --config "$recipe" --data.shards "$shards" --out "$run" --trainer.devices auto "$@" --resume auto &
    process=$!
    while # a signal ends `wait` but not the run
        signalled=''
        wait "$process"
        code=$?
        [[ $signalled ]]
    do :; done
    now_at=$(newest_checkpoint)
    say "exit code $code, at ${now_at:-the start}"

    if [[ $code == 0 || $ended ]]; then
        exit "$code"
    elif [[ $code == 2 ]]; then
        say "something given to scfm cannot work (see above): not started again"
        exit 2
    elif [[ $code == 75 ]]; then
        crashes=0
    elif [[ $now_at != "$began_at" ]]; then
        crashes=1
    else
        crashes=$((crashes + 1))
    fi
    if ((crashes > crashes_allowed)); then
        say "$crashes crashes in a row without progress: not started again"
        exit "$code"
    fi
done
