"""The steps of the engine in Triton. A tile is some pixels of one slice and a block of output channels.

Features are [N, H, W, C] with any step from pixel to pixel. A convolution is one matrix product: a row of the left
matrix is a pixel, its columns run over the taps and the channels of every source in turn. The order of a sum depends on
no batch size, so that equal slices give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def convolve(
    x0, x0_strides, x1, x1_strides, w, w_rows, shortcut_w, shortcut_rows, bias, shortcut_bias, unit, shortcut_unit,
    out, out_strides, shortcut_out, shortcut_strides, pooled, pooled_strides, sums, sums_strides, H, W,
    TAPS: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, OUT: tl.constexpr,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, SHORTCUT_RELU: tl.constexpr, SHORTCUT: tl.constexpr,
    BOXES: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = relu(conv(x0, x1) + bias [+ out]), and its sums; then shortcut_out = the 1x1 convolution of the same.

    With two ROWS, a program computes two tiles, one below the other, and pooled takes the maxima of 2x2 pixels of out;
    NaN stays NaN.

    Weights are [samples, TAPS, channels padded to BN, C0 + C1]; ``w_rows`` is the step from sample to sample in rows, 0
    where all share them. With BOXES, sources and weights are tensor descriptors, whose boxes are pixels of one row:
    what lies outside the image is read as zero, and goes to shared memory as it is. With SWAP channels are the rows of
    the product and pixels its columns, for rows too short to fill a tile of 64.
    """
    n, block, tile = _share(_tiles(H, W, BP, BOXES, ROWS), (OUT + BN - 1) // BN)
    y, x, pixel, inside = _pixels(tile, H, W, BP, BOXES, ROWS)
    channel = block * BN + tl.arange(0, BN)
    ok = inside[:, None] & (channel < OUT)[None, :]
    total = tl.zeros([BN], tl.float32)
    most = tl.zeros([BP, BN], tl.float32)
    for r in tl.static_range(ROWS):
        row = n * w_rows + block * BN
        acc = _empty(BP, BN, SWAP)
        acc = _add(acc, x0, x0_strides, C0, w, row, 0, n, y, x, pixel, inside, H, W, TAPS, C0 + C1, OUT, BP, BN, BK,
                   BOXES, SWAP, STAGES)  # fmt: skip
        if C1 > 0:
            acc = _add(acc, x1, x1_strides, C1, w, row, C0, n, y, x, pixel, inside, H, W, TAPS, C0 + C1, OUT, BP, BN,
                       BK, BOXES, SWAP, STAGES)  # fmt: skip
        places = _places(out, out_strides, n, pixel, channel)
        value = _finished(acc, unit, bias, channel, OUT, SWAP)
        if RESIDUAL == "before":
            value += tl.load(places, mask=ok, other=0.0).to(tl.float32)
        if RELU:
            value = _relu(value)
        if RESIDUAL == "after":
            value += tl.load(places, mask=ok, other=0.0).to(tl.float32)
        tl.store(places, value.to(out.dtype.element_ty), mask=ok)
        if sums is not None:
            total += tl.sum(tl.where(ok, value, 0.0), 0)
        if ROWS == 2:
            most = value if r == 0 else tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
        if SHORTCUT:
            row = n * shortcut_rows + block * BN
            acc = _empty(BP, BN, SWAP)
            acc = _add(acc, x0, x0_strides, C0, shortcut_w, row, 0, n, y, x, pixel, inside, H, W, 1, C0 + C1, OUT, BP,
                       BN, BK, BOXES, SWAP, STAGES)  # fmt: skip
            if C1 > 0:
                acc = _add(acc, x1, x1_strides, C1, shortcut_w, row, C0, n, y, x, pixel, inside, H, W, 1, C0 + C1, OUT,
                           BP, BN, BK, BOXES, SWAP, STAGES)  # fmt: skip
            value = _finished(acc, shortcut_unit, shortcut_bias, channel, OUT, SWAP)
            if SHORTCUT_RELU:
                value = _relu(value)
            places = _places(shortcut_out, shortcut_strides, n, pixel, channel)
            tl.store(places, value.to(shortcut_out.dtype.element_ty), mask=ok)
        y, pixel = y + 1, pixel + W
    if sums is not None:
        to = sums + n.to(tl.int64) * sums_strides[0] + tile.to(tl.int64) * sums_strides[1] + channel
        tl.store(to, total, mask=channel < OUT)
    if ROWS == 2:
        _pool(most, pooled, pooled_strides, n, y // 2 - 1, x, channel, W, OUT, BP, BN)


@triton.jit
def attend(
    row, row_strides, below, below_strides, w, bias, unit, psi, psi_bias, out, H, W, h_inverse, w_inverse,
    C: tl.constexpr, EACH: tl.constexpr, BOXES: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [N, H, W] = sigmoid(psi_bias + sum over channels of psi * relu(W_x row + bias + up(below)))."""
    n, _, tile = _share(_tiles(H, W, BP, BOXES, 1), 1)
    y, x, pixel, inside = _pixels(tile, H, W, BP, BOXES, 1)
    column = pixel % W
    r0, r1, r0_weight, r1_weight = _sources(pixel // W, H // 2, h_inverse)
    c0, c1, c0_weight, c1_weight = _sources(column, W // 2, w_inverse)
    low = below + n.to(tl.int64) * below_strides[0]
    logit = tl.zeros([BP], tl.float32)
    for block in tl.static_range(0, (C + BN - 1) // BN):
        acc = _empty(BP, BN, False)
        acc = _add(acc, row, row_strides, C, w, block * BN, 0, n, y, x, pixel, inside, H, W, 1, C, C, BP, BN, BK, BOXES,
                   False, STAGES)  # fmt: skip
        channel = block * BN + tl.arange(0, BN)
        ok = inside[:, None] & (channel < C)[None, :]
        from_below = tl.zeros([BP, BN], tl.float32)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                r, r_weight = (r0, r0_weight) if i == 0 else (r1, r1_weight)
                c, c_weight = (c0, c0_weight) if j == 0 else (c1, c1_weight)
                at = low + r.to(tl.int64) * below_strides[1] + c * below_strides[2]
                value = tl.load(at[:, None] + channel[None, :], mask=ok, other=0.0).to(tl.float32)
                from_below += (r_weight * c_weight)[:, None] * value
        from_row = _finished(acc, unit, bias, channel, C, False)
        joined = _relu(from_row) + _relu(from_below) if EACH else _relu(from_row + from_below)
        logit += tl.sum(joined * tl.load(psi + channel, mask=channel < C, other=0.0)[None, :], 1)
    map = 1.0 / (1.0 + tl.exp(-(logit + tl.load(psi_bias))))
    tl.store(out + n.to(tl.int64) * H * W + pixel, map.to(out.dtype.element_ty), mask=inside)


@triton.jit
def head(
    x, x_strides, w, bias, logits, mask, threshold, H, W,
    C: tl.constexpr, OUT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A 3x3 convolution to few classes, [N, OUT, H, W], or a mask; w [OUT, 9, C]. Memory is what it waits for."""
    n, _, tile = _share(tl.cdiv(H * W, BP), 1)
    pixel, inside = _flat(tile, H, W, BP)
    row, column, channel = pixel // W, pixel % W, tl.arange(0, BC)
    for k in tl.static_range(OUT):
        total = tl.zeros([BP], tl.float32) + tl.load(bias + k)
        for tap in tl.static_range(9):
            ok = inside & _in_image(row + tap // 3 - 1, column + tap % 3 - 1, H, W)
            moved = pixel + (tap // 3 - 1) * W + tap % 3 - 1
            ok2 = ok[:, None] & (channel < C)[None, :]
            value = tl.load(_places(x, x_strides, n, moved, channel), mask=ok2, other=0.0).to(tl.float32)
            total += tl.sum(value * tl.load(w + (k * 9 + tap) * C + channel, mask=channel < C, other=0.0)[None, :], 1)
        place = (n.to(tl.int64) * OUT + k) * H * W + pixel
        if mask is not None:
            limit = tl.load(threshold)
            found = tl.where(total <= limit, 0, 1)  # NaN is no clean zero
            tl.store(mask + place, found.to(tl.uint8), mask=inside)
        else:
            tl.store(logits + place, total, mask=inside)


@triton.jit
def means(sums, strides, out, out_stride, parts, pixels, C, BC: tl.constexpr):
    """out [N, C] = the sums over all parts, by the pixels; always added in the same order."""
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for part in range(parts):
        total += tl.load(sums + n * strides[0] + part * strides[1] + c, mask=c < C, other=0.0)
    tl.store(out + n * out_stride + c, total / pixels, mask=c < C)


@triton.jit
def excite(means, w1, w2, out, C, R, BC: tl.constexpr, BR: tl.constexpr):
    """out [N, C] = sigmoid(w2 relu(w1 means)), w1 [R, C] and w2 [C, R]: a program a slice."""
    n, r = tl.program_id(0).to(tl.int64), tl.arange(0, BR)
    squeezed = tl.zeros([BR], tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        ok = (r < R)[:, None] & (c < C)[None, :]
        weights = tl.load(w1 + r[:, None] * C + c[None, :], mask=ok, other=0.0)
        squeezed += tl.sum(weights * tl.load(means + n * C + c, mask=c < C, other=0.0)[None, :], 1)
    squeezed = _relu(squeezed)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        ok = (c < C)[:, None] & (r < R)[None, :]
        weights = tl.load(w2 + c[:, None] * R + r[None, :], mask=ok, other=0.0)
        total = tl.sum(weights * squeezed[None, :], 1)
        tl.store(out + n * C + c, 1.0 / (1.0 + tl.exp(-total)), mask=c < C)


@triton.jit
def scale_weights(w, scale, out, rows, C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr):
    """out [N, rows, C] = w [rows, C] * scale [N, C]."""
    n = tl.program_id(1).to(tl.int64)
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * BC + tl.arange(0, BC)
    ok = (row < rows)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    value = tl.load(w + at, mask=ok, other=0.0).to(tl.float32)
    value *= tl.load(scale + n * C + c, mask=c < C, other=0.0)[None, :]
    tl.store(out + n * rows * C + at, value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _share(tiles, BLOCKS: tl.constexpr):
    """Slice, block of channels and tile of a program. Blocks of the same pixels run together: they share a cache."""
    program = tl.program_id(0)
    return program // BLOCKS // tiles, program % BLOCKS, program // BLOCKS % tiles


@triton.jit
def _flat(tile, H, W, BP: tl.constexpr):
    """The pixels of a tile where rows do not matter, and which of them exist."""
    pixel = tile * BP + tl.arange(0, BP)
    return pixel, pixel < H * W


@triton.jit
def _tiles(H, W, BP: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr):
    return H // ROWS * tl.cdiv(W, BP) if BOXES or ROWS == 2 else tl.cdiv(H * W, BP)


@triton.jit
def _pixels(tile, H, W, BP: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr):
    """The (first) row and first column of a tile, its pixels, and which of them exist. Without boxes, of any rows."""
    if BOXES or ROWS == 2:
        across = tl.cdiv(W, BP)
        y, x = tile // across * ROWS, tile % across * BP
        column = x + tl.arange(0, BP)
        pixel, inside = y * W + column, column < W
    else:
        y, x = tile, tile
        pixel, inside = _flat(tile, H, W, BP)
    return y, x, pixel, inside


@triton.jit
def _pool(most, pooled, pooled_strides, n, y, x, channel, W, OUT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Stores the maxima of pairs of pixels, most [BP, BN], into row ``y``; widths are even."""
    left, right = tl.split(tl.permute(tl.reshape(most, [BP // 2, 2, BN]), [0, 2, 1]))
    most = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
    column = x // 2 + tl.arange(0, BP // 2)
    ok = (column < W // 2)[:, None] & (channel < OUT)[None, :]
    places = _places(pooled, pooled_strides, n, y * (W // 2) + column, channel)
    tl.store(places, most.to(pooled.dtype.element_ty), mask=ok)


@triton.jit
def _empty(BP: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    return tl.zeros([BN, BP] if SWAP else [BP, BN], tl.float32)


@triton.jit
def _add(
    acc, x, x_strides, C: tl.constexpr, w, row, FIRST: tl.constexpr, n, y, x0, pixel, inside, H, W, TAPS: tl.constexpr,
    CIN: tl.constexpr, OUT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BOXES: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc + one source [.., C] times its weights: columns FIRST to FIRST + C of rows [TAPS, padded OUT]."""
    PADDED: tl.constexpr = (OUT + BN - 1) // BN * BN
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    if BOXES:
        for i in tl.range(0, TAPS * BLOCKS, num_stages=STAGES):
            tap, k = i // BLOCKS, i % BLOCKS * BK
            dy, dx = (tap // 3 - 1, tap % 3 - 1) if TAPS == 9 else (0, 0)
            left = tl.reshape(x.load([n, y + dy, x0 + dx, k]), [BP, BK])
            right = w.load([row + tap * PADDED, FIRST + k])
            acc = _multiplied(acc, left, right, SWAP)
    else:
        ys, xs, channel = pixel // W, pixel % W, tl.arange(0, BN)
        start = x + n.to(tl.int64) * x_strides[0]
        TOTAL: tl.constexpr = BLOCKS * TAPS if C % BK == 0 else (TAPS * C + BK - 1) // BK
        for i in tl.range(0, TOTAL, num_stages=STAGES):
            if C % BK == 0:  # one tap for the whole block
                tap, k = i // BLOCKS, i % BLOCKS * BK + tl.arange(0, BK)
                dy, dx = (tap // 3 - 1, tap % 3 - 1) if TAPS == 9 else (0, 0)
                seen = (inside & _in_image(ys + dy, xs + dx, H, W))[:, None]
                at = (pixel + dy * W + dx).to(tl.int64)[:, None] * x_strides[2] + k[None, :]
                rows, known = row + tap * PADDED + channel[:, None], channel[:, None] < BN
            else:  # few channels: a block holds several taps
                flat = i * BK + tl.arange(0, BK)
                tap, k = flat // C, flat % C
                dy, dx = (tap // 3 - 1, tap % 3 - 1) if TAPS == 9 else (tap * 0, tap * 0)
                seen = inside[:, None] & _in_image(ys[:, None] + dy[None, :], xs[:, None] + dx[None, :], H, W)
                seen = seen & (tap < TAPS)[None, :]
                at = (pixel[:, None] + (dy * W + dx)[None, :]).to(tl.int64) * x_strides[2] + k[None, :]
                rows, known = row + tap[None, :] * PADDED + channel[:, None], (tap < TAPS)[None, :]
            left = tl.load(start + at, mask=seen, other=0.0)
            right = tl.load(w + rows.to(tl.int64) * CIN + FIRST + k[None, :], mask=known, other=0.0)
            acc = _multiplied(acc, left, right, SWAP)
    return acc


@triton.jit
def _multiplied(acc, left, right, SWAP: tl.constexpr):  # [BP, BK], [BN, BK]
    if SWAP:
        acc = tl.dot(right, tl.trans(left), acc, input_precision="ieee")
    else:
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def _finished(acc, unit, bias, channel, OUT, SWAP: tl.constexpr):  # -> [BP, BN]
    value = tl.trans(acc) if SWAP else acc
    if unit is not None:
        value *= unit
    return value + tl.load(bias + channel, mask=channel < OUT, other=0.0)[None, :]


@triton.jit
def _relu(x):  # NaN stays NaN
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _places(x, strides, n, pixel, channel):  # [BP], [BN] -> addresses [BP, BN]; rows of pixels follow one another
    start = x + n.to(tl.int64) * strides[0]
    return start + pixel.to(tl.int64)[:, None] * strides[2] + channel[None, :]


@triton.jit
def _in_image(y, x, H, W):
    return (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _sources(output, size, inverse):
    """The two inputs of an output of upsampling by two, and their weights: as in ``csrc/resample.h``."""
    k = (output + 1) // 2 - 1
    odd = output % 2 == 1
    first = tl.where(odd, size + k, k + 1).to(tl.float32) * inverse
    second = tl.where(odd, size - 1 - k, 2 * size - 2 - k).to(tl.float32) * inverse
    return tl.maximum(k, 0), tl.minimum(k + 1, size - 1), first, second
