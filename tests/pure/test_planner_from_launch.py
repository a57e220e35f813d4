"""Launch lines and scripts as people have them: the words that bash would make, and what the planner makes of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hp_plugin.commands import plan as plan_cli
from hp_plugin.config import HeadDimConfig
from hp_plugin.planner.inputs.bash import shell_words
from hp_plugin.planner.inputs.launch_script import launch_words
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.megatron_launch import read_launch
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.search.relief import reliefs
from hp_plugin.planner.seconds.step import predict

EXAMPLES = Path(__file__).parents[2] / "examples" / "with_megatron_lm"

SCRIPT = """\
#!/bin/bash
# A script in the way of Megatron-LM's examples: arrays, defaults, conditions, comments.
GPUS_PER_NODE=4; NUM_NODES=${NNODES:-"2"}
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES + 0))
LOGS=${1:-"logs of mine"}
TOKENIZER=${2:-"MOCK"}
mkdir -p "$(dirname "$LOGS")"
DTYPE="fp8"
MODEL_ARGS=(
    --num-layers 4   # four (of them)
    --hidden-size 512 --num-attention-heads 8 \\
    --group-query-attention --num-query-groups 2
    --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope
    --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
)
if [[ "$DTYPE" == "fp8" ]]; then
    MODEL_ARGS+=("--fp8-format hybrid")
else
    MODEL_ARGS+=(--num-experts 8)
fi
if [ "$TOKENIZER" != "MOCK" ] && [ -n "$TOKENIZER" ]; then
    DATA=(--vocab-size 9)
elif [[ -z "$DATA" ]] || [[ 1 == 2 ]]; then
    DATA=(--vocab-size 1000 "--split '99,1,0'")
fi
if [ ! -f pretrain_gpt.py ]; then
    exit 1
fi
case ${3:-wide} in
    wide) LAYOUT=(--tensor-model-parallel-size 4) ;;
    *) LAYOUT=(--tensor-model-parallel-size 2) ;;
esac
unused() {
    torchrun pretrain_gpt.py --num-layers 99
}
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NUM_NODES pretrain_gpt.py \\
    ${MODEL_ARGS[@]} "${DATA[@]}" ${LAYOUT[@]} --micro-batch-size 2 --global-batch-size 16 --bf16 \\
    --use-distributed-optimizer --sequence-parallel --save "$LOGS" "${@:4}"
"""


@pytest.mark.parametrize(
    "line",
    [
        "a 'b c' \"d e\" f\\ g # h", 'x"$TWO"y $TWO "${TWO}"', '"${ARRAY[@]}" ${ARRAY[@]} "<${ARRAY[@]}>"', "$NO end",
        '${NOTHING:-"a b"} "${NOTHING:-a b}" ${TWO:+c}', "$((2*3+4)) $(($N*2)) $((N/2))", '"a\\"b" \'c"d\' "$N.x" $N$N',
        '"${@:2:1}" ${@:2} $1', "a=$TWO --b=\"$TWO\" #c",
    ],
)  # fmt: skip
def test_words_are_bashs_own(line: str) -> None:
    variables = {"TWO": ["one two"], "ARRAY": ["p q", "r"], "N": ["8"], "1": ["first"], "2": ["second"]}
    variables["@"] = ["first", "second"]
    before = "TWO='one two'; ARRAY=('p q' r); N=8; set -- first second; "
    done = subprocess.run(["bash", "-c", f"{before}printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert shell_words(line, variables) == done.stdout.splitlines()


def test_a_script_is_followed_without_running_it(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(SCRIPT)
    launch = read_launch(launch_words(str(script)))
    assert launch.gpus == 8 and not (tmp_path / "logs of mine").exists()
    model = launch.model
    assert (model.layers, model.D, model.h, model.g, model.d) == (4, 512, 8, 2, 64)
    assert model.ffn == int(4 * 512 * 2 / 3 / 64) * 64 and model.vocab == 1024  # as Megatron-LM derives and pads them
    assert model.gated and model.rotary and not model.biases and not model.tied and model.dropout
    assert launch.layout == Layout(tp=4, dp=2, sp=True, micro_batch=2)
    assert launch.workload == Workload("train", 256, 16) and launch.dtype == "bf16"
    assert launch.notes == ("FP8: priced in 16 bit",)
    other = read_launch(launch_words(f"bash {script} logs - narrow --context-parallel-size 2"))
    assert (other.layout.tp, other.layout.cp, other.layout.dp, other.model.vocab) == (2, 2, 2, 256)


@pytest.mark.parametrize(
    ("arguments", "gpus", "layout"),
    [
        ("train_gqa_8gpu.sh DIR", 8, Layout(8, HeadDimConfig(2, 4), sp=True, micro_batch=4)),
        ("train_gpt_cpu.sh DIR", 4, Layout(4, HeadDimConfig(2, 2), micro_batch=2, zero="replicated", fused=False)),
        ("train_dense_16gpu.sh DIR grid 0 host", 16, Layout(16, HeadDimConfig(4, 4), micro_batch=4)),
        ("train_dense_16gpu.sh DIR stock 0 host", 16, Layout(8, pp=2, micro_batch=4)),
        ("train_moe_16gpu.sh DIR stock 0 host", 16, Layout(8, pp=2, ep=8, sp=True, micro_batch=4)),
    ],
)
def test_our_own_examples(arguments: str, gpus: int, layout: Layout) -> None:
    launch = read_launch(launch_words(f"{EXAMPLES}/{arguments}"))
    assert (launch.gpus, launch.layout) == (gpus, layout)


MINE = (
    "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 4 --hidden-size 512 --num-attention-heads 8 "
    "--group-query-attention --num-query-groups 2 --seq-length 256 --max-position-embeddings 256 --bf16 "
    "--position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --vocab-size 1000 --global-batch-size 16 "
    "--micro-batch-size 2"
)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nothing.sh", "no such file"),
        ("torchrun train.py --num-layers 3", "starts no pretrain_gpt.py"),
        ("torchrun 'pretrain_gpt.py", "No closing quotation"),
        ("python pretrain_gpt.py --num-layers 4 --hidden-size 8 --num-attention-heads 2 --seq-length 8", "with --gpus"),
        ("torchrun --nproc-per-node gpu pretrain_gpt.py --num-layers 4 --hidden-size 8 --num-attention-heads 2",
         "is no number of its own"),
        (MINE + " --tensor-model-parallel-size 16", "TP·PP·CP = 16 GPUs, and the line starts 8"),
        (MINE + " --multi-latent-attention", "multi-latent attention"),
        (MINE + " --num-experts 8 --tensor-model-parallel-size 2", "experts that are split over TP ranks"),
        (MINE + " --num-layers four", "invalid int value: 'four'"),
        (MINE.replace("--num-layers 4", ""), "--num-layers is missing"),
        (MINE.replace("--seq-length 256", ""), "--seq-length is missing"),
        (MINE + " --head-dim-parallel 2x2", "takes two integers m,n"),
        (MINE + " --num-experts 8 --moe-layer-freq [0,1,1,1]", "only every so-manieth is planned"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        read_launch(launch_words(line))


def test_flags_become_the_model_that_megatron_builds() -> None:
    line = MINE + (
        " --rotary-base 500000 --rotary-percent 0.5 --norm-epsilon 1e-6 --window-size 127,0 --window-attn-skip-freq 2 "
        "--recompute-activations --head-dim-parallel auto --tensor-model-parallel-size 4 --fp16"
    )
    launch = read_launch(launch_words(line.replace("--bf16", "")))
    model = launch.model
    assert (model.rotary_base, model.rotary_percent, model.norm_epsilon) == (500000, 0.5, 1e-6)
    assert (model.window, model.window_every, model.biases, model.tied, model.ffn) == (128, 2, True, True, 2048)
    assert launch.layout == Layout(
        4, HeadDimConfig(2, 2), dp=2, micro_batch=2, recompute="selective", zero="replicated"
    )
    assert launch.workload.grad_itemsize == 2 and launch.dtype == "fp16"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert plan_cli.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_the_first_line_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    wide = said(capsys, "--from-launch", MINE + " --tensor-model-parallel-size 4")
    assert wide[0].startswith("fits; tp=") and "times your current layout" in wide[0]
    assert any("take out" in line for line in wide) and any("--tensor-model-parallel-size 4" in line for line in wide)
    # Of a model this small sharding everything moves least, since it hides what it moves.
    assert any("--use-torch-fsdp2" in line for line in wide[:1])
    best = said(capsys, "--from-launch", MINE + " --use-torch-fsdp2 --no-gradient-accumulation-fusion")
    assert best[0].startswith(("fits; a tie", "fits; nothing"))
    assert not any("take out" in line for line in best)
    launch, machine = read_launch(launch_words(MINE)), load_hardware("h100-ib")
    needed = predict(launch.model, launch.layout, launch.workload, machine).memory.total
    little = (machine["reserved_bytes"] + 0.9 * needed) / 1e9
    small = said(capsys, "--from-launch", MINE, "--memory-gb", f"{little:.4f}")
    assert small[0].startswith("does not fit: needs") and "the fastest layout that does is" in small[0]
    assert any("changes of one flag that free most" in line for line in small)
    assert plan_cli.main(["--from-launch", MINE, "--seq", "4096"]) == 2
    assert "takes no --seq" in capsys.readouterr().err


def test_reliefs_are_the_changes_that_free_most() -> None:
    """Llama 3 8B at 8k on 8 GPUs without anything: recomputation, TP or PP; each really frees what it says."""
    model, workload, machine = load_model("llama3-8b"), Workload("train", 8192, 128), load_hardware("h100-ib")
    found = predict(model, Layout(dp=8, micro_batch=1, zero="replicated"), workload, machine)
    helping = reliefs(found, machine)
    assert len(helping) == 3
    totals = [each.memory.total for each in helping]
    assert totals == sorted(totals) and totals[-1] < found.memory.total
    optimizer = predict(model, Layout(dp=8, micro_batch=1), workload, machine)
    assert [each.memory.total for each in helping if each.flags == "--use-distributed-optimizer"] in (
        [], [optimizer.memory.total]
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["context-parallel-size", "make-vocab-size-divisible-by", "num-attention-heads"])
def test_sizes_of_nothing_are_refused_by_their_flag(flag: str) -> None:
    line = "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 4 --hidden-size 64 --num-attention-heads 4"
    with pytest.raises(ValueError, match=f"--{flag} must be at least 1, got 0"):
        read_launch(f"{line} --seq-length 64 --micro-batch-size 2 --{flag} 0".split())
