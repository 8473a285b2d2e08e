#!/usr/bin/env bash
# The scores on real cells of BENCHMARKS.md, from files to reports, by the commands that a user would type.
#   DATA=../shared/data WORK=/tmp/real bash scripts/bench/real/runs.sh [step ...]
# Steps: pretrain annotation kang species mixology ifnb study; all of them if none is given. A step whose report is there
# is not made again. About an hour on one core.
set -euo pipefail
cd "$(dirname "$0")/../../.."
DATA=${DATA:-../shared/data} WORK=${WORK:-/tmp/real} SEEDS=${SEEDS:-5}
RECIPES=scripts/bench/real CELLS="python scripts/bench/real/cells.py" MODEL=$WORK/run/model
mkdir -p "$WORK/cells" "$WORK/reports"

# every file of pretrain/ but Kang's, whose cells are in three of the tests, and the other thousand cells of the MALT tumour
PRETRAINING=()
for name in pretrain/{malt_10x,pbmc1k_5prime_10x,pbmc1k_v2_10x,pbmc_donorA_10x,pollen_brain_lines,tnbc_copykat} multiomics/malt_citeseq; do
    PRETRAINING+=("$DATA/$name.h5ad")
done

pretrain() {
    $CELLS genes --out "$WORK/vocab.json" --count 1000 "${PRETRAINING[@]}"
    scfm prepare "${PRETRAINING[@]}" --vocabulary "$WORK/vocab.json" --out "$WORK/shards"
    scfm pretrain --config $RECIPES/pretrain.yaml --data.shards "$WORK/shards" --out "$WORK/run"
}

evaluate() { # NAME TASK [option ...]
    local name=$1 task=$2
    if [ -e "$WORK/reports/$name/report.html" ]; then return; fi
    rm -rf "${WORK:?}/reports/$name"
    scfm evaluate "$task" --model "$MODEL" --out "$WORK/reports/$name" "${@:3}" | tee "$WORK/reports/$name.txt"
}

# sorted blood cells -> pbmc3k: a thousand other training cells for every seed
annotation() {
    local files=("$DATA"/annotation/{pbmc_facs_zheng,pbmc3k_10x}.h5ad)
    $CELLS splits --most 1000 --seeds "$SEEDS" --out "$WORK/cells/annotation.json" "${files[@]}"
    evaluate annotation annotation --data "${files[@]}" --splits "$WORK/cells/annotation.json" \
        --setting full,probe,zero_shot,lora,scratch --config $RECIPES/annotation.yaml
}

# pbmc3k -> unstimulated cells of eight donors with lupus
kang() {
    $CELLS sample --most 4000 --out "$WORK/cells/kang_ctrl_8donors.h5ad" "$DATA/integration/kang_ctrl_8donors.h5ad"
    local files=("$DATA/annotation/pbmc3k_10x.h5ad" "$WORK/cells/kang_ctrl_8donors.h5ad")
    $CELLS splits --most 1000 --seeds "$SEEDS" --out "$WORK/cells/kang.json" "${files[@]}"
    evaluate kang annotation --data "${files[@]}" --splits "$WORK/cells/kang.json" \
        --setting full,probe,zero_shot,scratch --config $RECIPES/annotation.yaml
}

# mouse pancreas, under the names of its one-to-one human orthologs -> human pancreas
species() {
    local mouse=$WORK/cells/baron_mouse_as_human.h5ad human=$DATA/annotation/baron_human_d12.h5ad
    $CELLS mapped --orthologs "$DATA/gene_vocab/orthologs_human_mouse.parquet" --out "$mouse" "$DATA/annotation/baron_mouse_m1.h5ad" "$human"
    $CELLS splits --most 1000 --seeds "$SEEDS" --out "$WORK/cells/species.json" "$mouse" "$human"
    evaluate species annotation --data "$mouse" "$human" --splits "$WORK/cells/species.json" \
        --setting full,probe,zero_shot,scratch --config $RECIPES/annotation.yaml
}

mixology() {
    evaluate mixology integration --data "$DATA/integration/sc_mixology_lung_lines.h5ad" --batch batch --seeds "$SEEDS" \
        --setting zero_shot,full,scratch --config $RECIPES/integration.yaml
}

# batch is donor x stimulation
ifnb() {
    $CELLS sample --most 1000 --out "$WORK/cells/kang_ifnb.h5ad" "$DATA/perturbation/kang_ifnb.h5ad"
    evaluate ifnb integration --data "$WORK/cells/kang_ifnb.h5ad" --batch batch --seeds "$SEEDS" \
        --setting zero_shot,full,scratch --config $RECIPES/integration.yaml
}

# which keys of fine-tuning matter, by validation cells of the sorted blood cells alone
study() {
    $CELLS sample --most 1000 --out "$WORK/cells/pbmc_facs_zheng.h5ad" "$DATA/annotation/pbmc_facs_zheng.h5ad"
    scfm study --config $RECIPES/study.yaml --model "$MODEL" --reference "$WORK/cells/pbmc_facs_zheng.h5ad" \
        --data "$DATA/annotation/pbmc3k_10x.h5ad" --out "$WORK/study" | tee "$WORK/study.txt"
}

for step in "${@:-pretrain annotation kang species mixology ifnb study}"; do
    for one in $step; do "$one"; done
done
