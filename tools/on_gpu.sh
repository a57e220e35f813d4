#!/usr/bin/env bash
# Everything that one NVIDIA GPU can prove and measure of this project, in less than eight minutes.
#
#   bash tools/on_gpu.sh [--python PATH] [--wheels DIR] [--out DIR] [--dry-run] [--stage NAME ...]
#
#   --python PATH  a Python, 3.10 or newer, that has torch with CUDA (default: python3)
#   --wheels DIR   where pip finds what is missing, without network. To fill it elsewhere, with the same Python version:
#                  pip download --no-deps -d DIR megatron-core==VERSION numpy packaging psutil pytest pytest-timeout
#                  iniconfig pluggy pygments hypothesis sortedcontainers; VERSION as tests/requirements.txt has it
#   --out DIR      for on_gpu.json, on_gpu.md, machine.json and logs (default: runs/on_gpu)
#   --dry-run      all stages on tiny sizes, on the CPU if there is no GPU
#   --stage NAME   this stage alone: "wide heads", "one rank", "four ranks", "shard" or "tests"
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
wheels=''
out=$root/runs/on_gpu
options=()
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs a path}; shift 2 ;;
        --wheels) wheels=${2:?--wheels needs a directory}; shift 2 ;;
        --out) out=${2:?--out needs a directory}; shift 2 ;;
        --dry-run) options+=(--dry-run); shift ;;
        --stage) options+=(--stage "${2:?--stage needs a name}"); shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "on_gpu: unknown option $1; bash tools/on_gpu.sh --help" >&2; exit 2 ;;
    esac
done
fail() { echo "on_gpu: $*" >&2; exit 2; }

"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch: name a Python that has it with --python PATH"
needed='megatron.core numpy packaging psutil pytest pytest_timeout hypothesis'
missing() { "$1" -c 'import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n.split(".")[0]) is None])' $needed; }
lacking=$(missing "$python")
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [[ -n $lacking ]]; then
    [[ -n $wheels ]] || fail "$python lacks $lacking: give a folder of wheels with --wheels DIR"
    # Beside the Python's own packages, which stay as they are.
    wanted=' megatron-core pytest pytest-timeout iniconfig pluggy pygments hypothesis sortedcontainers '
    for name in numpy packaging psutil; do [[ " $lacking " != *" $name "* ]] || wanted+="$name "; done
    found=()
    for wheel in "$wheels"/*.whl; do
        name=$(basename "$wheel" | cut -d- -f1 | tr '[:upper:]_' '[:lower:]-')
        [[ $wanted != *" $name "* ]] || found+=("$wheel")
    done
    rm -rf "$out/packages"
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/packages" ${found[@]+"${found[@]}"} >&2 ||
        fail "$("$python" --version) cannot install from $wheels"
    export PYTHONPATH=$out/packages
    lacking=$(missing "$python")
    [[ -z $lacking ]] || fail "$wheels lacks $lacking for $("$python" --version)"
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
cd "$root"
exec "$python" -m hp_plugin.bench.gpu.stages --out "$out" ${options[@]+"${options[@]}"}
