#!/usr/bin/env bash
# The dense model of the source experiments on 16 GPUs: a 4 x 4 grid, or stock TP=8 PP=2 for comparison.
#
#   bash train_dense_16gpu.sh DIR grid|stock NODE_RANK MASTER_ADDR [more flags]       once on each of two nodes
#
# To change: DIR is a Megatron-LM tree; --mock-data for --data-path and a tokenizer of yours; --micro-batch-size to what
# memory allows (the exchange `batch` wants a multiple of n = 4, otherwise `auto` takes `sequence`).
set -euo pipefail
megatron=${1:?usage: $0 MEGATRON_LM_DIR grid|stock NODE_RANK MASTER_ADDR [flags]}
case ${2:-} in
    grid) layout=(--head-dim-parallel 4,4) ;;
    stock) layout=(--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2) ;;
    *) echo "the second word is grid or stock, not '${2:-}'" >&2; exit 2 ;;
esac

export CUDA_DEVICE_MAX_CONNECTIONS=1
torchrun --nnodes 2 --nproc-per-node 8 --node-rank "${3:?NODE_RANK}" --master-addr "${4:?MASTER_ADDR}" \
    --master-port 6000 -m hp_plugin.launch "$megatron/pretrain_gpt.py" \
    "${layout[@]}" \
    --num-layers 4 --hidden-size 8192 --num-attention-heads 16 --kv-channels 512 --ffn-hidden-size 32768 \
    --seq-length 2048 --max-position-embeddings 2048 --position-embedding-type rope \
    --micro-batch-size 4 --global-batch-size 1024 --train-iters 100 --lr 1e-4 --min-lr 1e-5 \
    --fp16 --initial-loss-scale 65536 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --attention-dropout 0 --hidden-dropout 0 \
    --mock-data --tokenizer-type NullTokenizer --vocab-size 50257 \
    --log-interval 1 --log-throughput --eval-iters 0 \
    "${@:5}"
