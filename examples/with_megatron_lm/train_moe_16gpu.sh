#!/usr/bin/env bash
# The mixture of experts of the source experiments on 16 GPUs: a 4 x 4 grid, or stock TP=8 PP=2 for comparison.
#
#   bash train_moe_16gpu.sh DIR grid|stock NODE_RANK MASTER_ADDR [more flags]         once on each of two nodes
#
# To change: as in train_dense_16gpu.sh; --expert-model-parallel-size must divide both the experts and the ranks of a
# stage. Stock mixtures want --sequence-parallel wherever TP > 1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$here/train_dense_16gpu.sh" "${@:1:4}" \
    --num-experts 8 --moe-router-topk 1 --moe-router-pre-softmax --moe-aux-loss-coeff 1e-2 \
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall \
    --sequence-parallel \
    "${@:5}"
