"""How decode attention is shared out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from neoserve.kernels.base import PagedBatch
from neoserve.kernels.decode_plans import TILE_TOKENS, buffer_size, fill, views

NO_VALUE = -7


@given(st.lists(st.integers(1, 70) | st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 70))
def test_programs_have_equal_shares_and_chunks_cover_every_cached_token_once(
    lengths: list[int], num_programs: int
) -> None:
    blocks = -(-np.array(lengths) // 16)
    batch = PagedBatch(
        row_start=np.arange(len(lengths) + 1, dtype=np.int32),
        block_start=np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32),
        block_ids=np.arange(blocks.sum(), dtype=np.int32),
        lengths=np.array(lengths, dtype=np.int32),
    )
    sizes = (len(lengths), num_programs, len(batch.block_ids))
    arrays = views(torch.full((buffer_size(*sizes),), NO_VALUE, dtype=torch.int32), *sizes)
    fill(arrays, batch)
    program_chunk, chunk_start = arrays.program_chunk.tolist(), arrays.chunk_start.tolist()
    chunks = list(
        zip(*(a.tolist() for a in (arrays.chunk_sequence, arrays.chunk_first, arrays.chunk_stop)), strict=True)
    )
    assert program_chunk[0] == chunk_start[0] == 0
    assert program_chunk[-1] == chunk_start[-1] <= len(chunks)
    for sequence, length in enumerate(lengths):
        own = chunks[chunk_start[sequence] : chunk_start[sequence + 1]]
        assert [chunk[0] for chunk in own] == [sequence] * len(own)
        assert [first for _, first, _ in own] == [0, *(stop for _, _, stop in own[:-1])]
        assert own[-1][2] == length - 1
    tiles = [
        sum(max(1, -(-(stop - first) // TILE_TOKENS)) for _, first, stop in chunks[begin:end])
        for begin, end in pairwise(program_chunk)
    ]
    assert max(tiles) <= -(-sum(tiles) // num_programs)
