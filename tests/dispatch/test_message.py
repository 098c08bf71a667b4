"""Messages: what goes in comes out, where the layout says, on addresses that wide loads can take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.dispatch.message import Field, layout, pack, pack_rows, unpack

DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.int32, torch.float32, torch.int64, torch.float64]
some_fields = st.lists(st.builds(Field, st.integers(0, 7), st.sampled_from(DTYPES)), min_size=1, max_size=4)
fields_of_rows = some_fields.filter(lambda fields: any(field.width for field in fields))


def drawn(field: Field, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randint(0, 200, (num_rows, field.width)).to(dtype or field.dtype)


@pytest.mark.parametrize(
    ("fields", "offsets", "row_bytes"),
    [
        ([Field(8, torch.bfloat16)], [0], 16),
        ([Field(9, torch.bfloat16)], [0], 32),
        ([Field(3, torch.bfloat16), Field(1, torch.float32), Field(1, torch.int32)], [0, 8, 12], 16),
        ([Field(4, torch.float32), Field(2, torch.float32), Field(2, torch.int32)], [0, 16, 24], 32),
        ([Field(1, torch.uint8), Field(0, torch.int64), Field(1, torch.int64)], [0, 8, 8], 16),
    ],
)
def test_layout_by_hand(fields: list[Field], offsets: list[int], row_bytes: int) -> None:
    assert layout(fields) == (offsets, row_bytes)


@given(fields_of_rows, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_round_trip(fields: list[Field], num_rows: int) -> None:
    tensors = [drawn(field, num_rows) for field in fields]
    message = pack(fields, tensors)
    offsets, row_bytes = layout(fields)
    assert (message.dtype, list(message.shape)) == (torch.uint8, [num_rows, row_bytes])
    assert message.is_contiguous()
    assert row_bytes % 16 == 0
    parts = unpack(fields, message)
    ends = [0]
    for field, offset, tensor, part in zip(fields, offsets, tensors, parts, strict=True):
        assert offset % field.dtype.itemsize == 0
        assert offset >= ends[-1]  # no two overlap
        ends.append(offset + field.width * field.dtype.itemsize)
        assert part.dtype == field.dtype
        assert torch.equal(part, tensor)
        if part.numel():
            assert part.data_ptr() == message.data_ptr() + offset  # a view
    assert ends[-1] <= row_bytes
    # A part of the ranks' messages, one behind the other, is that of each.
    both = unpack(fields, torch.cat([message, message]))
    assert all(torch.equal(part, torch.cat([tensor, tensor])) for part, tensor in zip(both, tensors, strict=True))


def test_values_are_converted() -> None:
    fields = [Field(2, torch.bfloat16), Field(1, torch.float32), Field(2, torch.int32)]
    x, scores, ids = (
        torch.tensor([[1 + 2**-10, -3.0]]),
        torch.tensor([[0.1]], dtype=torch.float64),
        torch.tensor([[7, 8]]),
    )
    values = unpack(fields, pack(fields, [x, scores, ids]))
    assert [value.tolist() for value in values] == [[[1.0, -3.0]], [[torch.tensor(0.1).item()]], [[7, 8]]]


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 8])
@pytest.mark.parametrize("num_rows", [0, 6])
def test_rows_of_tables(num_rows: int, width: int, wire: torch.dtype) -> None:
    fields = [Field(width, wire), Field(3, torch.float32), Field(3, torch.int32)]
    x, scores = torch.randn(4, width), torch.rand(5, 3)
    ids = torch.randint(9, (5, 3), dtype=torch.int32)
    token, entry = torch.randint(4, (num_rows,)), torch.randint(5, (num_rows,))
    message = pack_rows(fields, x, token, scores, ids, entry_S=entry)
    expected = unpack(fields, pack(fields, [x[token], scores[entry], ids[entry]]))
    assert all(torch.equal(a, b) for a, b in zip(unpack(fields, message), expected, strict=True))
    assert list(message.shape) == [num_rows, layout(fields)[1]]


def test_rows_of_tables_of_any_stride() -> None:
    fields = [Field(5, torch.float32), Field(2, torch.float32), Field(2, torch.int32)]
    x, scores, ids = torch.randn(5, 4).t(), torch.rand(2, 4).t(), torch.ones(1, 2, dtype=torch.int32).expand(4, 2)
    token, entry = torch.tensor([3, 0, 3]), torch.tensor([0, 1, 2])
    x_SD, scores_SK, ids_SK = unpack(fields, pack_rows(fields, x, token, scores, ids, entry_S=entry))
    assert torch.equal(x_SD, x[token])
    assert torch.equal(scores_SK, scores[entry])
    assert ids_SK.tolist() == [[1, 1]] * 3
