"""Sums and products of small matrices on float32 accumulators.

EXACT multiplies in IEEE float32.  Otherwise tensor cores multiply in TF32, whose 11 bits hold every
bfloat16 and float16; a float32 factor is rounded to nearest first, since the hardware truncates.
The interpreter is wrong for some products of bfloat16, so there every product is one of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._select import _interpreting

INTERPRETED = tl.constexpr(_interpreting)


@triton.jit
def sum_rows_of_tile(v):
    """Sum of the tile v [rows, cols] over its rows.

    In two levels: free on a GPU (same registers and barriers), while the interpreter's numpy adds
    256 rows one by one, with 3 times the error of a tree.
    """
    GROUPS: tl.constexpr = 16 if v.shape[0] >= 16 else 1
    grouped = tl.reshape(v, [GROUPS, v.shape[0] // GROUPS, v.shape[1]])
    return tl.sum(tl.sum(grouped, axis=0), axis=0)


@triton.jit
def round_to_tf32(v):
    """v with 10 bits of mantissa; NaN, whose bits the sum could carry into the sign, stays."""
    bits = v.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(v == v, rounded, v)


@triton.jit
def product(a, b, acc, EXACT: tl.constexpr):
    """acc + a b for float32 a and float32 b that hold 16-bit values unless EXACT."""
    if EXACT or INTERPRETED:
        out = tl.dot(a if EXACT else round_to_tf32(a), b, acc, input_precision="ieee")
    else:
        out = tl.dot(round_to_tf32(a), b, acc, input_precision="tf32")
    return out


@triton.jit
def product_in_two(a, b, acc, EXACT: tl.constexpr):
    """`product` with all bits of a but two: what rounding took is multiplied too.

    For scores, whose error the exponential multiplies: one product alone left the log-sum-exp of float16
    items 2.1 times as far off as eager's.
    """
    if EXACT:
        out = product(a, b, acc, EXACT)
    else:
        high = round_to_tf32(a)
        low = tl.where(high == a, 0.0, a - high)
        out = product(low, b, product(high, b, acc, EXACT), EXACT)
    return out


@triton.jit
def parts_of(a, dtype: tl.constexpr):
    """float32 a as the sum of two numbers of 16 bits, exact to 2^-16.

    Both have a's sign and are not 0, so that an infinite factor meets infinities of one sign and no 0.
    """
    high = a.to(dtype)
    high = tl.where(tl.abs(high.to(tl.float32)) >= tl.abs(a), _nearer_0(high), high)
    low = (a - high.to(tl.float32)).to(dtype)
    high = tl.where(low == 0, _nearer_0(high), high)  # of float16 the rest may be too small
    return high, (a - high.to(tl.float32)).to(dtype)


@triton.jit
def _nearer_0(v):
    """The next number of 16 bits towards 0."""
    return tl.where(v == 0, v, (v.to(tl.int16, bitcast=True) - 1).to(v.dtype, bitcast=True))


@triton.jit
def product_of_stored(a, b, acc):
    """acc + a b for a and b of one storage dtype: no product is rounded."""
    if a.dtype == tl.float32 or INTERPRETED:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc)
    return out
