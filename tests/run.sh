#!/usr/bin/env bash
# Sets up what the tests need and runs them:
#   bash tests/run.sh [--venv DIR] [--python PATH] [--megatron-core VERSION] [pytest arguments]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=()
while [[ ${1:-} == --venv || ${1:-} == --python || ${1:-} == --megatron-core ]]; do
    setup+=("$1" "${2:?$1 needs a value}")
    shift 2
done
python=$(bash "$root/tools/setup_env.sh" ${setup[@]+"${setup[@]}"})

cd "$root"
# One thread per rank: many ranks share the cores, and results do not depend on how many there are.
export OMP_NUM_THREADS=1 PYTHONPATH=$root
exec "$python" -m pytest "$@"
