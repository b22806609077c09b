# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of `gpu.py`: whole batches of photos into finished views.

The arithmetic is that of the CPU croppers, which is Pillow's: 22-bit integer weights, uint8 after
each direction, float32 blends, 24-bit box blurs. Launch with `EXACT`, which keeps the compiler from
fusing a multiplication and an addition into one rounding.

One CUT record describes a view. Kernels read it through two pointers to the same memory: `longs`
(int64 fields) and `ints` (int32 fields, and float32 by their bits). SHARE programs work on each
view, each on every SHARE-th block of BLOCK pixels. Between kernels a pixel is one int32, red in the
lowest byte, so that it is a single load.
"""

import numpy as np
import triton
import triton.language as tl

from ibeton.pipeline.sampling.draws import CONTRAST, HUE, SATURATION

# One view of one photo. Fields of two hold the first and the second resize: columns, then rows,
# or the other way round when rows_first.
CUT = np.dtype(
    [
        ("pixels", "i8"),  # byte of the box's first pixel in the batch's photos
        ("scratch", "i8"),  # first pixel of the half-resized box in the scratch memory
        ("view", "i8"),  # first pixel of the view among the views; in the output, three times that
        ("table", "i8", 2),  # first entry of the taps, [1 + taps, size]: first source, weights
        ("size", "i4"),  # side of the view
        ("source", "i4", 2),  # pixels along the direction that is resized
        ("taps", "i4", 2),  # weights of each resized pixel, some of them zero
        ("across", "i4", 2),  # from one line to the next: bytes of the photo, pixels of the scratch
        ("step", "i4", 2),  # from one pixel of a line to the next, likewise
        ("rows_first", "i4"),
        ("columns", "i4"),  # of the half-resized box
        ("area", "i4"),  # of the half-resized box, in pixels
        ("flip", "i4"),
        ("ops", "i4", 5),  # the color chain: codes of draws.py
        ("factors", "f4", 5),  # of each op; of HUE, the turn in 1/256 of a circle, whole
        ("begin", "i4"),  # first op of the chain
        ("split", "i4"),  # the contrast, where there is one: it needs the mean of what came before
        ("end", "i4"),  # behind the last op
        ("blurred", "i4"),
        ("whole", "i4"),  # the box of the blur: 2 * whole + 1 pixels of `weight` / 2^24 each ...
        ("weight", "i4"),
        ("edge", "i4"),  # ... and one of `edge` / 2^24 at either end
        ("solarize", "i4"),
    ],
    align=True,
)
EXACT = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK_PIXELS = 512  # four per thread
BLOCK_TAPS = 256


def _place(name: str) -> tl.constexpr:
    """Place of a field in its record, in units of its own type."""
    dtype, offset = CUT.fields[name][:2]  # type: ignore[index]
    return tl.constexpr(offset // dtype.base.itemsize)


LONGS, INTS = tl.constexpr(CUT.itemsize // 8), tl.constexpr(CUT.itemsize // 4)
PIXELS, SCRATCH, VIEW, TABLE = map(_place, ("pixels", "scratch", "view", "table"))
SIZE, SOURCE, TAPS = map(_place, ("size", "source", "taps"))
ACROSS, STEP, ROWS_FIRST = map(_place, ("across", "step", "rows_first"))
COLUMNS, AREA, FLIP = map(_place, ("columns", "area", "flip"))
OPS, FACTORS, BEGIN, SPLIT, END = map(_place, ("ops", "factors", "begin", "split", "end"))
BLURRED, WHOLE, WEIGHT, EDGE = map(_place, ("blurred", "whole", "weight", "edge"))
SOLARIZE = _place("solarize")
BLEND_WITH_MEAN, BLEND_WITH_GRAY, TURN_HUE = map(tl.constexpr, (CONTRAST, SATURATION, HUE))

RESIZE_BITS = tl.constexpr(22)  # Pillow's fixed point for 8-bit resampling
RESIZE_ONE, RESIZE_HALF = tl.constexpr(1 << 22), tl.constexpr(1 << 21)


@triton.jit
def _keys(x):
    """Keys' cubic kernel with a = -0.5."""
    x = tl.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, inner, tl.where(x < 2.0, outer, 0.0))


@triton.jit
def tap_tables(
    longs,  # int64 CUT [N]
    ints,  # int32, the same memory
    taps,  # int32, out: for both resizes of each view [1 + taps, size]
    gray_sums,  # int32 [N], out: zero
    BLOCK: tl.constexpr,  # resized pixels at a time
):
    """The taps of each resized pixel, as `resize.resize_taps`; two programs per view."""
    n = tl.program_id(0) // 2
    turn = tl.program_id(0) % 2
    longs += n * LONGS
    ints += n * INTS
    size = tl.load(ints + SIZE)
    source = tl.load(ints + SOURCE + turn)
    count = tl.load(ints + TAPS + turn)
    table = taps + tl.load(longs + TABLE + turn)
    tl.store(gray_sums + n, 0, mask=turn == 0)

    scale = source.to(tl.float64) / size.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = 2.0 * stretch
    narrowed = 1.0 / stretch
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < size
        center = (k.to(tl.float64) + 0.5) * scale
        low = tl.maximum((center - support + 0.5).to(tl.int32), 0)
        high = tl.minimum((center + support + 0.5).to(tl.int32), source)
        tl.store(table + k, low, mask=inside)
        total = tl.zeros([BLOCK], tl.float64)
        for t in range(count):
            exact = _keys(((low + t).to(tl.float64) - center + 0.5) * narrowed)
            total += tl.where(low + t < high, exact, 0.0)
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        for t in range(count):
            exact = _keys(((low + t).to(tl.float64) - center + 0.5) * narrowed)
            weight = tl.where(low + t < high, exact * share, 0.0) * RESIZE_ONE
            weight = tl.where(weight < 0.0, weight - 0.5, weight + 0.5).to(tl.int32)
            tl.store(table + (t + 1) * size + k, weight, mask=inside)


@triton.jit
def _clip8(x):
    return tl.minimum(tl.maximum(x, 0), 255)


@triton.jit
def _packed(red, green, blue):
    """Three values of 0..255 -> one int32."""
    return red | (green << 8) | (blue << 16)


@triton.jit
def _unpacked(pixel):
    return pixel & 255, (pixel >> 8) & 255, (pixel >> 16) & 255


@triton.jit
def _resampled(image, longs, ints, taps, k, line, inside, PASS: tl.constexpr):
    """Pixels `k` of the lines `line` of `image`, resized: three int32 [BLOCK] on 0..255.

    `image` is a photo's uint8 triples in pass 0, packed pixels in pass 1.
    """
    size = tl.load(ints + SIZE)
    source = tl.load(ints + SOURCE + PASS)
    step = tl.load(ints + STEP + PASS)
    table = taps + tl.load(longs + TABLE + PASS) + k
    first = tl.load(table, mask=inside, other=0)
    pixel = image + line * tl.load(ints + ACROSS + PASS) + first * step
    red = tl.full(k.shape, RESIZE_HALF, tl.int32)
    green = red
    blue = red
    for t in range(tl.load(ints + TAPS + PASS)):
        table += size
        weight = tl.load(table, mask=inside, other=0)
        within = inside & (first + t < source)  # the weights beyond are zero
        if PASS == 0:
            r = tl.load(pixel, mask=within, other=0).to(tl.int32)
            g = tl.load(pixel + 1, mask=within, other=0).to(tl.int32)
            b = tl.load(pixel + 2, mask=within, other=0).to(tl.int32)
        else:
            r, g, b = _unpacked(tl.load(pixel, mask=within, other=0))
        red += weight * r
        green += weight * g
        blue += weight * b
        pixel += step
    return _clip8(red >> RESIZE_BITS), _clip8(green >> RESIZE_BITS), _clip8(blue >> RESIZE_BITS)


@triton.jit
def first_resize(
    photos,  # uint8 [bytes], photos [H, W, 3] one after another
    longs,  # int64 CUT [N]
    ints,  # int32, the same memory
    taps,  # int32, of `tap_tables`
    scratch,  # int32, out: the boxes resized in one direction, packed pixels
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first direction of the resize, for every view's box."""
    n = tl.program_id(0) // SHARE
    longs += n * LONGS
    ints += n * INTS
    box = photos + tl.load(longs + PIXELS)
    out = scratch + tl.load(longs + SCRATCH)
    columns = tl.load(ints + COLUMNS)
    area = tl.load(ints + AREA)
    rows_first = tl.load(ints + ROWS_FIRST) != 0
    for start in range(tl.program_id(0) % SHARE * BLOCK, area, SHARE * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < area
        row, column = at // columns, at % columns
        k = tl.where(rows_first, row, column)
        line = tl.where(rows_first, column, row)
        red, green, blue = _resampled(box, longs, ints, taps, k, line, inside, 0)
        tl.store(out + at, _packed(red, green, blue), mask=inside)


@triton.jit
def _luma(red, green, blue):
    """ITU-R 601 gray in 16-bit fixed point."""
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


@triton.jit
def _blend(low, x, factor):
    value = low.to(tl.float32) + factor * (x - low).to(tl.float32)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _hue_saturation(red, green, blue, high, low):
    """Pillow's 8-bit hue and saturation, with float64 where Pillow has it."""
    span = tl.where(high == low, 1, high - low).to(tl.float32)
    rc = tl.div_rn((high - red).to(tl.float32), span)
    gc = tl.div_rn((high - green).to(tl.float32), span)
    bc = tl.div_rn((high - blue).to(tl.float32), span)
    from_green = (2.0 + rc.to(tl.float64) - bc.to(tl.float64)).to(tl.float32)
    from_blue = (4.0 + gc.to(tl.float64) - rc.to(tl.float64)).to(tl.float32)
    sixth = tl.where(red == high, bc - gc, tl.where(green == high, from_green, from_blue))
    turn = sixth.to(tl.float64) / 6.0 + 1.0
    turn = (turn - turn.to(tl.int32).to(tl.float64)).to(tl.float32)
    saturation = tl.div_rn(span, tl.maximum(high, 1).to(tl.float32))
    hue = (turn.to(tl.float64) * 255.0).to(tl.int32)
    return hue, tl.where(high == low, 0, (saturation.to(tl.float64) * 255.0).to(tl.int32))


@triton.jit
def _turned_hue(red, green, blue, turn):
    """The hue turned by `turn` / 256 of a circle: `color.adjust_hue`."""
    v = tl.maximum(red, tl.maximum(green, blue))
    low = tl.minimum(red, tl.minimum(green, blue))
    hue, s = _hue_saturation(red, green, blue, v, low)
    place = ((hue + turn) & 255).to(tl.float64) * 6.0 / 255.0
    sector = place.to(tl.int32)
    f = (place - sector.to(tl.float64)).to(tl.float32)
    fs = (s.to(tl.float64) / 255.0).to(tl.float32)
    value = v.to(tl.float64)
    falling = (fs * f).to(tl.float64)
    rising = fs.to(tl.float64) * (1.0 - f.to(tl.float64))
    p = (value * (1.0 - fs.to(tl.float64)) + 0.5).to(tl.int32)
    q = (value * (1.0 - falling) + 0.5).to(tl.int32)
    t = (value * (1.0 - rising) + 0.5).to(tl.int32)
    sector = tl.where(s == 0, 6, sector % 6)  # 6: gray stays as it is
    red = tl.where((sector == 0) | (sector >= 5), v, tl.where(sector == 1, q, p))
    red = tl.where(sector == 4, t, red)
    green = tl.where((sector == 1) | (sector == 2) | (sector == 6), v, p)
    green = tl.where(sector == 0, t, tl.where(sector == 3, q, green))
    blue = tl.where((sector == 3) | (sector == 4) | (sector == 6), v, p)
    blue = tl.where(sector == 2, t, tl.where(sector == 5, q, blue))
    return red, green, blue


@triton.jit
def _recolored(red, green, blue, ints, mean, begin, end):
    """Ops begin .. end of the view's chain; `mean` is the gray that a contrast blends with."""
    for i in range(begin, end):
        op = tl.load(ints + OPS + i)
        factor = tl.load(ints + FACTORS + i).to(tl.float32, bitcast=True)
        if op == TURN_HUE:
            red, green, blue = _turned_hue(red, green, blue, factor.to(tl.int32))
        else:  # a blend with black, with the mean, or with the pixel's own gray
            low = tl.where(op == BLEND_WITH_GRAY, _luma(red, green, blue), 0)
            low = tl.where(op == BLEND_WITH_MEAN, mean, low)
            red = _blend(low, red, factor)
            green = _blend(low, green, factor)
            blue = _blend(low, blue, factor)
    return red, green, blue


@triton.jit
def second_resize(
    scratch,  # int32, of `first_resize`
    longs,  # int64 CUT [N]
    ints,  # int32, the same memory
    taps,  # int32, of `tap_tables`
    views,  # int32, out: the views' packed pixels, before their contrast
    gray_sums,  # int32 [N], out: sum of each view's gray
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second direction, the flip, and the ops before the contrast."""
    n = tl.program_id(0) // SHARE
    longs += n * LONGS
    ints += n * INTS
    box = scratch + tl.load(longs + SCRATCH)
    out = views + tl.load(longs + VIEW)
    size = tl.load(ints + SIZE)
    rows_first = tl.load(ints + ROWS_FIRST) != 0
    flip = tl.load(ints + FLIP) != 0
    begin, split = tl.load(ints + BEGIN), tl.load(ints + SPLIT)
    gray = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) % SHARE * BLOCK, size * size, SHARE * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size * size
        row, column = at // size, at % size
        column = tl.where(flip, size - 1 - column, column)
        k = tl.where(rows_first, column, row)
        line = tl.where(rows_first, row, column)
        red, green, blue = _resampled(box, longs, ints, taps, k, line, inside, 1)
        red, green, blue = _recolored(red, green, blue, ints, 0, begin, split)
        tl.store(out + at, _packed(red, green, blue), mask=inside)
        gray += tl.where(inside, _luma(red, green, blue), 0)
    tl.atomic_add(gray_sums + n, tl.sum(gray, 0), sem="relaxed")


@triton.jit
def _finished(out, norm, ints, at, area, inside, red, green, blue):
    """Solarize, normalize, and store to the three planes of a view that begins at `out`."""
    if tl.load(ints + SOLARIZE) != 0:
        red = tl.where(red < 128, red, 255 - red)
        green = tl.where(green < 128, green, 255 - green)
        blue = tl.where(blue < 128, blue, 255 - blue)
    red = red.to(tl.float32) * tl.load(norm) + tl.load(norm + 3)
    green = green.to(tl.float32) * tl.load(norm + 1) + tl.load(norm + 4)
    blue = blue.to(tl.float32) * tl.load(norm + 2) + tl.load(norm + 5)
    tl.store(out + at, red.to(out.dtype.element_ty), mask=inside)
    tl.store(out + area + at, green.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2 * area + at, blue.to(out.dtype.element_ty), mask=inside)


@triton.jit
def colors(
    longs,  # int64 CUT [N]
    ints,  # int32, the same memory
    gray_sums,  # int32 [N], of `second_resize`
    norm,  # float32 [6], factors and summands of the channels, from 0..255
    views,  # int32, packed pixels; out: those of the blurred views, with all their color
    out,  # float, out: the other views, finished, [3, size, size] each
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The contrast and the ops after it; finishes views without a blur."""
    n = tl.program_id(0) // SHARE
    longs += n * LONGS
    ints += n * INTS
    first = tl.load(longs + VIEW)
    size = tl.load(ints + SIZE)
    area = size * size
    split, end = tl.load(ints + SPLIT), tl.load(ints + END)
    blurred = tl.load(ints + BLURRED) != 0
    # The mean, rounded half up; all in integers, where twice the sum may need more than 32 bits.
    mean = ((2 * tl.load(gray_sums + n).to(tl.int64) + area) // (2 * area)).to(tl.int32)
    for start in range(tl.program_id(0) % SHARE * BLOCK, area, SHARE * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < area
        red, green, blue = _unpacked(tl.load(views + first + at, mask=inside, other=0))
        red, green, blue = _recolored(red, green, blue, ints, mean, split, end)
        if blurred:
            tl.store(views + first + at, _packed(red, green, blue), mask=inside)
        else:
            _finished(out + 3 * first, norm, ints, at, area, inside, red, green, blue)


@triton.jit
def _boxed(total, ends, weight, edge):
    return ((total * weight + ends * edge + (1 << 23)) >> 24).to(tl.int32)


@triton.jit
def box_blur(
    blurred,  # int32 [M], the views with a blur
    longs,  # int64 CUT [N]
    ints,  # int32, the same memory
    norm,  # float32 [6], factors and summands of the channels, from 0..255
    source,  # int32, packed pixels of the views
    target,  # int32, out: the same views after one box along one direction
    out,  # float, out: instead of `target`, when LAST, the finished views
    UPRIGHT: tl.constexpr,  # along columns instead of rows
    LAST: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of the six box blurs that make Pillow's Gaussian; edges are repeated."""
    n = tl.load(blurred + tl.program_id(0) // SHARE)
    longs += n * LONGS
    ints += n * INTS
    first = tl.load(longs + VIEW)
    size = tl.load(ints + SIZE)
    area = size * size
    whole = tl.load(ints + WHOLE)
    # A weighted sum is below 256 * 2^24, so 32 bits without a sign hold it.
    weight = tl.load(ints + WEIGHT).to(tl.uint32)
    edge = tl.load(ints + EDGE).to(tl.uint32)
    stride = size if UPRIGHT else 1
    for start in range(tl.program_id(0) % SHARE * BLOCK, area, SHARE * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < area
        place = at // size if UPRIGHT else at % size
        line = source + first + at - place * stride
        red = tl.zeros([BLOCK], tl.int32)
        green = red
        blue = red
        for d in range(-whole, whole + 1):
            near = tl.minimum(tl.maximum(place + d, 0), size - 1)
            r, g, b = _unpacked(tl.load(line + near * stride, mask=inside, other=0))
            red += r
            green += g
            blue += b
        before = tl.maximum(place - whole - 1, 0)
        after = tl.minimum(place + whole + 1, size - 1)
        r, g, b = _unpacked(tl.load(line + before * stride, mask=inside, other=0))
        r2, g2, b2 = _unpacked(tl.load(line + after * stride, mask=inside, other=0))
        red = _boxed(red.to(tl.uint32), (r + r2).to(tl.uint32), weight, edge)
        green = _boxed(green.to(tl.uint32), (g + g2).to(tl.uint32), weight, edge)
        blue = _boxed(blue.to(tl.uint32), (b + b2).to(tl.uint32), weight, edge)
        if LAST:
            _finished(out + 3 * first, norm, ints, at, area, inside, red, green, blue)
        else:
            tl.store(target + first + at, _packed(red, green, blue), mask=inside)
