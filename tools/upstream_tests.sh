#!/usr/bin/env bash
# Megatron-LM's own tests of parallel attention and of checkpoints, on the grid, on CPU ranks, and a table of what they say:
#   bash tools/upstream_tests.sh DIR [N]
#
#   DIR  a tree of Megatron-LM, 0.17 or newer, which is left as it is
#   N    slices of every head: a TP size of P runs on P/N,N (default 2)
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tree=$(cd "${1:?usage: bash tools/upstream_tests.sh DIR [N]}" && pwd) || exit 2
slices=${2:-2}
tests=$tree/tests/unit_tests
attention=$tests/transformer/test_attention.py
model=$tests/dist_checkpointing/models/test_gpt_model.py
for file in "$attention" "$model"; do
    [[ -f $file ]] || { echo "$tree has no ${file#"$tree"/}: give a tree of Megatron-LM 0.17 or newer" >&2; exit 2; }
done
newest=$(sed -n 's/^megatron-core==\([^;]*\); python_version >= .*/\1/p' "$root/tests/requirements.txt")
python=${PYTHON:-$(bash "$root/tools/setup_env.sh" --megatron-core "$newest")} || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What Megatron-LM's training code imports beside its core.
if ! "$python" -c 'import regex, requests, six, yaml' 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check --target "$scratch/packages" regex requests six pyyaml \
        >&2 || exit 2
fi

run() { # ranks, then what pytest is told
    local ranks=$1; shift
    (cd "$scratch" && OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tree:$root:$root/tools:$scratch/packages SLICES=$slices \
        FAILURES=$scratch/failures PYTEST_DEBUG_TEMPROOT=$scratch "$python" -W ignore -m torch.distributed.run --standalone \
        --nproc-per-node "$ranks" --local-ranks-filter 0 -m pytest -p upstream_on_grid -p no:cacheprovider -q --tb=line \
        --rootdir "$tree" -c /dev/null "$@") || touch "$scratch/failures"
}

run 4 "$attention" -k test_parallel_attention_correctness
run 8 "$model"
[[ ! -e $scratch/failures ]] || { cat "$scratch/failures" >&2; exit 1; }
