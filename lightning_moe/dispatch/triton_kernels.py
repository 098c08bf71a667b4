"""The reordering of rows as Triton kernels for CUDA: what ``permute.py`` computes, in one pass over memory each.

Triton comes with CUDA builds of torch and with no other: import this module in the function that needs a kernel.

Every kernel works on a tile of rows times columns and loops over the columns of a wider row. Each output is written by
one program, in a fixed order: no atomics, so that a result is the same bit for bit whenever it is computed again. The
tile follows from width and dtype alone and is not tuned at run time, which could choose differently on two ranks.

Shapes: A source rows, D width, K assignments per source row, N = A*K assignments, R rows in expert order,
S message rows, B rows of metadata, M entries in each.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_moe.dispatch.message import Field, layout

# 32 bytes for each of the 128 threads: two loads of the widest kind, and those of eight rows fit into registers.
_TILE_BYTES = 4096
_VECTOR_BYTES = 16
# A fused multiply-add rounds once less than torch does, and whether it is the default depends on Triton's version.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def gather_rows(x_AD: Tensor, index_R: Tensor) -> Tensor:
    """``x_AD[index_R]``, [R, D]; zero where an index is negative or beyond the last row.

    Args:
        x_AD: Numbers of any dtype. Rows may be further apart than D.
        index_R: Row of ``x_AD`` for every row of the result, int64.
    """
    num_sources, width = x_AD.shape
    num_rows = len(index_R)
    out_RD = x_AD.new_empty((num_rows, width))
    if out_RD.numel() == 0:
        return out_RD
    x_AD, x_stride, x_unit = _dense_rows(x_AD)
    tile_rows, tile_width = _tile(width, x_AD.element_size())
    with torch.cuda.device_of(x_AD):
        _gather_rows_kernel[(triton.cdiv(num_rows, tile_rows),)](
            x_AD,
            index_R.contiguous(),
            out_RD,
            num_sources,
            num_rows,
            x_stride,
            WIDTH=width,
            X_UNIT=x_unit,
            ROWS=tile_rows,
            BLOCK_D=tile_width,
            **_OPTIONS,
        )
    return out_RD


@triton.jit
def _gather_rows_kernel(
    x_ptr: tl.tensor,
    index_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_sources: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    X_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    source = tl.load(index_ptr + rows, mask=inside, other=-1).to(tl.int64)
    found = (source >= 0) & (source < num_sources)
    x_start = source * x_stride * X_UNIT
    out_start = rows * WIDTH
    for start in range(0, WIDTH, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        in_row = (cols < WIDTH)[None, :]
        x = tl.load(x_ptr + x_start[:, None] + cols[None, :], mask=found[:, None] & in_row, other=0)
        tl.store(out_ptr + out_start[:, None] + cols[None, :], x, mask=inside[:, None] & in_row)


def sum_rows(y_RD: Tensor, row_AK: Tensor, weights_AK: Tensor | None = None) -> Tensor:
    """Weighted sum of every source row's K rows, [R, D] -> [A, D]: the forward of ``unpermute``.

    Args:
        y_RD: Floating point. Rows may be further apart than D.
        row_AK: Row of every assignment, int64; one that is negative, R or more adds nothing, whatever its weight.
        weights_AK: Weight of every assignment, fp32; ``None`` is 1 everywhere.

    Returns:
        The sums, taken from the first assignment to the last in fp32 (float64 where ``y_RD`` is), in its dtype.
    """
    num_rows, width = y_RD.shape
    num_sums, top_k = row_AK.shape
    out_AD = y_RD.new_empty((num_sums, width))
    if out_AD.numel() == 0:
        return out_AD
    y_RD, y_stride, y_unit = _dense_rows(y_RD)
    tile_rows, tile_width = _tile(width, y_RD.element_size())
    with torch.cuda.device_of(y_RD):
        _sum_rows_kernel[(triton.cdiv(num_sums, tile_rows),)](
            y_RD,
            row_AK.contiguous(),
            None if weights_AK is None else weights_AK.contiguous(),
            out_AD,
            num_rows,
            num_sums,
            y_stride,
            WIDTH=width,
            Y_UNIT=y_unit,
            TOP_K=top_k,
            SUM_DTYPE=tl.float64 if y_RD.dtype == torch.float64 else tl.float32,
            ROWS=tile_rows,
            BLOCK_D=tile_width,
            **_OPTIONS,
        )
    return out_AD


@triton.jit
def _sum_rows_kernel(
    y_ptr: tl.tensor,
    row_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_sums: tl.tensor,
    y_stride: tl.tensor,
    WIDTH: tl.constexpr,
    Y_UNIT: tl.constexpr,
    TOP_K: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    sums = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = sums < num_sums
    first = sums * TOP_K
    out_start = sums * WIDTH
    for start in range(0, WIDTH, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        in_row = (cols < WIDTH)[None, :]
        total = tl.full([ROWS, BLOCK_D], 0, SUM_DTYPE)
        # Unrolled, so that the loads of all K rows are under way at once.
        for k in tl.static_range(TOP_K):
            row = tl.load(row_ptr + first + k, mask=inside, other=-1).to(tl.int64)
            found = (row >= 0) & (row < num_rows)
            y_start = row * y_stride * Y_UNIT
            y = tl.load(y_ptr + y_start[:, None] + cols[None, :], mask=found[:, None] & in_row, other=0).to(SUM_DTYPE)
            if weights_ptr is not None:
                y *= tl.load(weights_ptr + first + k, mask=found, other=0).to(SUM_DTYPE)[:, None]
            total += y
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_start[:, None] + cols[None, :], out, mask=inside[:, None] & in_row)


def unpermute_backward(
    grad_AD: Tensor, y_RD: Tensor, weights_AK: Tensor, assignment_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients of ``sum_rows(y_RD, row_AK, weights_AK)``.

    Args:
        grad_AD: Gradient of the sums.
        y_RD: What was summed.
        weights_AK: Weight of every assignment, fp32.
        assignment_R: Flat index of every row's assignment, int64; no two rows have the same. N where a row is padding.

    Returns:
        The gradient of ``y_RD``, in its dtype, zero where a row is padding; and that of ``weights_AK``, in its dtype,
        from products and sums in fp32 (float64 where ``y_RD`` is), zero where an assignment has no row.
    """
    num_rows, width = y_RD.shape
    grad_RD = y_RD.new_empty((num_rows, width))
    grad_weights_AK = torch.zeros_like(weights_AK, memory_format=torch.contiguous_format)
    if grad_RD.numel() == 0:
        return grad_RD, grad_weights_AK
    grad_AD, grad_stride, grad_unit = _dense_rows(grad_AD)
    y_RD, y_stride, y_unit = _dense_rows(y_RD)
    tile_rows, tile_width = _tile(width, y_RD.element_size())
    with torch.cuda.device_of(y_RD):
        _unpermute_backward_kernel[(triton.cdiv(num_rows, tile_rows),)](
            grad_AD,
            y_RD,
            weights_AK.contiguous(),
            assignment_R.contiguous(),
            grad_RD,
            grad_weights_AK,
            num_rows,
            weights_AK.numel(),
            grad_stride,
            y_stride,
            WIDTH=width,
            GRAD_UNIT=grad_unit,
            Y_UNIT=y_unit,
            TOP_K=weights_AK.shape[1],
            SUM_DTYPE=tl.float64 if y_RD.dtype == torch.float64 else tl.float32,
            ROWS=tile_rows,
            BLOCK_D=tile_width,
            **_OPTIONS,
        )
    return grad_RD, grad_weights_AK


@triton.jit
def _add(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return one + other


@triton.jit
def _unpermute_backward_kernel(
    grad_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    assignment_ptr: tl.tensor,
    grad_rows_ptr: tl.tensor,
    grad_weights_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_assignments: tl.tensor,
    grad_stride: tl.tensor,
    y_stride: tl.tensor,
    WIDTH: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    TOP_K: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    assignment = tl.load(assignment_ptr + rows, mask=inside, other=-1).to(tl.int64)
    found = (assignment >= 0) & (assignment < num_assignments)
    weight = tl.load(weights_ptr + assignment, mask=found, other=0).to(SUM_DTYPE)
    grad_start = (assignment // TOP_K) * grad_stride * GRAD_UNIT
    y_start = rows * y_stride * Y_UNIT
    out_start = rows * WIDTH
    products = tl.full([ROWS, BLOCK_D], 0, SUM_DTYPE)
    for start in range(0, WIDTH, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        in_row = (cols < WIDTH)[None, :]
        to_read = found[:, None] & in_row
        y = tl.load(y_ptr + y_start[:, None] + cols[None, :], mask=to_read, other=0).to(SUM_DTYPE)
        grad = tl.load(grad_ptr + grad_start[:, None] + cols[None, :], mask=to_read, other=0).to(SUM_DTYPE)
        out = (grad * weight[:, None]).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + out_start[:, None] + cols[None, :], out, mask=inside[:, None] & in_row)
        products += y * grad
    grad_weights = tl.reduce(products, 1, _add).to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + assignment, grad_weights, mask=found)


def pack_rows(
    x_AD: Tensor,
    x_index_S: Tensor,
    weights_BM: Tensor,
    ids_BM: Tensor | None,
    meta_index_S: Tensor,
    wire_dtype: torch.dtype,
) -> Tensor:
    """Messages for other ranks: a row of ``x_AD``, its weights and its ids in one row of bytes.

    Args:
        x_AD: Floating point. Rows may be further apart than D.
        x_index_S: Row of ``x_AD`` for every message, int64; one outside of it gives zeros.
        weights_BM: fp32.
        ids_BM: Whole numbers, sent as int32; ``None`` sends none. It may have more rows than ``weights_BM``.
        meta_index_S: Row of ``weights_BM`` and ``ids_BM`` for every message, int64; one outside of them gives zeros.
        wire_dtype: Floating point type in which ``x_AD`` travels.

    Returns:
        Bytes, uint8, laid out as ``message.layout`` says; those that it leaves free are zero.
    """
    num_sources, width = x_AD.shape
    num_messages, num_entries = len(x_index_S), weights_BM.shape[1]
    words = [Field(num_entries, torch.float32), Field(num_entries, torch.int32)]
    offsets, row_bytes = layout([Field(width, wire_dtype), *(words if ids_BM is not None else words[:1])])
    weights_offset = offsets[1]
    messages = torch.empty((num_messages, row_bytes), dtype=torch.uint8, device=x_AD.device)
    if messages.numel() == 0:
        return messages
    x_AD, x_stride, x_unit = _dense_rows(x_AD)
    num_words = (row_bytes - weights_offset) // 4
    item_bytes = max(x_AD.element_size(), wire_dtype.itemsize)
    tile_rows, _ = _tile(max(width, num_words), item_bytes)
    with torch.cuda.device_of(x_AD):
        _pack_rows_kernel[(triton.cdiv(num_messages, tile_rows),)](
            x_AD,
            x_index_S.contiguous(),
            weights_BM.contiguous(),
            None if ids_BM is None else ids_BM.contiguous(),
            meta_index_S.contiguous(),
            messages.view(wire_dtype),
            messages.view(torch.int32),
            num_sources,
            len(weights_BM),
            num_messages,
            x_stride,
            WIDTH=width,
            PADDED_WIDTH=weights_offset // wire_dtype.itemsize,
            FIRST_WORD=weights_offset // 4,
            NUM_WORDS=num_words,
            NUM_ENTRIES=num_entries,
            X_UNIT=x_unit,
            WIRE_STRIDE=row_bytes // wire_dtype.itemsize,
            WORD_STRIDE=row_bytes // 4,
            ROWS=tile_rows,
            BLOCK_D=_tile(width, item_bytes)[1],
            BLOCK_W=_tile(num_words, item_bytes)[1],
            **_OPTIONS,
        )
    return messages


@triton.jit
def _pack_rows_kernel(
    x_ptr: tl.tensor,
    x_index_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    meta_index_ptr: tl.tensor,
    wire_ptr: tl.tensor,
    words_ptr: tl.tensor,
    num_sources: tl.tensor,
    num_meta: tl.tensor,
    num_messages: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    FIRST_WORD: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    X_UNIT: tl.constexpr,
    WIRE_STRIDE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_messages
    source = tl.load(x_index_ptr + rows, mask=inside, other=-1).to(tl.int64)
    found = (source >= 0) & (source < num_sources)
    x_start = source * x_stride * X_UNIT
    wire_start = rows * WIRE_STRIDE
    # Up to the weights, not up to the width: the zeros between the two are elements of x that were not loaded.
    for start in range(0, PADDED_WIDTH, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        to_read = found[:, None] & (cols < WIDTH)[None, :]
        to_write = inside[:, None] & (cols < PADDED_WIDTH)[None, :]
        x = tl.load(x_ptr + x_start[:, None] + cols[None, :], mask=to_read, other=0)
        tl.store(wire_ptr + wire_start[:, None] + cols[None, :], x.to(wire_ptr.dtype.element_ty), mask=to_write)

    meta = tl.load(meta_index_ptr + rows, mask=inside, other=-1).to(tl.int64)
    known = ((meta >= 0) & (meta < num_meta))[:, None]
    meta_start = (meta * NUM_ENTRIES)[:, None]
    words_start = rows * WORD_STRIDE + FIRST_WORD
    for start in range(0, NUM_WORDS, BLOCK_W):
        cols = (start + tl.arange(0, BLOCK_W))[None, :]
        weights = tl.load(weights_ptr + meta_start + cols, mask=known & (cols < NUM_ENTRIES), other=0)
        words = weights.to(tl.float32).to(tl.int32, bitcast=True)
        if ids_ptr is not None:
            has_id = (cols >= NUM_ENTRIES) & (cols < 2 * NUM_ENTRIES)
            ids = tl.load(ids_ptr + meta_start + (cols - NUM_ENTRIES), mask=known & has_id, other=0)
            words = tl.where(has_id, ids.to(tl.int32), words)
        tl.store(words_ptr + words_start[:, None] + cols, words, mask=inside[:, None] & (cols < NUM_WORDS))


def _dense_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``x``, copied only where the elements of a row are not neighbours, and its row stride as a product.

    The second factor, at most 16 bytes, becomes a constant of the kernel: Triton sees that an argument is a multiple of
    16, not of 8, and would read the rows of a message buffer, which are 8*n elements of bf16 apart, one by one.
    """
    x = x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
    unit = gcd(x.stride(0), _VECTOR_BYTES // x.element_size())
    return x, x.stride(0) // unit, unit


def _tile(width: int, item_bytes: int) -> tuple[int, int]:
    """Rows and columns that a program works on at a time, powers of two: more than one row only if they are short."""
    size = _TILE_BYTES // item_bytes
    columns = min(triton.next_power_of_2(max(width, 1)), size)
    return size // columns, columns
