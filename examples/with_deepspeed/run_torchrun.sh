#!/usr/bin/env bash
# Starts one node's ranks with torchrun: 8 CPU ranks by default, or CONFIG RANKS and further arguments of the script.
#   examples/with_deepspeed/run_torchrun.sh [CONFIG [RANKS [ARGUMENTS...]]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
config=${1:-$here/ds_config_dense_cpu.json}
ranks=${2:-8}
shift $(($# < 2 ? $# : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc-per-node "$ranks" "$here/pretrain_gpt_deepspeed.py" --deepspeed_config "$config" "$@"
