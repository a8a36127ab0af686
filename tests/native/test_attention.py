"""Attention by the pool against float64, and the arguments that it refuses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neoserve import _native
from tests.native.float64 import TOLERANCE, Geometry, HostRows


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    block_size=st.sampled_from([16, 32]),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
)
def test_every_instruction_set_is_right(
    pool: _native.WorkerPool,
    instruction_set: str,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    num_kv_heads: int,
    group: int,
    lengths: list[int],
) -> None:
    geometry = Geometry(1, num_kv_heads * group, num_kv_heads, head_dim, block_size, dtype)
    rows = HostRows(pool, geometry, lengths, instruction_set=instruction_set)
    rows.attention.attend(rows.plan(), 0)
    rows.check(0)


def test_each_layer_has_its_own_kv(pool: _native.WorkerPool) -> None:
    rows = HostRows(pool, Geometry(num_layers=3), [17, 40])
    lap = rows.plan()
    for layer in (2, 0, 1):
        rows.attention.attend(lap, layer)
        rows.check(layer)
    assert lap.layers_done == 3
    assert lap.timeline()[:, 0].tolist() == [2, 0, 1]
    assert lap.kv_bytes >= 2 * 2 * 57 * 64 * 4  # K and V of 57 tokens and 2 heads, perhaps of whole blocks


def test_the_log_sum_exp_is_optional(pool: _native.WorkerPool) -> None:
    rows = HostRows(pool, Geometry(), [33])
    lap = rows.attention.plan(
        rows.lengths,
        rows.block_start,
        rows.block_ids,
        qkv_address=rows.qkv_BHD.data_ptr(),
        out_address=rows.out_BHD.data_ptr(),
    )
    rows.attention.attend(lap, 0)
    assert rows.out_BHD.any()
    assert not rows.lse_BH.any()


def test_arrays_may_be_strided_views(pool: _native.WorkerPool) -> None:
    rows = HostRows(pool, Geometry(), [5, 33])
    rows.lengths = np.stack([rows.lengths, rows.lengths * 0], axis=1)[:, 0]
    rows.attention.attend(rows.plan(), 1)
    rows.check(1)


BAD_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"lengths": np.array([5, 33])}, r"lengths is i64 \[2\]; expected i32"),
    ({"lengths": np.zeros((2, 2), np.int32)}, r"lengths is i32 \[2, 2\]"),
    ({"lengths": np.array([5, 33, 1], np.int32)}, "block_start has 3 entries; expected 4"),
    ({"lengths": np.array([0, 33], np.int32)}, "length.*0"),
    ({"lengths": np.array([5, 49], np.int32)}, "length.*49"),
    ({"block_start": np.array([1, 1, 4], np.int32)}, r"block_start\[0\] is 1"),
    ({"block_start": np.array([0, 5, 4], np.int32)}, r"block_start\[2\] is 4, less than the 5"),
    ({"block_start": np.array([0, 1, 3], np.int32)}, "block_start ends with 3; block_ids has 4"),
    ({"block_ids": np.array([0, 1, 7, 2], np.int32)}, "block.*7"),
    ({"block_ids": np.array([0, 1, -1, 2], np.int32)}, "block.*-1"),
    ({"qkv_address": 0}, "qkv_address is 0"),
    ({"out_address": 0}, "out_address is 0"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_PLANS)
def test_a_bad_plan_is_refused_by_name_and_value(
    pool: _native.WorkerPool, changed: dict[str, Any], message: str
) -> None:
    rows = HostRows(pool, Geometry(), [5, 33])
    arguments: dict[str, Any] = {
        "lengths": rows.lengths,
        "block_start": rows.block_start,
        "block_ids": rows.block_ids,
        "qkv_address": rows.qkv_BHD.data_ptr(),
        "out_address": rows.out_BHD.data_ptr(),
    }
    with pytest.raises(ValueError, match=message):
        rows.attention.plan(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float8"}, 'dtype is "float8"'),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"kv_address": 0}, "kv_address is 0"),
        ({"instruction_set": "sse9"}, "sse9"),
    ],
)
def test_bad_attention_is_refused_by_name_and_value(
    pool: _native.WorkerPool, changed: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "num_layers": 1,
        "num_blocks": 4,
        "num_query_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 64,
        "block_size": 16,
        "dtype": "float32",
        "kv_address": 4096,
        "scale": 0.125,
    }
    with pytest.raises(ValueError, match=message):
        _native.HostAttention(pool, **arguments | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 72}, "head_dim.*72"),
        ({"block_size": 24}, "block_size.*24"),
        ({"num_query_heads": 7}, "num_query_heads.*7"),
    ],
)
def test_a_shape_that_no_policy_has_is_refused(pool: _native.WorkerPool, changed: dict[str, Any], message: str) -> None:
    geometry = replace(Geometry(), **changed)
    with pytest.raises(ValueError, match=message):
        HostRows(pool, geometry, [5]).plan()


def test_a_lap_belongs_to_its_attention(pool: _native.WorkerPool) -> None:
    rows, others = HostRows(pool, Geometry(), [5]), HostRows(pool, Geometry(), [5])
    with pytest.raises(ValueError, match="another HostAttention"):
        rows.attention.attend(others.plan(), 0)
    with pytest.raises(ValueError, match="layer is 2; expected 0 to 1"):
        rows.attention.attend(rows.plan(), 2)
