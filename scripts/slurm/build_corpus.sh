#!/usr/bin/env bash
# Submits the parts of a corpus as a job array, and the job that puts them together when all are done:
#   scripts/slurm/build_corpus.sh PARTS SOURCE... --out SHARDS [options of scfm prepare]
# Options of sbatch go into its own variables, e.g. SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT.
set -euo pipefail
parts=${1:?usage: scripts/slurm/build_corpus.sh PARTS SOURCE... --out SHARDS [options]}

array=$(sbatch --parsable --array="1-$parts" scripts/slurm/build_corpus.sbatch "$@")
array=${array%%;*} # "id;cluster" where there are several clusters
# Without --kill-on-invalid-dep the merge would wait for ever for a part that failed
merge=$(sbatch --parsable --dependency="afterok:$array" --kill-on-invalid-dep=yes scripts/slurm/build_corpus.sbatch "$@")
echo "parts: job $array, tasks 1 to $parts; merge: job ${merge%%;*}, when all of them succeeded"
