"""The kernels of the fused operations, in Triton: made of ``_triton_tiles``, launched by ``_triton_launch``.

Strides are arguments, so that slices of larger tensors are read as they are; Triton compiles into a kernel which of
them are 1 and which are multiples of 16. Sums over pixels are written tile by tile and added afterwards, always in the
same order: there are no atomics.
"""

import triton
import triton.language as tl

from . import _triton_tiles as tiles


@triton.jit
def up_forward(
    y, y_strides, gate, gate_strides, out, out_strides, sums, sums_strides, C, h, w, rows,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = (1 + gate) * up(y), and its sums: [BLOCK_C, 2 rows, 2 BLOCK_K] outputs a program.

    A program walks down y with three of its rows, already widened, in registers. It reads (rows + 2) / rows of y, which
    is a fifth of the traffic and comes from L2 where a neighbour read it. Then instructions are what limits it: it
    spends 7 to 11 on an output, and at 85 % of its copy bandwidth an H200 has 20 for one of 2 bytes (128 a clock and
    multiprocessor). Four reads and three interpolations for every output would not fit.
    """
    n, block, row, column, tile = tiles.place(C, h, w, rows, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    ys, outs = tiles.lines_of(y, y_strides, n, c), tiles.lines_of(out, out_strides, n, c)
    gates = None if gate is None else tiles.lines_of(gate, gate_strides, n, tl.zeros([1], tl.int64))
    above = tiles.up_row(ys, ok, row - 1, h, column, w, BLOCK_K, CHANNELS_LAST)  # [BLOCK_C, BLOCK_K, 2]
    here = tiles.up_row(ys, ok, row, h, column, w, BLOCK_K, CHANNELS_LAST)
    GROUP: tl.constexpr = 1 if CHANNELS_LAST else 64 // y.dtype.element_ty.primitive_bitwidth
    SHAPE: tl.constexpr = [BLOCK_C, BLOCK_K // GROUP, 2 * GROUP]  # in the last axis what a thread adds by itself
    total = tl.zeros([BLOCK_C, BLOCK_K // GROUP], tl.float32)
    for r in range(row, tl.minimum(row + rows, h)):
        below = tiles.up_row(ys, ok, r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        pairs, odd = tiles.interpolated(r, h, above, here, below)
        for row_of_pair in tl.static_range(2):
            out_r = 2 * r + row_of_pair
            if gate is not None:
                pairs += pairs * tiles.load_pairs(
                    gates, tiles.row_exists(r, h), out_r, column, w, BLOCK_K, CHANNELS_LAST
                )
            tiles.store_pairs(pairs, outs, ok, out_r, column, w, CHANNELS_LAST)
            if sums is not None:
                total += tl.sum(tl.reshape(pairs, SHAPE), 2)
            pairs = odd
        above, here = here, below
    if sums is not None:
        tiles.store_sums(total, sums, sums_strides, n, tile, c, ok)


@triton.jit
def up_backward(
    dout, dout_strides, gate, gate_strides, shift, shift_stride, dy, dy_strides, C, h, w, rows,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dy = up^T((1 + gate) * (dout + shift)): [BLOCK_C, rows, BLOCK_K] a program.

    A program walks down dout with four of its rows, already gathered along their columns, in registers.
    """
    n, block, row, column, _ = tiles.place(C, h, w, rows, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    douts, dys = tiles.lines_of(dout, dout_strides, n, c), tiles.lines_of(dy, dy_strides, n, c)
    gates = None if gate is None else tiles.lines_of(gate, gate_strides, n, tl.zeros([1], tl.int64))
    shifts = None if shift is None else tiles.of_channels(shift, shift_stride, n, c, ok)
    k = tiles.inputs(dys, column, BLOCK_K, CHANNELS_LAST)
    # [BLOCK_C, BLOCK_K] each
    x0 = tiles.narrowed(douts, gates, shifts, ok, 2 * row - 1, h, column, w, BLOCK_K, CHANNELS_LAST)
    x1 = tiles.narrowed(douts, gates, shifts, ok, 2 * row, h, column, w, BLOCK_K, CHANNELS_LAST)
    for r in range(row, tl.minimum(row + rows, h)):
        x2 = tiles.narrowed(douts, gates, shifts, ok, 2 * r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        x3 = tiles.narrowed(douts, gates, shifts, ok, 2 * r + 2, h, column, w, BLOCK_K, CHANNELS_LAST)
        w0, w1, w2, w3 = tiles.gathering(r, h)
        tiles.store(w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3, dys, ok, r, k, w)
        x0, x1 = x2, x3


@triton.jit
def gate_backward_channels_last(
    dout, dout_strides, shift, shift_stride, y, y_strides, dgate, dgate_strides, C, h, w, rows,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dgate = sums over BLOCK_C channels of (dout + shift) * up(y): [2 rows, 2 BLOCK_K] a program.

    A program walks down y as in ``up_forward``; the channels of a pixel lie within a warp.
    """
    n, block, row, column, _ = tiles.place(C, h, w, rows, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    ys, douts = tiles.lines_of(y, y_strides, n, c), tiles.lines_of(dout, dout_strides, n, c)
    columns, rows_of_pair = 2 * column + tl.arange(0, 2 * BLOCK_K), tl.arange(0, 2)
    dgates = dgate + block.to(tl.int64) * dgate_strides[0] + n * dgate_strides[1]
    dgates += columns.to(tl.int64)[:, None] * dgate_strides[4] + rows_of_pair.to(tl.int64)[None, :] * dgate_strides[3]
    shifts = None if shift is None else tiles.of_channels(shift, shift_stride, n, c, ok)
    above = tiles.up_row(ys, ok, row - 1, h, column, w, BLOCK_K, CHANNELS_LAST)
    here = tiles.up_row(ys, ok, row, h, column, w, BLOCK_K, CHANNELS_LAST)
    for r in range(row, tl.minimum(row + rows, h)):
        below = tiles.up_row(ys, ok, r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        dout_even = tiles.load_shifted(douts, shifts, ok, 2 * r, column, w, BLOCK_K, CHANNELS_LAST)
        dout_odd = tiles.load_shifted(douts, shifts, ok, 2 * r + 1, column, w, BLOCK_K, CHANNELS_LAST)
        even, odd = tiles.interpolated(r, h, above, here, below)  # [BLOCK_C, BLOCK_K, 2]
        total = tl.reshape(tl.sum(tl.join(even * dout_even, odd * dout_odd), 0), [2 * BLOCK_K, 2])
        tl.store(dgates + tl.cast(2 * r, tl.int64) * dgate_strides[3], total, mask=(columns < 2 * w)[:, None])
        above, here = here, below


@triton.jit
def gate_backward_contiguous(
    dout, dout_strides, shift, shift_stride, y, y_strides, dgate, dgate_strides, C, h, w, channels,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dgate = sums over ``channels`` of (dout + shift) * up(y): [2 ROWS, 2 BLOCK_K] a program.

    A program walks through the channels, so that a sum stays in its thread. What rows of y share comes from L1.
    """
    n, part, row, column, _ = tiles.place(C, h, w, ROWS, channels, BLOCK_K, CHANNELS_LAST)
    r = row + tl.arange(0, ROWS)
    ok = r < h
    one = tl.zeros([1], tl.int64)
    even = tl.zeros([ROWS, BLOCK_K, 2], tl.float32)
    odd = tl.zeros([ROWS, BLOCK_K, 2], tl.float32)
    for c in range(part * channels, tl.minimum(part * channels + channels, C)):
        ys, douts = tiles.lines_of(y, y_strides, n, c + one), tiles.lines_of(dout, dout_strides, n, c + one)
        shifts = None if shift is None else tiles.of_channels(shift, shift_stride, n, c + one, one == 0)
        above = tiles.load_taps(ys, ok, r - 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        here = tiles.load_taps(ys, ok, r, h, column, w, BLOCK_K, CHANNELS_LAST)
        below = tiles.load_taps(ys, ok, r + 1, h, column, w, BLOCK_K, CHANNELS_LAST)
        before_even, before_odd = tiles.interpolated(r[:, None], h, above[0], here[0], below[0])
        here_even, here_odd = tiles.interpolated(r[:, None], h, above[1], here[1], below[1])
        after_even, after_odd = tiles.interpolated(r[:, None], h, above[2], here[2], below[2])
        dout_even = tiles.load_shifted(douts, shifts, ok, 2 * r, column, w, BLOCK_K, CHANNELS_LAST)
        dout_odd = tiles.load_shifted(douts, shifts, ok, 2 * r + 1, column, w, BLOCK_K, CHANNELS_LAST)
        even += dout_even * tiles.widened((before_even, here_even, after_even), column, w, CHANNELS_LAST)
        odd += dout_odd * tiles.widened((before_odd, here_odd, after_odd), column, w, CHANNELS_LAST)
    dgates = dgate + part.to(tl.int64) * dgate_strides[0] + n * dgate_strides[1] + one, dgate_strides[1:]
    tiles.store_pairs(even, dgates, ok, 2 * r, column, w, CHANNELS_LAST)
    tiles.store_pairs(odd, dgates, ok, 2 * r + 1, column, w, CHANNELS_LAST)


@triton.jit
def affine(
    x, x_strides, scale, scale_stride, shift, shift_stride, out, out_strides, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x * scale + shift, and its sums: [BLOCK_C, BLOCK_K] a program, with four times 16 bytes a thread."""
    n, block, row, column, tile = tiles.place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = tiles.load(tiles.lines_of(x, x_strides, n, c), ok, row, columns, w)
    if scale is not None:
        value *= tiles.of_channels(scale, scale_stride, n, c, ok)[:, None]
    if shift is not None:
        value += tiles.of_channels(shift, shift_stride, n, c, ok)[:, None]
    tiles.store(value, tiles.lines_of(out, out_strides, n, c), ok, row, columns, w)
    if sums is not None:
        value = tl.where((columns < w)[None, :], value, 0.0)
        tiles.store_sums(value, sums, sums_strides, n, tile, c, ok)


@triton.jit
def dot(
    a, a_strides, b, b_strides, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of a * b, of a alone without b: [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, tile = tiles.place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = tiles.load(tiles.lines_of(a, a_strides, n, c), ok, row, columns, w)
    if b is not None:
        value *= tiles.load(tiles.lines_of(b, b_strides, n, c), ok, row, columns, w)
    tiles.store_sums(value, sums, sums_strides, n, tile, c, ok)


@triton.jit
def moments(
    x, x_strides, shift, shift_stride, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of x - shift, and C channels on those of its square: [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, tile = tiles.place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = tiles.load(tiles.lines_of(x, x_strides, n, c), ok, row, columns, w)
    value -= tiles.of_channels(shift, shift_stride, n, c, ok)[:, None]
    value = tl.where((columns < w)[None, :], value, 0.0)
    tiles.store_sums(value, sums, sums_strides, n, tile, c, ok)
    tiles.store_sums(value * value, sums, sums_strides, n, tile, C + c, ok)


@triton.jit
def norm(
    x, x_strides, residual, residual_strides, scale, scale_stride, shift, shift_stride, out, out_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = relu(x * scale + shift + residual): [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, _ = tiles.place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = tiles.load(tiles.lines_of(x, x_strides, n, c), ok, row, columns, w)
    value *= tiles.of_channels(scale, scale_stride, n, c, ok)[:, None]
    value += tiles.of_channels(shift, shift_stride, n, c, ok)[:, None]
    if residual is not None:
        value += tiles.load(tiles.lines_of(residual, residual_strides, n, c), ok, row, columns, w)
    value = tl.where(value < 0.0, 0.0, value)  # NaN stays
    tiles.store(value, tiles.lines_of(out, out_strides, n, c), ok, row, columns, w)


@triton.jit
def norm_sums(
    dout, dout_strides, y, y_strides, x, x_strides, shift, shift_stride, out, out_strides, sums, sums_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = dout where y > 0; its sums, and C channels on those of out * (x - shift): [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, tile = tiles.place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    value = _behind_relu(dout, dout_strides, y, y_strides, n, c, ok, row, columns, w)
    if out is not None:
        tiles.store(value, tiles.lines_of(out, out_strides, n, c), ok, row, columns, w)
    tiles.store_sums(value, sums, sums_strides, n, tile, c, ok)
    centred = tiles.load(tiles.lines_of(x, x_strides, n, c), ok, row, columns, w)
    centred -= tiles.of_channels(shift, shift_stride, n, c, ok)[:, None]
    tiles.store_sums(value * centred, sums, sums_strides, n, tile, C + c, ok)


@triton.jit
def norm_backward(
    dout, dout_strides, y, y_strides, x, x_strides, scale, scale_stride, slope, slope_stride, shift, shift_stride,
    out, out_strides, C, h, w,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = g * scale + x * slope + shift, with g = dout where y > 0, else 0: [BLOCK_C, BLOCK_K] a program."""
    n, block, row, column, _ = tiles.place(C, h, w, 1, BLOCK_C, BLOCK_K, CHANNELS_LAST)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    ok = c < C
    columns = column + tl.arange(0, BLOCK_K)
    if y is not None:
        value = _behind_relu(dout, dout_strides, y, y_strides, n, c, ok, row, columns, w)
    else:
        value = tiles.load(tiles.lines_of(dout, dout_strides, n, c), ok, row, columns, w)
    value *= tiles.of_channels(scale, scale_stride, n, c, ok)[:, None]
    own = tiles.load(tiles.lines_of(x, x_strides, n, c), ok, row, columns, w)
    value += own * tiles.of_channels(slope, slope_stride, n, c, ok)[:, None]
    value += tiles.of_channels(shift, shift_stride, n, c, ok)[:, None]
    tiles.store(value, tiles.lines_of(out, out_strides, n, c), ok, row, columns, w)


@triton.jit
def _behind_relu(dout, dout_strides, y, y_strides, n, c, ok, row, columns, w):
    value = tiles.load(tiles.lines_of(dout, dout_strides, n, c), ok, row, columns, w)
    return tl.where(tiles.load(tiles.lines_of(y, y_strides, n, c), ok, row, columns, w) <= 0.0, 0.0, value)
