#!/usr/bin/env bash
# Starts ranks with DeepSpeed's launcher: on this node, or, if HOSTFILE is given, on all nodes it names.
#   examples/with_deepspeed/run_deepspeed.sh CONFIG RANKS_PER_NODE [HOSTFILE] [ARGUMENTS...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if (($# < 2)); then
    sed -n '2,3s/^# *//p' "$0" >&2
    exit 2
fi
config=$1
where=(--num_accelerators "$2")
shift 2
if (($#)) && [[ $1 != -* ]]; then
    # Every line of a hostfile reads "name slots=8"; the nodes need passwordless ssh and this folder at this path.
    where+=(--hostfile "$1")
    shift
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec deepspeed "${where[@]}" "$here/pretrain_gpt_deepspeed.py" --deepspeed_config "$config" "$@"
