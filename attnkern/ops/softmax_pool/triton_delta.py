"""What backward compares dz . v with, and the gradients of peaks; legend in triton_items.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern.ops.softmax_pool.reference import ALONE

_ALONE = tl.constexpr(ALONE)


@triton.jit(do_not_specialize=["heads", "queries", "ragged"])
def delta_kernel(
    values,
    dz,
    z,
    dlse,
    top,
    rest_z,
    rest_top,
    peaks,
    delta,
    dscores,
    p_out,
    de_out,
    dlogits,
    heads,
    items,
    queries,
    features,
    ragged,
    scale,
    values_batch,
    values_head,
    values_item,
    values_feature,
    BLOCK_D: tl.constexpr,
):
    """
    Computes  delta = dz . z - dlse of a row; with a peak v, whose rest has the pool z' and the weight
              w', left = w' (dz . v - dz . z') + dlse and delta = dz . v - left; p, dl = p left and de
              of the peak, p being known, whatever tiles its logit is made of in weights_kernel
    Layout    dz, z, z' [B, H, M, D], delta, dlse, peaks [B, H, M], top and rest_top [2, B, H, M];
              p, de, dl, dscores [B, H, M, N]
    Mapping   a program owns one row
    Traffic   dz and z once; of a row with a peak that item and z'
    Numerics  float32, tiles in order, a tree within a tile
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    sample = tl.where(ragged != 0, 0, row // queries // heads)
    h = row // queries % heads
    peak = tl.load(peaks + row)
    item = values + sample * values_batch + h * values_head + tl.maximum(peak, 0) * values_item
    peak_features = tl.where(peak < 0, 0, features)
    whole = tl.zeros([BLOCK_D], tl.float32)
    rest = tl.zeros([BLOCK_D], tl.float32)
    itself = tl.zeros([BLOCK_D], tl.float32)
    for d0 in range(0, features, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D).to(tl.int64)
        valid = d < features
        peaked = d < peak_features
        g = tl.load(dz + row * features + d, mask=valid, other=0.0).to(tl.float32)
        whole += g * tl.load(z + row * features + d, mask=valid, other=0.0)
        rest += g * tl.load(rest_z + row * features + d, mask=peaked, other=0.0)
        v = tl.load(item + d * values_feature, mask=peaked, other=0.0)
        itself += g * v.to(tl.float32)
    dp = tl.sum(itself, axis=0)
    share = tl.load(rest_top + rows + row)
    base = tl.where(peak >= 0, tl.load(rest_top + row) - tl.load(top + row), 0.0)
    weight = tl.exp(base) * tl.load(top + rows + row) / tl.where(share == 0, 1.0, share)
    weight = tl.where(share == 0, 0.0, weight)
    excess = tl.where(weight < _ALONE, 0.0, weight * (tl.sum(rest, axis=0) - dp))
    g_lse = 0.0
    if dlse is not None:
        g_lse = tl.load(dlse + row)
    own = tl.where(peak < 0, tl.sum(whole, axis=0), dp + excess)
    tl.store(delta + row, own - g_lse)
    if peak >= 0:
        place = ((sample * heads + h) * queries + row % queries) * items + peak
        p = tl.load(top + rows + row)
        dl = p * (dp - dp - excess + g_lse)  # dp - dp: NaN where it is not finite, as eager's
        if p_out is not None:
            tl.store(p_out + place, p)
        if dlogits is not None:
            tl.store(dlogits + place, dl)
        if de_out is not None:
            de = scale * dl
            if dscores is not None:
                de += tl.load(dscores + place)
            tl.store(de_out + place, de)
