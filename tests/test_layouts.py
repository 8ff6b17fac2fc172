"""Memory: any strides and offset of x, residual and the gradient of y give the contiguous result."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import CALLS, calls
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkern import _layout, testing
from attnkern.ops.squeeze_excite.reference import Options

B, C, H, W = 2, 6, 5, 4
SPEC = next(call.spec for call in CALLS if call.spec.name == "squeeze_excite")


def _base(shape, dtype, device):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def _strided(x, size, stride):
    return torch.as_strided(x.flatten(), size, stride)


VIEWS = {
    "contiguous": lambda make: make(B, C, H, W),
    "channels_last": lambda make: testing.to_channels_last(make(B, C, H, W)),
    "channel_slice": lambda make: make(B, C + 3, H, W)[:, 1 : C + 1],
    "channel_step": lambda make: make(B, 2 * C, H, W)[:, ::2],
    "batch_step": lambda make: make(3 * B, C, H, W)[::3],
    "row_slice": lambda make: make(B, C, H + 2, W)[:, :, 1 : H + 1],
    "column_slice": lambda make: make(B, C, H, W + 3)[..., 2 : W + 2],
    "column_step": lambda make: make(B, C, H, 2 * W)[..., ::2],
    "spatial_transpose": lambda make: make(B, C, W, H).transpose(2, 3),
    "channels_last_channel_slice": lambda make: testing.to_channels_last(make(B, C + 3, H, W))[
        :, 2 : C + 2
    ],
    "channels_last_batch_step": lambda make: testing.to_channels_last(make(2 * B, C, H, W))[::2],
    "channels_last_row_slice": lambda make: testing.to_channels_last(make(B, C, H + 2, W))[
        :, :, 1 : H + 1
    ],
    "channels_last_column_step": lambda make: testing.to_channels_last(make(B, C, H, 2 * W))[
        ..., ::2
    ],
    "one_channel_of_channels_last": lambda make: testing.to_channels_last(make(B, C, H, W))[:, 2:3],
    "one_pixel_of_a_map": lambda make: make(B, C, H, W)[:, :, 1:2, 2:3],
    "one_row_of_channels_last": lambda make: testing.to_channels_last(make(B, C, H, W))[:, :, 3:4],
    "one_column": lambda make: make(B, C, H, W)[..., 1:2],
    "channels_outermost": lambda make: make(C, B, H, W).transpose(0, 1),
    "batch_innermost": lambda make: make(C, H, W, B).permute(3, 0, 1, 2),
    "batch_expanded": lambda make: make(1, C, H, W).expand(B, C, H, W),
    "batch_expanded_channels_last": lambda make: testing.to_channels_last(make(1, C, H, W)).expand(
        B, C, H, W
    ),
    "channels_expanded": lambda make: make(B, 1, H, W).expand(B, C, H, W),
    "positions_expanded": lambda make: make(B, C, 1, 1).expand(B, C, H, W),
    "rows_expanded": lambda make: make(B, C, 1, W).expand(B, C, H, W),
    "scalar_expanded": lambda make: make(1, 1, 1, 1).expand(B, C, H, W),
    "windows": lambda make: make(B, C, H + W).unfold(2, W, 1)[:, :, :H],
    "overlapping_channels": lambda make: _strided(make(1000), (B, C, H, W), (400, 3, W, 1)),
    "overlapping_positions": lambda make: _strided(make(1000), (B, C, H, W), (400, 1, 3, 2)),
    "overlapping_batch": lambda make: _strided(make(1000), (B, C, H, W), (7, H * W, W, 1)),
    "diagonal_strides": lambda make: _strided(make(1000), (B, C, H, W), (1, 1, 1, 1)),
    "negated": lambda make: torch.view_as_complex(make(B, C, H, W, 2)).conj().imag,
    "3d": lambda make: make(B, C, 2, 3, W),
    "3d_channels_last": lambda make: testing.to_channels_last(make(B, C, 2, 3, W)),
    "3d_depth_slice": lambda make: make(B, C, 5, 3, W)[:, :, 1:3],
    "3d_transpose": lambda make: make(B, C, 3, 2, W).transpose(2, 3),
    "1d": lambda make: make(B, C, H * W),
    "1d_channels_last": lambda make: testing.to_channels_last(make(B, C, H * W)),
    "1d_step": lambda make: make(B, C, 2 * H * W)[..., ::2],
}
DENSE = ("contiguous", "channels_last", "3d", "3d_channels_last", "1d", "1d_channels_last")


def _view(name, target, dtype=torch.float32):
    if name == "negated" and dtype not in (torch.float32, torch.float64):
        dtype = torch.float32
    return VIEWS[name](lambda *shape: _base(shape, dtype, target.device))


def _call(target, x, residual=None, dy=None, **options):
    """Hold squeeze_excite of these maps to the error budget; the result."""
    tensors = {"x": x}
    generator = torch.Generator().manual_seed(4)
    channels = x.shape[1]
    for name, shape in (
        ("w1", (3, channels)),
        ("b1", (3,)),
        ("w2", (channels, 3)),
        ("b2", (channels,)),
    ):
        tensors[name] = torch.randn(shape, generator=generator).to(x.device, x.dtype)
    if residual is not None:
        tensors["residual"] = residual
    case = testing.Case("", {}, options)
    grads = None if dy is None else [dy]
    return testing.compare(SPEC, case, tensors, grad_outputs=grads, impl=target.impl)


def _assert_equal(got, want):
    for (name, g), (_, w) in zip(got.items(), want.items(), strict=True):
        assert torch.equal(g, w), name


@pytest.mark.parametrize("name", VIEWS)
def test_x(name, target, dtype):
    x = _view(name, target, dtype)
    before, version = x.clone(), x._version
    got = _call(target, x)
    assert torch.equal(x, before)
    assert x._version == version
    # copied: the same kernel, same values
    if target.impl != "reference" and not _layout.readable(x):
        _assert_equal(got, _call(target, x.clone(memory_format=torch.contiguous_format)))
    (y,) = got.outputs
    assert not torch._C._overlaps(y, x)
    if name in DENSE:
        assert y.stride() == x.stride()
        assert target.impl == "reference" or got.grads["x"].stride() == x.stride()


@pytest.mark.parametrize("out_act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("x_name", ["contiguous", "channels_last", "channels_last_channel_slice"])
@pytest.mark.parametrize("name", [n for n in VIEWS if n[1] != "d"])
def test_residual_and_gradient(name, x_name, out_act, target):
    """The same strides for the shortcut and for the gradient of y, beside each layout of x."""
    other = _view(name, target)
    x = _view(x_name, target)[:, : other.shape[1], : other.shape[2], : other.shape[3]]
    kept = other.clone()
    got = _call(target, x, residual=other, dy=other, out_act=out_act)
    assert torch.equal(other, kept)
    if target.impl != "reference" and _layout.like(other, x) is not other:  # it was copied
        dense = other.clone(memory_format=torch.contiguous_format)
        _assert_equal(got, _call(target, x, residual=dense, dy=dense, out_act=out_act))


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_storage_offsets(target, dtype, channels_last):
    """A vector load of 64 bytes meets every misalignment an element type allows."""
    shape, count = (2, 5, 7, 3), 2 * 5 * 7 * 3
    for offset in range(16):
        flat = [_base((count + 16,), dtype, target.device).roll(i) for i in range(3)]
        maps = [f[offset : offset + count] for f in flat]
        if channels_last:
            maps = [m.view(2, 7, 3, 5).permute(0, 3, 1, 2) for m in maps]
        else:
            maps = [m.view(shape) for m in maps]
        _call(target, maps[0], residual=maps[1], dy=maps[2], out_act="relu")


def test_sum_backward(target, dtype):
    """The gradient of a sum has stride 0 everywhere."""
    for name in ("contiguous", "channels_last"):
        x = _view(name, target, dtype)
        _call(target, x, dy=x.new_ones(()).expand(x.shape))


@pytest.mark.parametrize("call", calls("resnet", "ese", "prelu"), ids=str)
def test_weights_of_any_strides(call, target):
    tensors = call.inputs(target)
    want = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    for name in call.case.weights:
        if name in tensors:
            tensors[name] = (
                tensors[name].repeat_interleave(2, -1)[..., ::2]
                if tensors[name].dim() < 3
                else (tensors[name].transpose(0, 1).contiguous().transpose(0, 1))
            )
    got = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    if target.impl == "reference":  # matmul of another layout: another order of sums
        for (name, g), (_, w) in zip(got.items(), want.items(), strict=True):
            torch.testing.assert_close(g, w, msg=lambda m, n=name: f"{n}: {m}")
    else:
        _assert_equal(got, want)


ITEMS = {
    "contiguous": lambda make: make(2, 9, 6),
    "columns": lambda make: make(2, 6, 9).transpose(1, 2),
    "item_slice": lambda make: make(2, 14, 6)[:, 3:12],
    "item_step": lambda make: make(2, 18, 6)[:, ::2],
    "feature_slice": lambda make: make(2, 9, 11)[..., 2:8],
    "feature_step": lambda make: make(2, 9, 12)[..., ::2],
    "column_slice": lambda make: make(2, 6, 15).transpose(1, 2)[:, 4:13],
    "batch_step": lambda make: make(6, 9, 6)[::3],
    "batch_innermost": lambda make: make(9, 6, 2).permute(2, 0, 1),
    "items_outermost": lambda make: make(9, 2, 6).transpose(0, 1),
    "features_outermost": lambda make: make(6, 2, 9).permute(1, 2, 0),
    "batch_expanded": lambda make: make(1, 9, 6).expand(2, 9, 6),
    "items_expanded": lambda make: make(2, 1, 6).expand(2, 9, 6),
    "features_expanded": lambda make: make(2, 9, 1).expand(2, 9, 6),
    "windows": lambda make: make(2, 14).unfold(1, 6, 1),
    "one_feature": lambda make: make(2, 9, 6)[..., 3:4],
    "one_item": lambda make: make(2, 9, 6)[:, 4:5],
    "map_channels_last": lambda make: testing.to_channels_last(make(2, 6, 3, 3)),
    "map_row_slice": lambda make: make(2, 6, 5, 3)[:, :, 1:4],
    "map_columns": lambda make: make(2, 6, 3, 5)[..., 1:4],
}
SCORERS = {
    "softmax_pool": ("values", {"scores": (2, 3, "N")}),
    "context_attention_pool": ("x", {"weight": (3, "D")}),
    "query_attention_pool": ("x", {"query": (2, 2, "D")}),
    "additive_attention_pool": ("values", {"keys": "like", "query": (1, 2, "D"), "v": ("D",)}),
    "gated_attention_pool": ("x", {"V": (5, "D"), "U": (5, "D"), "w": (2, 5)}),
}


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize("function", SCORERS)
def test_items_of_a_pool(function, name, target):
    """Any strides of values and keys: read in place, or copied once, to the same result."""
    spec = next(call.spec for call in CALLS if call.spec.name == function)
    values, others = SCORERS[function]
    x = ITEMS[name](lambda *shape: _base(shape, torch.float32, target.device))
    count, features = (x.shape[2:].numel(), x.shape[1]) if x.dim() > 3 else x.shape[1:]
    tensors = {values: x}
    for key, shape in others.items():
        sizes = [{"N": count, "D": features}.get(s, s) for s in shape] if shape != "like" else None
        tensors[key] = x + 0.5 if sizes is None else _base(sizes, torch.float32, target.device)
    before, case = x.clone(), testing.Case("", {}, {"returns": ("scores",)})
    got = testing.compare(spec, case, tensors, impl=target.impl)
    assert torch.equal(x, before)
    assert got.grads[values].shape == x.shape
    if name in (
        "contiguous",
        "columns",
        "items_outermost",
        "features_outermost",
        "map_channels_last",
    ):
        assert target.impl == "reference" or got.grads[values].stride() == x.stride()
    grads = [o.new_ones(()).expand(o.shape) for o in got.outputs]  # as of a sum
    testing.compare(spec, case, tensors, grad_outputs=grads, impl=target.impl)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_storage_offsets_of_items(columns, target, dtype):
    """A vector load of 64 bytes meets every misalignment an element type allows."""
    spec = next(call.spec for call in CALLS if call.spec.name == "context_attention_pool")
    count = 2 * 9 * 6
    for offset in range(16):
        flat = _base((count + 16,), dtype, target.device)[offset : offset + count]
        x = flat.view(2, 6, 9).transpose(1, 2) if columns else flat.view(2, 9, 6)
        weight = _base((3, 6), dtype, target.device)
        testing.compare(
            spec, testing.Case("", {}, {}), {"x": x, "weight": weight}, impl=target.impl
        )


@pytest.mark.parametrize("kind", ["x", "g"])
@pytest.mark.parametrize("other", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [n for n in VIEWS if n[1] != "d"])
def test_maps_of_a_gate(name, other, kind, target):
    """Strides of the map that is gated and of y's gradient, beside each layout of the other map."""
    spec = next(call.spec for call in CALLS if call.spec.name == "attention_gate")
    t, beside, kernel = _view(name, target), _view(other, target), (1, 1)
    if kind == "g":  # one position of g may stand for all of x
        kernel = (H // t.shape[2], W // t.shape[3])
    else:
        beside = beside[:, :, : t.shape[2], : t.shape[3]]
    maps = {"x": t, "g": beside} if kind == "x" else {"x": beside, "g": t}
    theta = (3, maps["x"].shape[1], *kernel)
    weights = {
        "theta_weight": _base(theta, torch.float32, target.device),
        "phi_weight": _base((3, maps["g"].shape[1]), torch.float32, target.device),
        "psi_weight": _base((3,), torch.float32, target.device),
    }
    before = t.clone()
    for options in ({"target": kind}, {"target": kind, "gate": "softmax"}):
        for dy in (t, t.new_ones(()).expand(t.shape)):
            case = testing.Case("", {}, options)
            testing.compare(spec, case, maps | weights, grad_outputs=[dy], impl=target.impl)
    assert torch.equal(t, before)


def test_batch_zero_equals_eager(call, target, dtype):
    if not call.case.per_sample:
        pytest.skip("bags have no batch axis")
    tensors = {
        k: t[:0] if k in call.case.per_sample else t for k, t in call.inputs(target, dtype).items()
    }
    got = testing.compare(call.spec, call.case, tensors, impl=target.impl)
    for name, grad in got.grads.items():
        assert not grad.any(), name


@pytest.mark.parametrize("name", VIEWS)
def test_fake_strides_are_the_real_ones(name, target):
    """Under torch.compile the fake's strides stand for the kernel's."""
    if target.impl == "reference":
        pytest.skip("the reference is no operator: torch traces it")
    op = getattr(torch.ops.attnkern.squeeze_excite_fwd, target.impl)
    x = _layout.as_readable(_view(name, target))
    src = torch.randn(x.shape[:2], device=x.device)
    arguments = (x, src, *[None] * 7, *Options(out_act="relu"), True)
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


@pytest.mark.parametrize("name", VIEWS)
def test_outputs_like_a_readable_map_are_in_its_layout(name):
    """What kernels rely on: empty_like of a readable map is readable the same way."""
    x = _layout.as_readable(VIEWS[name](lambda *shape: torch.zeros(shape)))
    y = torch.empty_like(x)
    assert _layout.readable(y)
    assert _layout.is_channels_last(y) == _layout.is_channels_last(x)
    assert _layout.like(y, x) is y


def test_every_small_stride_pattern_has_a_layout_or_a_copy():
    """Exhaustive over sizes and strides of a small map: whatever is called readable addresses right."""
    storage = torch.arange(4096, dtype=torch.float32)
    seen = 0
    for size in itertools.product((1, 2), (1, 2, 3), (1, 2), (1, 3)):
        for stride in itertools.product(
            (0, 1, 7, 36), (0, 1, 4, 6, 12), (0, 1, 2, 3, 9, 18), (0, 1, 2, 3, 6)
        ):
            x = storage.as_strided(size, stride)
            if not _layout.readable(x):
                continue
            seen += 1
            y = torch.empty_like(x)
            assert _layout.is_channels_last(y) == _layout.is_channels_last(x), (size, stride)
            assert torch.equal(_walk(x), x.flatten(2)), (size, stride)
    assert seen > 500


def _walk(x):
    """x [B, C, L] as kernels address it: a base, a batch stride, a row stride, and unit stride inside a row."""
    batch, channels, *spatial = x.shape
    length = torch.Size(spatial).numel()
    if not _layout.is_channels_last(x):
        return x.as_strided((batch, channels, length), (x.stride(0), x.stride(1), 1))
    row = next(
        (s for n, s in zip(spatial[::-1], x.stride()[:1:-1], strict=True) if n != 1), channels
    )
    return x.as_strided((batch, channels, length), (x.stride(0), 1, row))
