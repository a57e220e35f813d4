#!/usr/bin/env bash
# Trains one small GPT on real text three times, stock on 1 rank, stock on 4 ranks and on a 2 × 2 grid, and lays the
# loss curves over each other; then the last model goes on from three prompts. Needs no GPU:
#   bash examples/quickstart.sh [--venv DIR] [--python PATH]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh" "$@")
out=runs/quickstart
cd "$root"
mkdir -p "$out"
rm -f "$out"/*.json
# Four ranks share what may be two cores; one thread each is what they can use.
export OMP_NUM_THREADS=1 PYTHONPATH=$root

model=(
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 4 --global-batch-size 8 --train-iters 200 --lr 1e-3 --lr-warmup-iters 10 --seed 1
)

train() {
    local name=$1 ranks=$2 losses=$3
    shift 3
    printf '\n== %s\n' "$name"
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" examples/pretrain_gpt.py \
        "${model[@]}" "$@" --log-interval 50 --loss-file "$out/$losses" </dev/null
}

train 'stock, 1 rank' 1 stock-1.json
train 'stock, 4 ranks: TP = 2, PP = 2' 4 stock-tp2-pp2.json \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
train 'grid, 4 ranks: m = 2 head groups, n = 2 slices of every head' 4 grid-2x2.json --head-dim-parallel 2,2 \
    --save "$out/checkpoint"

printf '\n== The loss curves\n'
"$python" examples/plot_losses.py "stock 1 rank=$out/stock-1.json" "stock TP2 PP2=$out/stock-tp2-pp2.json" \
    "grid 2x2=$out/grid-2x2.json" --png "$out/losses.png" --tolerance 1e-4

printf '\n== What the model of the grid makes of three beginnings, on the same four ranks\n'
"$python" -m hp_plugin.commands.main generate --load "$out/checkpoint" --head-dim-parallel 2,2 --prompt 'def ' 'import ' \
    'class ' --max-new-tokens 60 --temperature 0.5 --seed 1
