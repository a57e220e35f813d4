"""Where a run starts: the same weights and the same batches on every layout, and what it reports."""

import json
import os
import re

import numpy as np
import pytest

from hp_plugin.training.corpus import build_corpus, standard_library_sources
from hp_plugin.training.data import cache_folder
from tests.dist.training_runs import batches_read, build_and_look, initial_weights, train
from tests.ranks import Ranks

MODEL = "--num-layers 4 --swiglu --qk-layernorm --add-qkv-bias --position-embedding-type learned_absolute"
LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| tokens/s: ([\d.]+) \| learning rate: ([\d.E+-]+) \| "
    r"global batch size: +(\d+) \| lm loss: ([\d.E+-]+) \| loss scale: 1\.0 \| grad norm: ([\d.]+) \| "
    r"number of skipped iterations: +0 \| number of nan iterations: +0 \|$"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(ranks: Ranks, cache: str) -> dict[str, np.ndarray]:
    """The model on one rank."""
    return {name: part for name, _, part in ranks.run(1, initial_weights, cache, MODEL)[0]}


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "flags"),
    [
        (2, 2, "--tensor-model-parallel-size 2"),
        (2, 1, "--pipeline-model-parallel-size 2"),
        (2, 1, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
        (4, 2, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    ],
    ids=["tp2", "pp2", "interleaved", "tp2 pp2"],
)
def test_stock_layouts_start_from_one_model(ranks, cache, whole, world_size, tensor_parallel, flags):
    held = ranks.run(world_size, initial_weights, cache, f"{MODEL} {flags}")
    found: dict[str, np.ndarray] = {}
    # TP ranks are neighbours, and hold the same parameters in the same order.
    for stage in range(0, world_size, tensor_parallel):
        for shards in zip(*held[stage : stage + tensor_parallel], strict=True):
            name, axis, _ = shards[0]
            parts = [part for _, _, part in shards]
            if axis < 0:
                assert all(np.array_equal(part, parts[0]) for part in parts)
                assembled = parts[0]
            elif ".linear_fc1." in name:
                halves = [np.split(part, 2) for part in parts]
                assembled = np.concatenate([half for side in (0, 1) for half in (pair[side] for pair in halves)])
            else:
                assembled = np.concatenate(parts, axis=axis)
            if name in found:  # tied embeddings live on two stages
                assert np.array_equal(found[name], assembled)
            found[name] = assembled
    assert found.keys() == whole.keys()
    for name, weight in whole.items():
        assert np.array_equal(found[name], weight), name


def test_weights_have_the_stock_distribution(whole):
    assert np.all(whole["decoder.layers.0.input_layernorm.weight"] == 1)
    assert np.all(whole["decoder.layers.0.self_attention.q_layernorm.weight"] == 1)
    assert np.all(whole["decoder.layers.0.self_attention.linear_qkv.bias"] == 0)
    for name, expected in (
        ("embedding.word_embeddings.weight", 0.02),
        ("embedding.position_embeddings.weight", 0.02),
        ("decoder.layers.1.self_attention.linear_qkv.weight", 0.02),
        ("decoder.layers.3.mlp.linear_fc1.weight", 0.02),
        ("decoder.layers.2.self_attention.linear_proj.weight", 0.02 / 8**0.5),  # 1/sqrt(2 · layers)
        ("decoder.layers.0.mlp.linear_fc2.weight", 0.02 / 8**0.5),
    ):
        weight = whole[name]
        # Both are known to about 1/sqrt(number of weights); five times that is no accident.
        bound = 5 / weight.size**0.5
        assert abs(weight.std() / expected - 1) < bound and abs(weight.mean() / expected) < bound, name
    layers = [whole[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] for layer in range(4)]
    assert all(not np.array_equal(layers[0], other) for other in layers[1:])


def test_another_seed_is_another_model(ranks, cache, whole):
    other = {name: part for name, _, part in ranks.run(1, initial_weights, cache, f"{MODEL} --seed 2")[0]}
    for name, weight in whole.items():
        assert np.array_equal(other[name], weight) == (weight.ndim == 1), name


def test_ranks_split_the_global_batch_and_nothing_else(ranks, cache):
    alone = ranks.run(1, batches_read, cache, "", 3)[0]
    assert [len(batch) for batch in alone] == [4] * 6  # two micro-batches of four sequences in each of 3 iterations
    for sequence in alone[0]:
        assert len(sequence) == 32 and all(0 <= token <= 256 for token in sequence)
    left, right = ranks.run(2, batches_read, cache, "", 3)
    assert [left[k // 2] if k % 2 == 0 else right[k // 2] for k in range(6)] == alone
    for flags in ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"):
        assert ranks.run(2, batches_read, cache, flags, 3) == [alone, alone]


def test_a_blend_draws_from_both_data_sets_by_weight(ranks, cache, tmp_path):
    prefixes = []
    for number in range(2):
        source = tmp_path / f"{number}.py"
        source.write_bytes(bytes([number]) * 4000)
        prefixes.append(build_corpus(tmp_path, [source]))
    flags = f"--data-path 3 {prefixes[0]} 1 {prefixes[1]} --split 1 --tensor-model-parallel-size 2"
    left, right = ranks.run(2, batches_read, str(tmp_path), flags, 10)
    assert left == right
    sequences = [sequence for batch in left for sequence in batch]
    assert len(sequences) == 80 and sum(1 in sequence for sequence in sequences) == 20


def test_concurrent_builders_leave_one_whole_data_set(ranks, tmp_path):
    found = ranks.run(4, build_and_look, tmp_path)
    # Whoever gets a prefix, first or last, may read the whole at once.
    assert found == [found[0]] * 4
    prefix, (data, _) = found[0]
    assert data == 2 * sum(path.stat().st_size + 1 for path in standard_library_sources())
    assert os.listdir(tmp_path) == [os.path.basename(os.path.dirname(prefix))]
    assert sorted(os.listdir(os.path.dirname(prefix))) == ["bytes.bin", "bytes.idx"]


def test_reports(ranks, cache, tmp_path):
    flags = (
        f"--loss-file {tmp_path}/deep/losses.json --tensorboard-dir {tmp_path}/events --log-interval 2 --train-iters 5 "
        "--tensor-model-parallel-size 2 --lr-decay-style constant --eval-interval 2 --eval-iters 1"
    )
    (_, silent), (losses, said) = ranks.run(2, train, cache, flags)
    assert " iteration " not in silent
    lines = [found for found in map(LINE.match, said.splitlines()) if found]
    # Every second iteration, and the last.
    assert [(found[1], found[2], found[3], found[6]) for found in lines] == [
        ("2", "5", "16", "8"),
        ("4", "5", "32", "8"),
        ("5", "5", "40", "8"),
    ]
    assert all(float(found[5]) == 3e-3 and float(found[4]) > 0 and float(found[8]) > 0 for found in lines)
    assert float(lines[0][7]) == pytest.approx((losses[1] + losses[2]) / 2, abs=1e-5)
    evaluations = re.findall(r"^(\w+) loss at iteration (\d+) \|", said, re.MULTILINE)
    assert evaluations == [("validation", "2"), ("validation", "4"), ("validation", "5"), ("test", "5")]
    assert json.loads((tmp_path / "deep" / "losses.json").read_text()) == {str(k): v for k, v in losses.items()}
    assert os.listdir(tmp_path / "deep") == ["losses.json"]
    assert len(os.listdir(tmp_path / "events")) == 1
    # Evaluation leaves the training itself alone.
    plain = ranks.run(2, train, cache, "--train-iters 5 --tensor-model-parallel-size 2 --lr-decay-style constant")
    assert plain[1][0] == losses


def test_the_default_cache_is_the_home_folder(monkeypatch, tmp_path):
    from tests.dist.training_runs import configured

    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(configured("", "")) == tmp_path / ".cache" / "hp_plugin"
