"""Whatever a DeepSpeed configuration holds, it is accepted or refused in one short line that names the option."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hp_plugin.deepspeed_adapter.config import head_dim_option, load_settings
from hp_plugin.deepspeed_adapter.settings import BATCH_KEYS, batch_sizes, gradient_clipping, half_precision, zero_config
from tests.inputs import FUZZ, VALUES, WORDS, accepted

KEYS = ("head_dim_parallel", "head-dim-parallel", "zero_optimization", "bf16", "fp16", "bfloat16", "gradient_clipping")
KEYS += (*BATCH_KEYS, "tensor_parallel", "sequence_parallel_size", "data_parallel_size", "gpt", "optimizer")
INNER = ("m", "n", "exchange", "order", "stage", "enabled", "autotp_size", "zero_hpz_partition_size", "loss_scale")
SECTION = st.one_of(VALUES, st.dictionaries(st.one_of(st.sampled_from(INNER), WORDS), VALUES, max_size=4))
SETTINGS = st.dictionaries(st.one_of(st.sampled_from(KEYS), WORDS), SECTION, max_size=4)
GRID = {"head_dim_parallel": {"m": 2, "n": 2}}


def read(settings: Any) -> None:
    found = load_settings(settings)
    head_dim_option(found)
    zero_config(found)
    half_precision(found)
    assert gradient_clipping(found) >= 0
    if any(key in found for key in BATCH_KEYS):
        assert min(batch_sizes(found, 2)) > 0


@FUZZ
@given(SETTINGS)
def test_dictionaries(given_settings: dict[str, Any]) -> None:
    accepted(lambda: read(given_settings))


@FUZZ
@given(SETTINGS)
def test_options_beside_a_grid(given_settings: dict[str, Any]) -> None:
    accepted(lambda: read({**given_settings, **GRID}))


@FUZZ
@given(VALUES)
def test_anything(config: Any) -> None:
    accepted(lambda: read(config))


@settings(FUZZ, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"[" * 100000, b'{"a":' * 5000, b"{}", b"[]", b"1", b"", b'{"fp16": {"enabled": 1}', b"\xff"]),
        st.sampled_from([b'{"gpt": 1, "gpt": 2}', b'{"gpt": {"a": 1, "a": 2}}', b'{"gradient_clipping": NaN}']),
    ),
    st.booleans(),
)
def test_files_and_base64(tmp_path: Path, content: bytes, in_file: bool) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    accepted(lambda: read(str(path) if in_file else base64.urlsafe_b64encode(content).decode()))


@pytest.mark.parametrize("packed", [False, True])
def test_a_key_that_is_there_twice_is_refused_wherever_it_is(tmp_path: Path, packed: bool) -> None:
    text = json.dumps(GRID)[:-1] + ', "fp16": {"enabled": true, "enabled": false}}'
    path = tmp_path / "ds.json"
    path.write_text(text)
    where = base64.urlsafe_b64encode(text.encode()).decode() if packed else str(path)
    named = "base64" if packed else "ds.json"
    with pytest.raises(ValueError, match=rf"{named}.*: 'enabled' is there twice"):
        load_settings(where)
