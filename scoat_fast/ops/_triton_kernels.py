"""The kernels of the fused operations, in Triton, and what launches them.

A tile is [lines, columns]: a line is a channel, or in ``gate_backward`` of contiguous tensors a row; columns are pixels
of a row. One of the two axes is dense in memory and moves in pieces of 16 bytes: the columns of contiguous tensors, the
channels of channels-last ones. Strides are arguments, so that slices of larger tensors are read as they are; Triton
compiles into a kernel which of them are 1 and which are multiples of 16.

Upsampling works on pairs of outputs, 2k and 2k + 1, from the inputs k - 1, k and k + 1. A pair is the last axis of
[lines, columns, 2], in the registers of one thread. Sums over pixels are written tile by tile and added afterwards,
always in the same order: there are no atomics.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import is_channels_last, why_no_kernel

INTERPRETED = triton.knobs.runtime.interpret  # as triton.jit sees it below: kernels then run on CPU tensors, for tests
WARPS = 4
WALK_WARPS = 8  # of contiguous tensors: a row of gates is then smaller than the program, and each thread reads its own
HALF = 32  # bytes a thread has of each of three tensors or four: so many values in float32 fill its registers
WALK_CHANNELS = 2  # of contiguous tensors, in a thread: they share its gates and weights
ENOUGH = 1024  # programs that keep any GPU busy


@triton.jit
def _up_forward(
    y, y_strides, gate, gate_strides, out, out_strides, sums, sums_strides, C, h, w, rows,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = (1 + gate) * up(y), and its sums: [BLOCK_C, 2 rows, 2 BLOCK_K] outputs a program.

    A program walks down y with three of its rows, already widened, in registers. It reads (rows + 2) / rows of y, which
    is a fifth of the traffic and comes from L2 where a neighbour read it. Then instructions are what limits it: it
    spends 7 to 11 on an output, and at 85 % of its copy bandwidth an H200 has 20 for one of 2 bytes (128 a clock and
    multiprocessor). Four reads and three interpolations for every output would not fit.
    """
    n, block, row, column, tile = _place(C, h, w, rows, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    ys, outs = _lines(y, y_strides, n, c), _lines(out, out_strides, n, c)
    gates = None if gate is None else _lines(gate, gate_strides, n, tl.zeros([1], tl.int64))
    above = _up_row(ys, ok, row - 1, h, column, w, BLOCK_K, CHANNELS_LAST)  # [BLOCK_C, BLOCK_K, 2]
    here = _up_row(ys, ok, row, h, column, w, BLOCK_K, CHANNELS_LAST)
    GROUP: tl.constexpr = 1 if CHANNELS_LAST else 64 // y.dtype.element_ty.primitive_bitwidth
    SHAPE: tl.constexpr = [BLOCK_C, BLOCK_K // GROUP, 2 * GROUP]  # in the last axis what a thread adds by itself
    total = tl.zeros([BLOCK_C, BLOCK_K // GROUP], tl.float32)
    for r in range(row, tl.minimum(row + rows, h)):
        below = _up_row(ys, ok, r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        pairs, odd = _interpolated(r, h, above, here, below)
        for row_of_pair in tl.static_range(2):
            out_r = 2 * r + row_of_pair
            if gate is not None:
                pairs += pairs * _pairs(gates, _exists(r, h), out_r, column, w, BLOCK_K, CHANNELS_LAST)
            _store_pairs(pairs, outs, ok, out_r, column, w, CHANNELS_LAST)
            if sums is not None:
                total += tl.sum(tl.reshape(pairs, SHAPE), 2)
            pairs = odd
        above, here = here, below
    if sums is not None:
        _store_sums(total, sums, sums_strides, n, tile, c, ok)


@triton.jit
def _up_backward(
    dout, dout_strides, gate, gate_strides, shift, shift_stride, dy, dy_strides, C, h, w, rows,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dy = up^T((1 + gate) * (dout + shift)): [BLOCK_C, rows, BLOCK_K] a program.

    A program walks down dout with four of its rows, already gathered along their columns, in registers.
    """
    n, block, row, column, _ = _place(C, h, w, rows, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    douts, dys = _lines(dout, dout_strides, n, c), _lines(dy, dy_strides, n, c)
    gates = None if gate is None else _lines(gate, gate_strides, n, tl.zeros([1], tl.int64))
    shifts = None if shift is None else _of_channels(shift, shift_stride, n, c, ok)
    k = _inputs(dys, column, BLOCK_K, CHANNELS_LAST)
    x0 = _narrowed(douts, gates, shifts, ok, 2 * row - 1, h, column, w, BLOCK_K, CHANNELS_LAST)  # [BLOCK_C, BLOCK_K]
    x1 = _narrowed(douts, gates, shifts, ok, 2 * row, h, column, w, BLOCK_K, CHANNELS_LAST)
    for r in range(row, tl.minimum(row + rows, h)):
        x2 = _narrowed(douts, gates, shifts, ok, 2 * r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        x3 = _narrowed(douts, gates, shifts, ok, 2 * r + 2, h, column, w, BLOCK_K, CHANNELS_LAST)
        w0, w1, w2, w3 = _gathering(r, h)
        _store(w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3, dys, ok, r, k, w)
        x0, x1 = x2, x3


@triton.jit
def _gate_backward_channels_last(
    dout, dout_strides, shift, shift_stride, y, y_strides, dgate, dgate_strides, C, h, w, rows,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dgate = sums over BLOCK_C channels of (dout + shift) * up(y): [2 rows, 2 BLOCK_K] a program.

    A program walks down y as in ``up_forward``; the channels of a pixel lie within a warp.
    """
    n, block, row, column, _ = _place(C, h, w, rows, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    ys, douts = _lines(y, y_strides, n, c), _lines(dout, dout_strides, n, c)
    columns, rows_of_pair = 2 * column + tl.arange(0, 2 * BLOCK_K), tl.arange(0, 2)
    dgates = dgate + block.to(tl.int64) * dgate_strides[0] + n * dgate_strides[1]
    dgates += columns.to(tl.int64)[:, None] * dgate_strides[4] + rows_of_pair.to(tl.int64)[None, :] * dgate_strides[3]
    shifts = None if shift is None else _of_channels(shift, shift_stride, n, c, ok)
    above = _up_row(ys, ok, row - 1, h, column, w, BLOCK_K, CHANNELS_LAST)
    here = _up_row(ys, ok, row, h, column, w, BLOCK_K, CHANNELS_LAST)
    for r in range(row, tl.minimum(row + rows, h)):
        below = _up_row(ys, ok, r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        dout_even = _shifted(douts, shifts, ok, 2 * r, column, w, BLOCK_K, CHANNELS_LAST)
        dout_odd = _shifted(douts, shifts, ok, 2 * r + 1, column, w, BLOCK_K, CHANNELS_LAST)
        even, odd = _interpolated(r, h, above, here, below)  # [BLOCK_C, BLOCK_K, 2]
        total = tl.reshape(tl.sum(tl.join(even * dout_even, odd * dout_odd), 0), [2 * BLOCK_K, 2])
        tl.store(dgates + tl.cast(2 * r, tl.int64) * dgate_strides[3], total, mask=(columns < 2 * w)[:, None])
        above, here = here, below


@triton.jit
def _gate_backward_contiguous(
    dout, dout_strides, shift, shift_stride, y, y_strides, dgate, dgate_strides, C, h, w, channels,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dgate = sums over ``channels`` of (dout + shift) * up(y): [2 ROWS, 2 BLOCK_K] a program.

    A program walks through the channels, so that a sum stays in its thread. What rows of y share comes from L1.
    """
    n, part, row, column, _ = _place(C, h, w, ROWS, channels, BLOCK_K, CHANNELS_LAST)
    r = row + tl.arange(0, ROWS)
    ok = r < h
    one = tl.zeros([1], tl.int64)
    even = tl.zeros([ROWS, BLOCK_K, 2], tl.float32)
    odd = tl.zeros([ROWS, BLOCK_K, 2], tl.float32)
    for c in range(part * channels, tl.minimum(part * channels + channels, C)):
        ys, douts = _lines(y, y_strides, n, c + one), _lines(dout, dout_strides, n, c + one)
        shifts = None if shift is None else _of_channels(shift, shift_stride, n, c + one, one == 0)
        above = _taps(ys, ok, r - 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        here = _taps(ys, ok, r, h, column, w, BLOCK_K, CHANNELS_LAST)
        below = _taps(ys, ok, r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        before_even, before_odd = _interpolated(r[:, None], h, above[0], here[0], below[0])
        here_even, here_odd = _interpolated(r[:, None], h, above[1], here[1], below[1])
        after_even, after_odd = _interpolated(r[:, None], h, above[2], here[2], below[2])
        dout_even = _shifted(douts, shifts, ok, 2 * r, column, w, BLOCK_K, CHANNELS_LAST)
        dout_odd = _shifted(douts, shifts, ok, 2 * r + 1, column, w, BLOCK_K, CHANNELS_LAST)
        even += dout_even * _widened((before_even, here_even, after_even), column, w, CHANNELS_LAST)
        odd += dout_odd * _widened((before_odd, here_odd, after_odd), column, w, CHANNELS_LAST)
    dgates = dgate + part.to(tl.int64) * dgate_strides[0] + n * dgate_strides[1] + one, dgate_strides[1:]
    _store_pairs(even, dgates, ok, 2 * r, column, w, CHANNELS_LAST)
    _store_pairs(odd, dgates, ok, 2 * r + 1, column, w, CHANNELS_LAST)


@triton.jit
def _affine(
    x, x_strides, scale, scale_stride, shift, shift_stride, out, out_strides, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x * scale + shift, and its sums: [BLOCK_C, BLOCK_K] a program, with four times 16 bytes a thread."""
    n, block, row, column, tile = _place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = _load(_lines(x, x_strides, n, c), ok, row, columns, w)
    if scale is not None:
        value *= _of_channels(scale, scale_stride, n, c, ok)[:, None]
    if shift is not None:
        value += _of_channels(shift, shift_stride, n, c, ok)[:, None]
    _store(value, _lines(out, out_strides, n, c), ok, row, columns, w)
    if sums is not None:
        value = tl.where((columns < w)[None, :], value, 0.0)
        _store_sums(value, sums, sums_strides, n, tile, c, ok)


@triton.jit
def _dot(
    a, a_strides, b, b_strides, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of a * b, of a alone without b: [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, tile = _place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = _load(_lines(a, a_strides, n, c), ok, row, columns, w)
    if b is not None:
        value *= _load(_lines(b, b_strides, n, c), ok, row, columns, w)
    _store_sums(value, sums, sums_strides, n, tile, c, ok)


@triton.jit
def _moments(
    x, x_strides, shift, shift_stride, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of x - shift, and C channels on those of its square: [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, tile = _place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = _load(_lines(x, x_strides, n, c), ok, row, columns, w)
    value -= _of_channels(shift, shift_stride, n, c, ok)[:, None]
    value = tl.where((columns < w)[None, :], value, 0.0)
    _store_sums(value, sums, sums_strides, n, tile, c, ok)
    _store_sums(value * value, sums, sums_strides, n, tile, C + c, ok)


@triton.jit
def _norm(
    x, x_strides, residual, residual_strides, scale, scale_stride, shift, shift_stride, out, out_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = relu(x * scale + shift + residual): [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, _ = _place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = _load(_lines(x, x_strides, n, c), ok, row, columns, w)
    value *= _of_channels(scale, scale_stride, n, c, ok)[:, None]
    value += _of_channels(shift, shift_stride, n, c, ok)[:, None]
    if residual is not None:
        value += _load(_lines(residual, residual_strides, n, c), ok, row, columns, w)
    value = tl.where(value < 0.0, 0.0, value)  # NaN stays
    _store(value, _lines(out, out_strides, n, c), ok, row, columns, w)


@triton.jit
def _norm_sums(
    dout, dout_strides, y, y_strides, x, x_strides, shift, shift_stride, out, out_strides, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = dout where y > 0; its sums, and C channels on those of out * (x - shift): [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, tile = _place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = _behind_relu(dout, dout_strides, y, y_strides, n, c, ok, row, columns, w)
    if out is not None:
        _store(value, _lines(out, out_strides, n, c), ok, row, columns, w)
    _store_sums(value, sums, sums_strides, n, tile, c, ok)
    centred = _load(_lines(x, x_strides, n, c), ok, row, columns, w)
    centred -= _of_channels(shift, shift_stride, n, c, ok)[:, None]
    _store_sums(value * centred, sums, sums_strides, n, tile, C + c, ok)


@triton.jit
def _norm_backward(
    dout, dout_strides, y, y_strides, x, x_strides, scale, scale_stride, slope, slope_stride, shift, shift_stride,
    out, out_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = g * scale + x * slope + shift, with g = dout where y > 0, else 0: [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, _ = _place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    if y is not None:
        value = _behind_relu(dout, dout_strides, y, y_strides, n, c, ok, row, columns, w)
    else:
        value = _load(_lines(dout, dout_strides, n, c), ok, row, columns, w)
    value *= _of_channels(scale, scale_stride, n, c, ok)[:, None]
    own = _load(_lines(x, x_strides, n, c), ok, row, columns, w)
    value += own * _of_channels(slope, slope_stride, n, c, ok)[:, None]
    value += _of_channels(shift, shift_stride, n, c, ok)[:, None]
    _store(value, _lines(out, out_strides, n, c), ok, row, columns, w)


@triton.jit
def _behind_relu(dout, dout_strides, y, y_strides, n, c, ok, row, columns, w):
    value = _load(_lines(dout, dout_strides, n, c), ok, row, columns, w)
    return tl.where(_load(_lines(y, y_strides, n, c), ok, row, columns, w) <= 0.0, 0.0, value)


@triton.jit
def _place(C, h, w, rows, channels, BLOCK_K: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """This program's image, block of channels, first row, first column and tile; programs in a row share memory."""
    program = tl.program_id(0)
    blocks, across = tl.cdiv(C, channels), tl.cdiv(w, BLOCK_K)
    tiles = tl.cdiv(h, rows) * across
    if CHANNELS_LAST:
        block, tile = program % blocks, program // blocks % tiles
    else:
        block, tile = program // tiles % blocks, program % tiles
    return (program // (blocks * tiles)).to(tl.int64), block, tile // across * rows, tile % across * BLOCK_K, tile


@triton.jit
def _interpolated(r, h, above, here, below):
    """Outputs 2r and 2r + 1 along an axis of h, from the inputs r - 1, r and r + 1."""
    inverse = 1.0 / (2.0 * h - 1.0)
    up, down = r * inverse, (h - 1 - r) * inverse
    return up * above + (1 - up) * here, (1 - down) * here + down * below


@triton.jit
def _gathering(r, h):
    """The weights with which input r of an axis of h gets from the outputs 2r - 1 to 2r + 2, as far as these exist."""
    inverse = 1.0 / (2.0 * h - 1.0)
    first, last = tl.where(r > 0, (h - r) * inverse, 0.0), tl.where(r < h - 1, (r + 1) * inverse, 0.0)
    return first, (2 * h - 1 - r) * inverse, (h + r) * inverse, last


@triton.jit
def _taps(lines, ok, r, h, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Columns k - 1, k and k + 1 of row r of every line, 0 where there is none: what outputs 2k and 2k + 1 come from.

    Channels-last: three times [A, K]. Contiguous: [A, K] in the middle, which a thread holds in groups, and the column
    before and the one after every group, [A, K / GROUP].
    """
    ok = ok & _exists(r, h)
    k = _inputs(lines, column, K, CHANNELS_LAST)
    here = _load(lines, ok, r, k, w)
    if CHANNELS_LAST:
        before, after = _load(lines, ok, r, k - 1, w), _load(lines, ok, r, k + 1, w)
    else:
        GROUP: tl.constexpr = 64 // lines[0].dtype.element_ty.primitive_bitwidth
        starts = _starts(column, K // GROUP, GROUP)
        _, before = _unpaired(_load(lines, ok, r, starts - 2, w))
        after, _ = _unpaired(_load(lines, ok, r, starts + GROUP, w))
    return before, here, after


@triton.jit
def _inputs(lines, column, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """K columns of y. In contiguous tensors a thread holds as many side by side as make 16 bytes of outputs."""
    k = column + tl.arange(0, K)
    if not CHANNELS_LAST:
        k = tl.max_contiguous(k, 64 // lines[0].dtype.element_ty.primitive_bitwidth)
    return k


@triton.jit
def _up_row(ys, ok, r, h, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # -> [A, K, 2]
    return _widened(_taps(ys, ok, r, h, column, w, K, CHANNELS_LAST), column, w, CHANNELS_LAST)


@triton.jit
def _widened(taps, column, w, CHANNELS_LAST: tl.constexpr):  # -> [A, K, 2]
    """Outputs 2k and 2k + 1 of a row, 0 outside the image."""
    before, here, after = taps
    if not CHANNELS_LAST:
        before, after = _moved_right(here, before), _moved_left(here, after)
    k = column + tl.arange(0, here.shape[1])
    even, odd = _interpolated(tl.where(k < w, k, 0)[None, :], w, before, here, after)  # else input w - 1 would count
    return tl.join(even, odd)


@triton.jit
def _narrowed(douts, gates, shifts, ok, r, h, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # -> [A, K]
    """Row r of (1 + gate) * (dout + shift) of every line, gathered along its columns."""
    exists = _exists(r, 2 * h)
    ok = ok & exists
    k = column + tl.arange(0, K)
    w0, w1, w2, w3 = _gathering(k[None, :], w)
    if CHANNELS_LAST:  # the gates go into the weights, which all channels share
        x0, x1 = _load(douts, ok, r, 2 * k - 1, 2 * w), _load(douts, ok, r, 2 * k, 2 * w)
        x2, x3 = _load(douts, ok, r, 2 * k + 1, 2 * w), _load(douts, ok, r, 2 * k + 2, 2 * w)
        if gates is not None:
            w0 += w0 * _load(gates, exists, r, 2 * k - 1, 2 * w)
            w1 += w1 * _load(gates, exists, r, 2 * k, 2 * w)
            w2 += w2 * _load(gates, exists, r, 2 * k + 1, 2 * w)
            w3 += w3 * _load(gates, exists, r, 2 * k + 2, 2 * w)
        x = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        if shifts is not None:
            x += (w0 + w1 + w2 + w3) * shifts[:, None]
    else:
        GROUP: tl.constexpr = 128 // douts[0].dtype.element_ty.primitive_bitwidth
        starts = _starts(2 * column, 2 * K // GROUP, GROUP)
        x1, x2 = _unpaired(_gated(douts, gates, shifts, ok, exists, r, 2 * column + tl.arange(0, 2 * K), w))
        _, before = _unpaired(_gated(douts, gates, shifts, ok, exists, r, starts - 2, w))
        after, _ = _unpaired(_gated(douts, gates, shifts, ok, exists, r, starts + GROUP, w))
        x0, x3 = _moved_right(x2, before), _moved_left(x1, after)
        x = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    return x


@triton.jit
def _gated(douts, gates, shifts, ok, exists, r, columns, w):  # [A], [M] -> [A, M]
    value = _load(douts, ok, r, columns, 2 * w)
    if shifts is not None:
        value += shifts[:, None]
    if gates is not None:
        value += value * _load(gates, exists, r, columns, 2 * w)
    return value


@triton.jit
def _starts(column, COUNT: tl.constexpr, GROUP: tl.constexpr):  # -> [2 * COUNT]
    """The first two columns of every group: what is read in pairs is laid out along the row, as the groups are."""
    i = tl.arange(0, 2 * COUNT)
    return column + i // 2 * GROUP + i % 2


@triton.jit
def _unpaired(x):  # [A, 2 M] -> even and odd columns [A, M]
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _moved_right(x, first):  # [A, K], [A, G] -> [A, K]
    """Column k - 1 at k, within groups of K / G columns, which begin with ``first``: moves between registers only."""
    SHAPE: tl.constexpr = [first.shape[0], first.shape[1], x.shape[1] // first.shape[1] // 2, 2]
    even, odd = tl.split(tl.reshape(x, SHAPE))
    if SHAPE[2] == 1:
        moved = tl.expand_dims(first, 2)
    else:
        tl.static_assert(SHAPE[2] == 2)
        moved = tl.join(first, tl.split(odd)[0])
    return tl.reshape(tl.join(moved, even), x.shape)


@triton.jit
def _moved_left(x, last):  # [A, K], [A, G] -> [A, K]
    """Column k + 1 at k, within groups of K / G columns, which end with ``last``."""
    SHAPE: tl.constexpr = [last.shape[0], last.shape[1], x.shape[1] // last.shape[1] // 2, 2]
    even, odd = tl.split(tl.reshape(x, SHAPE))
    if SHAPE[2] == 1:
        moved = tl.expand_dims(last, 2)
    else:
        tl.static_assert(SHAPE[2] == 2)
        moved = tl.join(tl.split(even)[1], last)
    return tl.reshape(tl.join(odd, moved), x.shape)


@triton.jit
def _lines(x, strides, n, c):  # the lines of a tensor: where each begins, and how to go on from there
    return x + n * strides[0] + c * strides[1], strides


@triton.jit
def _of_channels(x, stride, n, c, ok):  # [N, C] float32 -> [A]
    return tl.load(x + n * stride + c, mask=ok, other=0.0)


@triton.jit
def _at(lines, r, columns):  # [A], scalar or [A], [M] -> addresses [A, M]
    starts = lines[0] + tl.cast(r, tl.int64) * lines[1][2]
    return starts[:, None] + columns.to(tl.int64)[None, :] * lines[1][3]


@triton.jit
def _exists(r, h):  # scalar or [A] -> [1] or [A]: the interpreter cannot mix scalars into masks
    r = tl.cast(r, tl.int32) + tl.zeros([1], tl.int32)
    return (r >= 0) & (r < h)


@triton.jit
def _load(lines, ok, r, columns, w):  # [A], [M] -> [A, M]
    """Columns of row r of every line, 0 outside the image."""
    inside = ok[:, None] & ((columns >= 0) & (columns < w))[None, :]
    return tl.load(_at(lines, r, columns), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x, lines, ok, r, columns, w):
    tl.store(_at(lines, r, columns), x, mask=ok[:, None] & (columns < w)[None, :])


@triton.jit
def _pairs(lines, ok, r, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # [A] -> [A, K, 2]
    """Columns 2k and 2k + 1 of row r of every line."""
    if CHANNELS_LAST:
        k = column + tl.arange(0, K)
        pairs = tl.join(_load(lines, ok, r, 2 * k, 2 * w), _load(lines, ok, r, 2 * k + 1, 2 * w))
    else:
        row = _load(lines, ok, r, 2 * column + tl.arange(0, 2 * K), 2 * w)
        pairs = tl.reshape(row, [row.shape[0], K, 2])
    return pairs


@triton.jit
def _shifted(douts, shifts, ok, r, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # -> [A, K, 2]
    pairs = _pairs(douts, ok, r, column, w, K, CHANNELS_LAST)
    if shifts is not None:
        pairs += shifts[:, None, None]
    return pairs


@triton.jit
def _store_pairs(pairs, lines, ok, r, column, w, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        k = column + tl.arange(0, pairs.shape[1])
        even, odd = tl.split(pairs)
        _store(even, lines, ok, r, 2 * k, 2 * w)
        _store(odd, lines, ok, r, 2 * k + 1, 2 * w)
    else:
        columns = 2 * column + tl.arange(0, 2 * pairs.shape[1])
        _store(tl.reshape(pairs, [pairs.shape[0], 2 * pairs.shape[1]]), lines, ok, r, columns, 2 * w)


@triton.jit
def _store_sums(x, sums, strides, n, tile, c, ok):  # x [A, K]
    tl.store(sums + n * strides[0] + tile.to(tl.int64) * strides[1] + c, tl.sum(x, 1), mask=ok)


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is launched with; ``tiles`` of pixels have their own sums."""

    kernel: triton.JITFunction
    programs: int
    tiles: int
    arguments: dict
    constants: dict
    warps: int = WARPS

    def into(self, sums: Tensor) -> Launch:
        """The same, which also writes its sums over pixels: float32 [N, tiles, C]."""
        return replace(self, arguments=self.arguments | _arguments({"sums": sums}))

    def run(self) -> None:
        if self.programs:
            with torch.cuda.device_of(next(iter(self.arguments.values()))):
                self.kernel[(self.programs,)](
                    **self.arguments, **self.constants, num_warps=self.warps, num_stages=1, enable_fp_fusion=True
                )


def up_forward(y: Tensor, gate: Tensor | None, out: Tensor, rows: int | None = None) -> Launch:
    """out [N, C, 2h, 2w] = (1 + gate [N, 1, 2h, 2w]) * up(y [N, C, h, w])

    With ``rows`` of y for each program, the tiles of an image are the same whatever N is.
    """
    return _walk(_up_forward, y.shape, is_channels_last(y), rows, y=y, gate=gate, out=out, sums=None)


def up_backward(dout: Tensor, gate: Tensor | None, shift: Tensor | None, dy: Tensor) -> Launch:
    """dy [N, C, h, w] = up^T((1 + gate [N, 1, 2h, 2w]) * (dout [N, C, 2h, 2w] + shift [N, C]))"""
    return _walk(_up_backward, dy.shape, is_channels_last(dout), None, dout=dout, gate=gate, shift=shift, dy=dy)


def _walk(kernel, shape, channels_last: bool, rows: int | None, **tensors: Tensor | None) -> Launch:
    (n, c, h, w), itemsize = shape, next(iter(tensors.values())).itemsize
    block_c, block_k = _walk_tile(shape, itemsize, channels_last)
    blocks, across = n * triton.cdiv(c, block_c), triton.cdiv(w, block_k)
    # long walks read fewer rows twice, short ones keep a GPU busy with few images
    if rows is None:
        rows = next((r for r in (16, 8, 4) if blocks * triton.cdiv(h, r) * across >= ENOUGH), 2)
    tiles = triton.cdiv(h, rows) * across
    arguments = _arguments(tensors, C=c, h=h, w=w, rows=rows)
    constants = {"CHANNELS_LAST": channels_last, "BLOCK_C": block_c, "BLOCK_K": block_k}
    return Launch(kernel, blocks * tiles, tiles, arguments, constants, WARPS if channels_last else WALK_WARPS)


def walk_tiles(shape, itemsize: int, rows: int) -> int:
    """Tiles of an image that ``up_forward`` cuts y [N, C, h, w] in channels-last into, given ``rows``."""
    return triton.cdiv(shape[2], rows) * triton.cdiv(shape[3], _walk_tile(shape, itemsize, True)[1])


def _walk_tile(shape, itemsize: int, channels_last: bool) -> tuple[int, int]:
    """Channels and columns of a tile of y. A thread has 16 bytes: of channels, or of the outputs in a row."""
    if channels_last:
        block_c = _block(shape[1], 128 // itemsize, 64 // itemsize)
        return block_c, 32 * WARPS * 16 // itemsize // block_c
    block_k = _block(shape[3], 64, 16)
    return WALK_CHANNELS * 32 * WALK_WARPS * 8 // itemsize // block_k, block_k


def gate_backward(dout: Tensor, shift: Tensor | None, y: Tensor, dgates: Tensor) -> Launch:
    """dgates [parts, N, 1, 2h, 2w] = the sum over a part of the channels of (dout + shift) * up(y [N, C, h, w])"""
    tensors = {"dout": dout, "shift": shift, "y": y, "dgate": dgates}
    if is_channels_last(y):
        return _walk(_gate_backward_channels_last, y.shape, True, None, **tensors)
    (n, c, h, w), (rows, block_k) = y.shape, _gate_tile(y)
    tiles, channels = triton.cdiv(h, rows) * triton.cdiv(w, block_k), triton.cdiv(c, len(dgates))
    arguments = _arguments(tensors, C=c, h=h, w=w, channels=channels)
    constants = {"CHANNELS_LAST": False, "ROWS": rows, "BLOCK_K": block_k}
    return Launch(_gate_backward_contiguous, n * tiles * len(dgates), tiles, arguments, constants, WARPS)


def gate_parts(y: Tensor) -> int:
    """Into how many parts ``gate_backward`` divides the channels, each with a map of its own."""
    n, c, h, w = y.shape
    if is_channels_last(y):
        return triton.cdiv(c, _walk_tile(y.shape, y.itemsize, True)[0])
    rows, block_k = _gate_tile(y)
    programs = max(n * triton.cdiv(h, rows) * triton.cdiv(w, block_k), 1)
    # so that few pixels still keep a GPU busy; but a map of float32 should be little beside its channels
    parts = min(triton.cdiv(ENOUGH, programs), triton.cdiv(c, 32))
    return triton.cdiv(c, triton.cdiv(c, parts))


def _gate_tile(y: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile of a contiguous tensor."""
    block_k = _block(y.shape[3], 64, 16)
    return 32 * WARPS * 8 // y.itemsize // block_k, block_k


def affine(x: Tensor, out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Launch:
    """out = x * scale + shift, for [N, C, H, W] and float32 [N, C]"""
    x, out = _flat(x, out)
    return _point(_affine, x=x, scale=scale, shift=shift, out=out, sums=None)


def dot(a: Tensor, b: Tensor | None) -> Launch:
    """The sums over pixels of a * b, of a alone without b, for ``sums``."""
    a, *others = _flat(a) if b is None else _flat(a, b)
    return _point(_dot, a=a, b=others[0] if others else None, sums=None)


def moments(x: Tensor, pivot: Tensor) -> Launch:
    """The sums over pixels of x - pivot [N, C], then of its square, for ``two_sums``."""
    (x,) = _flat(x)
    return _point(_moments, x=x, shift=pivot, sums=None)


def norm(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, out: Tensor) -> Launch:
    """out = relu(x * scale + shift + residual), for [N, C, H, W] and float32 [N, C]"""
    x, residual, out = _flat(x, residual, out)
    return _point(_norm, x=x, residual=residual, scale=scale, shift=shift, out=out, bytes=HALF)


def norm_sums(dout: Tensor, y: Tensor, x: Tensor, mean: Tensor, out: Tensor | None) -> Launch:
    """out = dout where y > 0, else 0; for ``two_sums`` its sums over pixels, then those of out * (x - mean)."""
    dout, y, x, out = _flat(dout, y, x, out)
    return _point(_norm_sums, dout=dout, y=y, x=x, shift=mean, out=out, sums=None, bytes=HALF)


def norm_backward(
    dout: Tensor, y: Tensor | None, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, out: Tensor
) -> Launch:
    """out = g * scale + x * slope + shift, with g = dout where y > 0, else 0; g = dout without y."""
    dout, y, x, out = _flat(dout, y, x, out)
    return _point(_norm_backward, dout=dout, y=y, x=x, scale=scale, slope=slope, shift=shift, out=out, bytes=HALF)


def _point(kernel, bytes: int = 64, **tensors: Tensor | None) -> Launch:
    """``bytes`` of each tensor a thread."""
    main = next(iter(tensors.values()))
    (n, c, h, w), itemsize = main.shape, main.itemsize
    elements = 32 * WARPS * bytes // itemsize
    if is_channels_last(main):
        block_c = _block(c, 256 // itemsize, 64 // itemsize)
        block_k = elements // block_c
    else:
        block_k = _block(w, elements, 16)
        block_c = elements // block_k
    tiles = h * triton.cdiv(w, block_k)
    constants = {"CHANNELS_LAST": is_channels_last(main), "BLOCK_C": block_c, "BLOCK_K": block_k}
    return Launch(kernel, n * triton.cdiv(c, block_c) * tiles, tiles, _arguments(tensors, C=c, h=h, w=w), constants)


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    """Images as single rows of pixels, where that is how all of them lie in memory."""
    n, _, h, w = tensors[0].shape
    if h * w < 2**30 and all(x is None or x.stride(2) == w * x.stride(3) for x in tensors):
        return [None if x is None else x.view(n, x.shape[1], 1, h * w) for x in tensors]
    return list(tensors)


def sums(*launches: Launch) -> Tensor:
    """Runs launches that each write some channels of a concatenation; its sums over pixels, float32 [N, C]."""
    first = launches[0].arguments
    x = next(iter(first.values()))
    tiles, channels = max(each.tiles for each in launches), [each.arguments["C"] for each in launches]
    partial = torch.zeros((len(x), tiles, sum(channels)), dtype=torch.float32, device=x.device)
    for each, place in zip(launches, partial.split(channels, 2), strict=True):
        each.into(place).run()
    return partial.sum(1)


def two_sums(launch: Launch) -> Tensor:
    """Runs a launch that writes two sums for each channel; both over batch and pixels, float64 [2 C]."""
    x, channels = next(iter(launch.arguments.values())), launch.arguments["C"]
    partial = torch.empty((len(x), launch.tiles, 2 * channels), dtype=torch.float32, device=x.device)
    launch.into(partial).run()
    return partial.sum((0, 1), dtype=torch.float64)


def why_not(main: Tensor, others: Iterable[Tensor | None]) -> str | None:
    """Why the kernels cannot run on these tensors, which are read in the layout of ``main``."""
    tensors = [main, *(x for x in others if x is not None)]
    for x in tensors:
        if x.device != main.device:
            return f"needs all tensors on one device, got {main.device} and {x.device}"
    reason = why_not_device(main.device)
    return reason or why_no_kernel([x for x in tensors if x.ndim == 4], is_channels_last(main))


def why_not_device(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, or None where they can."""
    if device.type != "cuda":
        return None if INTERPRETED and device.type == "cpu" else f"needs CUDA tensors, got {device.type}"
    if capability(device) < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, capability(device)))}"
    if not _can_build_launchers():
        return "needs a C compiler and Python's headers: Triton builds the launchers of its kernels with them"
    return None


capability = cache(torch.cuda.get_device_capability)


@cache
def _can_build_launchers() -> bool:
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.is_file() and any(shutil.which(name) for name in compilers if name)


def _arguments(tensors: dict[str, Tensor | None], **sizes: int) -> dict:
    """Every tensor with its strides, in the order of the kernels' parameters."""
    arguments = {}
    for name, x in tensors.items():
        arguments[name] = x
        stride = None if x is None else x.stride()
        if name in ("scale", "shift", "slope"):
            arguments[f"{name}_stride"] = stride and stride[0]
        else:
            arguments[f"{name}_strides"] = stride
    return arguments | sizes


def _block(size: int, largest: int, smallest: int) -> int:
    """The largest power of two that wastes less than an eighth on ``size``."""
    block = largest
    while block > smallest and triton.cdiv(size, block) * block > 1.125 * size:
        block //= 2
    return block
