#!/usr/bin/env bash
# A model with 2 key/value heads on the 8 GPUs of one node: four ranks share each of them, as slices of the head
# dimension, where stock TP=8 gathers all of Q, K and V on every rank.
#
#   bash train_gqa_8gpu.sh DIR [more flags]
#
# To change: DIR is a Megatron-LM tree; 2,4 to m,n with m dividing the key/value heads (`auto` with
# --tensor-model-parallel-size picks m); the model; --mock-data for --data-path and a tokenizer of yours.
set -euo pipefail
megatron=${1:?usage: $0 MEGATRON_LM_DIR [flags]}

export CUDA_DEVICE_MAX_CONNECTIONS=1
torchrun --standalone --nproc-per-node 8 -m hp_plugin.launch "$megatron/pretrain_gpt.py" \
    --head-dim-parallel 2,4 \
    --num-layers 36 --hidden-size 2048 --num-attention-heads 16 --group-query-attention --num-query-groups 2 \
    --kv-channels 128 --ffn-hidden-size 11008 --swiglu --normalization RMSNorm --disable-bias-linear --add-qkv-bias \
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope --rotary-base 1000000 \
    --micro-batch-size 4 --global-batch-size 256 --train-iters 100 --lr 1e-4 --min-lr 1e-5 --bf16 \
    --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --attention-dropout 0 --hidden-dropout 0 \
    --mock-data --tokenizer-type NullTokenizer --vocab-size 151936 \
    --log-interval 1 --log-throughput --eval-iters 0 \
    "${@:2}"
