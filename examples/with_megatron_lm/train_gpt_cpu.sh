#!/usr/bin/env bash
# Megatron-LM's own pretrain_gpt.py on the CPU of a laptop, 4 ranks, attention on a 2 x 2 grid.
#
#   bash examples/with_megatron_lm/train_gpt_cpu.sh DIR [more flags of pretrain_gpt.py]
#
# DIR is a Megatron-LM tree. To change: --head-dim-parallel 2,2 (take it away and give --tensor-model-parallel-size 4
# for the stock run), NPROC with it, and --mock-data for --data-path with a tokenizer of yours.
set -euo pipefail
megatron=${1:?usage: $0 MEGATRON_LM_DIR [flags]}
NPROC=4

export OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1
torchrun --nproc-per-node "$NPROC" -m hp_plugin.launch "$megatron/pretrain_gpt.py" \
    --head-dim-parallel 2,2 \
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 256 \
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope \
    --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 1e-3 --min-lr 1e-4 --seed 1 \
    --attention-dropout 0 --hidden-dropout 0 \
    --mock-data --tokenizer-type NullTokenizer --vocab-size 256 \
    --distributed-backend gloo --transformer-impl local \
    --no-gradient-accumulation-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion \
    --no-persist-layer-norm --no-rope-fusion \
    --log-interval 1 --eval-iters 1 --eval-interval 1000 \
    "${@:2}"
