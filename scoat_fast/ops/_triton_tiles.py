"""What the Triton kernels of the fused operations share: tiles of images, and bilinear upsampling of their rows.

A tile is [lines, columns]: a line is a channel, or in ``gate_backward`` of contiguous tensors a row; columns are pixels
of a row. One of the two axes is dense in memory and moves in pieces of 16 bytes: the columns of contiguous tensors, the
channels of channels-last ones.

Upsampling works on pairs of outputs, 2k and 2k + 1, from the inputs k - 1, k and k + 1. A pair is the last axis of
[lines, columns, 2], in the registers of one thread.
"""

import triton
import triton.language as tl


@triton.jit
def place(C, h, w, rows, channels, BLOCK_K: tl.constexpr, CHANNELS_LAST: tl.constexpr):
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
def interpolated(r, h, above, here, below):
    """Outputs 2r and 2r + 1 along an axis of h, from the inputs r - 1, r and r + 1."""
    inverse = 1.0 / (2.0 * h - 1.0)
    up, down = r * inverse, (h - 1 - r) * inverse
    return up * above + (1 - up) * here, (1 - down) * here + down * below


@triton.jit
def gathering(r, h):
    """The weights with which input r of an axis of h gets from the outputs 2r - 1 to 2r + 2, as far as these exist."""
    inverse = 1.0 / (2.0 * h - 1.0)
    first, last = tl.where(r > 0, (h - r) * inverse, 0.0), tl.where(r < h - 1, (r + 1) * inverse, 0.0)
    return first, (2 * h - 1 - r) * inverse, (h + r) * inverse, last


@triton.jit
def load_taps(lines, ok, r, h, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Columns k - 1, k and k + 1 of row r of every line, 0 where there is none: what outputs 2k and 2k + 1 come from.

    Channels-last: three times [A, K]. Contiguous: [A, K] in the middle, which a thread holds in groups, and the column
    before and the one after every group, [A, K / GROUP].
    """
    ok = ok & row_exists(r, h)
    k = inputs(lines, column, K, CHANNELS_LAST)
    here = load(lines, ok, r, k, w)
    if CHANNELS_LAST:
        before, after = load(lines, ok, r, k - 1, w), load(lines, ok, r, k + 1, w)
    else:
        GROUP: tl.constexpr = 64 // lines[0].dtype.element_ty.primitive_bitwidth
        starts = group_starts(column, K // GROUP, GROUP)
        _, before = unpaired(load(lines, ok, r, starts - 2, w))
        after, _ = unpaired(load(lines, ok, r, starts + GROUP, w))
    return before, here, after


@triton.jit
def inputs(lines, column, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """K columns of y. In contiguous tensors a thread holds as many side by side as make 16 bytes of outputs."""
    k = column + tl.arange(0, K)
    if not CHANNELS_LAST:
        k = tl.max_contiguous(k, 64 // lines[0].dtype.element_ty.primitive_bitwidth)
    return k


@triton.jit
def up_row(ys, ok, r, h, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # -> [A, K, 2]
    return widened(load_taps(ys, ok, r, h, column, w, K, CHANNELS_LAST), column, w, CHANNELS_LAST)


@triton.jit
def widened(taps, column, w, CHANNELS_LAST: tl.constexpr):  # -> [A, K, 2]
    """Outputs 2k and 2k + 1 of a row, 0 outside the image."""
    before, here, after = taps
    if not CHANNELS_LAST:
        before, after = moved_right(here, before), moved_left(here, after)
    k = column + tl.arange(0, here.shape[1])
    even, odd = interpolated(tl.where(k < w, k, 0)[None, :], w, before, here, after)  # else input w - 1 would count
    return tl.join(even, odd)


@triton.jit
def narrowed(douts, gates, shifts, ok, r, h, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # -> [A, K]
    """Row r of (1 + gate) * (dout + shift) of every line, gathered along its columns."""
    exists = row_exists(r, 2 * h)
    ok = ok & exists
    k = column + tl.arange(0, K)
    w0, w1, w2, w3 = gathering(k[None, :], w)
    if CHANNELS_LAST:  # the gates go into the weights, which all channels share
        x0, x1 = load(douts, ok, r, 2 * k - 1, 2 * w), load(douts, ok, r, 2 * k, 2 * w)
        x2, x3 = load(douts, ok, r, 2 * k + 1, 2 * w), load(douts, ok, r, 2 * k + 2, 2 * w)
        if gates is not None:
            w0 += w0 * load(gates, exists, r, 2 * k - 1, 2 * w)
            w1 += w1 * load(gates, exists, r, 2 * k, 2 * w)
            w2 += w2 * load(gates, exists, r, 2 * k + 1, 2 * w)
            w3 += w3 * load(gates, exists, r, 2 * k + 2, 2 * w)
        x = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        if shifts is not None:
            x += (w0 + w1 + w2 + w3) * shifts[:, None]
    else:
        GROUP: tl.constexpr = 128 // douts[0].dtype.element_ty.primitive_bitwidth
        starts = group_starts(2 * column, 2 * K // GROUP, GROUP)
        x1, x2 = unpaired(load_gated(douts, gates, shifts, ok, exists, r, 2 * column + tl.arange(0, 2 * K), w))
        _, before = unpaired(load_gated(douts, gates, shifts, ok, exists, r, starts - 2, w))
        after, _ = unpaired(load_gated(douts, gates, shifts, ok, exists, r, starts + GROUP, w))
        x0, x3 = moved_right(x2, before), moved_left(x1, after)
        x = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    return x


@triton.jit
def load_gated(douts, gates, shifts, ok, exists, r, columns, w):  # [A], [M] -> [A, M]
    value = load(douts, ok, r, columns, 2 * w)
    if shifts is not None:
        value += shifts[:, None]
    if gates is not None:
        value += value * load(gates, exists, r, columns, 2 * w)
    return value


@triton.jit
def group_starts(column, COUNT: tl.constexpr, GROUP: tl.constexpr):  # -> [2 * COUNT]
    """The first two columns of every group: what is read in pairs is laid out along the row, as the groups are."""
    i = tl.arange(0, 2 * COUNT)
    return column + i // 2 * GROUP + i % 2


@triton.jit
def unpaired(x):  # [A, 2 M] -> even and odd columns [A, M]
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def moved_right(x, first):  # [A, K], [A, G] -> [A, K]
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
def moved_left(x, last):  # [A, K], [A, G] -> [A, K]
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
def lines_of(x, strides, n, c):  # the lines of a tensor: where each begins, and how to go on from there
    return x + n * strides[0] + c * strides[1], strides


@triton.jit
def of_channels(x, stride, n, c, ok):  # [N, C] float32 -> [A]
    return tl.load(x + n * stride + c, mask=ok, other=0.0)


@triton.jit
def at(lines, r, columns):  # [A], scalar or [A], [M] -> addresses [A, M]
    starts = lines[0] + tl.cast(r, tl.int64) * lines[1][2]
    return starts[:, None] + columns.to(tl.int64)[None, :] * lines[1][3]


@triton.jit
def row_exists(r, h):  # scalar or [A] -> [1] or [A]: the interpreter cannot mix scalars into masks
    r = tl.cast(r, tl.int32) + tl.zeros([1], tl.int32)
    return (r >= 0) & (r < h)


@triton.jit
def load(lines, ok, r, columns, w):  # [A], [M] -> [A, M]
    """Columns of row r of every line, 0 outside the image."""
    inside = ok[:, None] & ((columns >= 0) & (columns < w))[None, :]
    return tl.load(at(lines, r, columns), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(x, lines, ok, r, columns, w):
    tl.store(at(lines, r, columns), x, mask=ok[:, None] & (columns < w)[None, :])


@triton.jit
def load_pairs(lines, ok, r, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # [A] -> [A, K, 2]
    """Columns 2k and 2k + 1 of row r of every line."""
    if CHANNELS_LAST:
        k = column + tl.arange(0, K)
        pairs = tl.join(load(lines, ok, r, 2 * k, 2 * w), load(lines, ok, r, 2 * k + 1, 2 * w))
    else:
        row = load(lines, ok, r, 2 * column + tl.arange(0, 2 * K), 2 * w)
        pairs = tl.reshape(row, [row.shape[0], K, 2])
    return pairs


@triton.jit
def load_shifted(douts, shifts, ok, r, column, w, K: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # -> [A, K, 2]
    pairs = load_pairs(douts, ok, r, column, w, K, CHANNELS_LAST)
    if shifts is not None:
        pairs += shifts[:, None, None]
    return pairs


@triton.jit
def store_pairs(pairs, lines, ok, r, column, w, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        k = column + tl.arange(0, pairs.shape[1])
        even, odd = tl.split(pairs)
        store(even, lines, ok, r, 2 * k, 2 * w)
        store(odd, lines, ok, r, 2 * k + 1, 2 * w)
    else:
        columns = 2 * column + tl.arange(0, 2 * pairs.shape[1])
        store(tl.reshape(pairs, [pairs.shape[0], 2 * pairs.shape[1]]), lines, ok, r, columns, 2 * w)


@triton.jit
def store_sums(x, sums, strides, n, tile, c, ok):  # x [A, K]
    tl.store(sums + n * strides[0] + tile.to(tl.int64) * strides[1] + c, tl.sum(x, 1), mask=ok)
