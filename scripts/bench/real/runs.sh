#!/usr/bin/env bash
# The scores on real cells of BENCHMARKS.md, from files to reports, by the commands that a user would type.
#   DATA=../shared/data WORK=/tmp/real bash scripts/bench/real/runs.sh [step ...]
# Steps: pretrain annotation species kang mixology ifnb; all of them if none is given. A report that is there is not
# made again. About twenty minutes of CPU time with the sizes below, which are those of BENCHMARKS.md; TRAIN=1000 SEEDS=5 for more.
set -euo pipefail
export NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # numba's threads would become torch's
cd "$(dirname "$0")/../../.."
DATA=${DATA:-../shared/data} WORK=${WORK:-/tmp/real} SEEDS=${SEEDS:-2} TRAIN=${TRAIN:-600}
RECIPES=scripts/bench/real CELLS="python scripts/bench/real/cells.py" MODEL=$WORK/run/model
mkdir -p "$WORK/cells" "$WORK/reports"

# every file of pretrain/ but Kang's, whose cells are in three of the tests, and the other thousand cells of the MALT tumour
PRETRAINING=()
for name in pretrain/{malt_10x,pbmc1k_5prime_10x,pbmc1k_v2_10x,pbmc_donorA_10x,pollen_brain_lines,tnbc_copykat} multiomics/malt_citeseq; do
    PRETRAINING+=("$DATA/$name.h5ad")
done

sample() { # FILE in DATA, MOST: a sample of a file, by type
    $CELLS sample --most "$2" --out "$WORK/cells/$(basename "$1")" "$DATA/$1"
}

across() { # NAME RECIPE REFERENCE QUERY SETTINGS: other training cells of the reference for every seed, judged on the query
    local name=$1 recipe=$2 reference=$3 query=$4
    if [ -e "$WORK/reports/$name/report.html" ]; then return; fi
    rm -rf "${WORK:?}/reports/$name"
    $CELLS splits --most "$TRAIN" --seeds "$SEEDS" --out "$WORK/cells/$name.json" "$reference" "$query"
    scfm evaluate annotation --model "$MODEL" --config "$RECIPES/$recipe.yaml" --data "$reference" "$query" \
        --splits "$WORK/cells/$name.json" --setting "$5" --out "$WORK/reports/$name" | tee "$WORK/reports/$name.txt"
}

integration() { # NAME FILE: batches of a file mixed
    if [ -e "$WORK/reports/$1/report.html" ]; then return; fi
    rm -rf "${WORK:?}/reports/$1"
    scfm evaluate integration --model "$MODEL" --config $RECIPES/integration.yaml --data "$2" --batch batch --seeds "$SEEDS" \
        --setting full,zero_shot --out "$WORK/reports/$1" | tee "$WORK/reports/$1.txt"
}

run_step() {
    case $1 in
    pretrain)
        $CELLS genes --out "$WORK/vocab.json" --count 1000 "${PRETRAINING[@]}"
        scfm prepare "${PRETRAINING[@]}" --vocabulary "$WORK/vocab.json" --out "$WORK/shards"
        scfm pretrain --config $RECIPES/pretrain.yaml --data.shards "$WORK/shards" --out "$WORK/run"
        ;;
    annotation) # sorted blood cells -> pbmc3k
        sample annotation/pbmc3k_10x.h5ad 1200
        across annotation annotation "$DATA/annotation/pbmc_facs_zheng.h5ad" "$WORK/cells/pbmc3k_10x.h5ad" \
            full,probe,zero_shot,lora,scratch
        ;;
    species) # mouse pancreas, under the names of its one-to-one human orthologs -> human pancreas
        $CELLS mapped --orthologs "$DATA/gene_vocab/orthologs_human_mouse.parquet" \
            --out "$WORK/cells/baron_mouse_as_human.h5ad" "$DATA"/annotation/{baron_mouse_m1,baron_human_d12}.h5ad
        across species annotation "$WORK/cells/baron_mouse_as_human.h5ad" "$DATA/annotation/baron_human_d12.h5ad" full,zero_shot
        across species-unweighted unweighted "$WORK/cells/baron_mouse_as_human.h5ad" "$DATA/annotation/baron_human_d12.h5ad" full,probe
        ;;
    kang) # pbmc3k -> unstimulated cells of eight donors with lupus
        sample integration/kang_ctrl_8donors.h5ad 800
        across kang unweighted "$DATA/annotation/pbmc3k_10x.h5ad" "$WORK/cells/kang_ctrl_8donors.h5ad" full,zero_shot
        ;;
    mixology)
        sample integration/sc_mixology_lung_lines.h5ad 400
        integration mixology "$WORK/cells/sc_mixology_lung_lines.h5ad"
        ;;
    ifnb) # a batch is a donor, stimulated or not
        sample perturbation/kang_ifnb.h5ad 400
        integration ifnb "$WORK/cells/kang_ifnb.h5ad"
        ;;
    *) echo "runs.sh: no step $1" >&2 && exit 2 ;;
    esac
}

if [ $# -eq 0 ]; then set -- pretrain annotation species kang mixology ifnb; fi
for step in "$@"; do run_step "$step"; done
