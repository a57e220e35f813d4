#!/usr/bin/env bash
# Prepares the environment that the examples and the tests run in, and prints the path of its Python on stdout.
#
#   bash tools/setup_env.sh [--venv DIR] [--python PATH] [--megatron-core VERSION]
#
#   --venv DIR     where to make the virtual environment (default: .venv in the checkout)
#   --python PATH  the Python that makes it, 3.10 or newer (default: the first suitable one on PATH)
#   --megatron-core VERSION
#                  this release instead of the pinned one, in an environment of its own that all checkouts share:
#                  ${XDG_CACHE_HOME:-~/.cache}/hp-plugin/megatron-core-VERSION-python3.X (without --python: on Python 3.12,
#                  else 3.13, 3.11 or 3.10, whichever is found first, also among pyenv's)
#
# Without any option, a virtual environment that is active and already has the versions of tests/requirements.txt is
# used as it is. Otherwise everything is installed with pip, as pip is configured. A second run finds the work done; a
# run after an interrupt goes on with it. Progress goes to stderr.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pins=$root/tests/requirements.txt
venv=''
base=''
core=''

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 2; }

while (($#)); do
    case $1 in
        --venv) venv=${2:?--venv needs a directory}; shift 2 ;;
        --python) base=${2:?--python needs a path}; shift 2 ;;
        --megatron-core) core=${2:?--megatron-core needs a version}; shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown option $1; there are --venv DIR, --python PATH and --megatron-core VERSION" ;;
    esac
done

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# An environment that the caller has activated and that has every pin needs nothing from us.
if [[ -z $venv && -z $base && -z $core ]]; then
    active=$(command -v python3 || true)
    if [[ -n $active ]] && new_enough "$active" \
        && "$active" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' \
        && "$active" "$root/tools/check_pins.py" "$pins" 2>/dev/null; then
        say "setup: using the active environment, $active"
        echo "$active"
        exit 0
    fi
fi

if [[ -z $base ]]; then
    tried=''
    names=(python3 python3.13 python3.12 python3.11 python3.10)
    if [[ -n $core ]]; then
        names=()
        # pyenv's python3.12 is on PATH, but does not run, where another Python is its default.
        for minor in 12 13 11 10; do
            names+=("python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python3)
        done
    fi
    for name in "${names[@]}"; do
        found=$(command -v "$name") || continue
        if new_enough "$found"; then base=$found; break; fi
        tried+=" $found"
    done
    [[ -n $base ]] || fail "needs Python 3.10 or newer; looked at:${tried:- nothing named python3 on PATH}. Name one with --python PATH"
else
    command -v "$base" >/dev/null || fail "--python $base is not a program"
    new_enough "$base" || fail "needs Python 3.10 or newer, and $base is $("$base" --version 2>&1 || true)"
fi

shared=''
if [[ -z $venv && -n $core ]]; then
    shared=yes
    venv=${XDG_CACHE_HOME:-$HOME/.cache}/hp-plugin/megatron-core-$core-python$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
fi
venv=${venv:-$root/.venv}
mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
# One set-up at a time: two commands started together would install into the same directory.
if command -v flock >/dev/null; then
    if [[ -n $shared ]]; then exec 9>"$venv.lock"; else exec 9<"$pins"; fi
    flock --nonblock 9 || { say "setup: waiting for another set-up of $venv to finish"; flock 9; }
fi

python=$venv/bin/python
wanted=$(cat "$pins")
[[ -z $core ]] || wanted=$(grep -v '^megatron-core==' "$pins"; echo "megatron-core==$core")
# The checkout may have moved since: its path is part of what an editable install records.
recipe=$(cat "$root/setup.py" "$root/tools/setup_env.sh")
home=$root
if [[ -n $shared ]]; then recipe='' home=shared; fi
stamp=$venv/.installed-$(echo "$wanted$recipe" | sha256sum | cut -c1-16)
if [[ -f $stamp && $(<"$stamp") == "$home" ]] && "$python" -c '' 2>/dev/null; then
    echo "$python"
    exit 0
fi

compiler=$(command -v c++ || command -v g++ || command -v clang++ || true)
run() {
    say "setup: $1"; shift
    "$@" >&2 && return
    [[ -n $compiler ]] || say "setup: no C++ compiler (c++, g++, clang++) was found; packages without a ready-made wheel for this machine need one"
    fail "this failed: $*. Run the same command again to go on from here"
}

# Also made anew when the Python it was made with is gone, or when making it was interrupted before pip was in.
if ! "$python" -m pip --version >/dev/null 2>&1; then
    "$base" -c 'import ensurepip, venv' 2>/dev/null || fail "$base lacks the venv module (Debian and Ubuntu: apt install python3-venv)"
    run "making $venv with $base" "$base" -m venv --clear "$venv"
fi
rm -f "$venv"/.installed-*
# pip writes RECORD last: without it, an interrupted install would pass for a finished one.
for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
    if [[ -d $info && ! -f $info/RECORD ]]; then rm -r "$info"; fi
done

echo "$wanted" >"$venv/pins.txt"
pins=$venv/pins.txt
pip=("$python" -m pip install --quiet --disable-pip-version-check --no-input)
run "installing PyTorch (the first time, the longest download)" "${pip[@]}" -c "$pins" torch setuptools wheel numpy
# DeepSpeed's build imports torch, and its kernels are compiled when first used.
run "installing DeepSpeed" env DS_BUILD_OPS=0 "${pip[@]}" -c "$pins" --no-build-isolation deepspeed
run "installing the rest of tests/requirements.txt" "${pip[@]}" -r "$pins"
# Which of the checkouts a shared environment runs, PYTHONPATH says.
[[ -n $shared ]] || run "installing hp-plugin itself" "${pip[@]}" --no-deps --no-build-isolation -e "$root"
run "checking the versions" "$python" "$root/tools/check_pins.py" "$pins"
echo "$home" >"$stamp"
say "setup: $venv is ready"
echo "$python"
