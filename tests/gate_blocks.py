"""Every block whose forward the gates' rules replace, small, by name; and how two of them are compared."""

import functools
import itertools
import math

import gate_modules as copied
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnkern import testing
from attnkern.functional import attention_gate


def monai(dims, *channels, dropout=0.0):
    library = pytest.importorskip("monai.networks.nets.attentionunet")
    return library.AttentionBlock(dims, *channels, dropout)


def torr(mode="sigmoid", **options):
    options = {"dimension": 2, "mode": f"concatenation_{mode}", **options}
    return copied._GridAttentionBlockND_TORR(6, 8, 4, **options)


SAME_2D = ((3, 6, 5, 7), (3, 8, 5, 7))
COARSE_2D = ((3, 6, 11, 10), (3, 8, 5, 4))
COARSE_3D = ((2, 6, 9, 10, 11), (2, 8, 4, 5, 5))
BLOCKS = {
    "monai 1d": (lambda: monai(1, 5, 6, 8), ((3, 6, 17), (3, 8, 17))),
    "monai": (lambda: monai(2, 5, 6, 8), SAME_2D),
    "monai 3d": (lambda: monai(3, 5, 6, 8, dropout=0.4), ((2, 6, 5, 4, 3), (2, 8, 5, 4, 3))),
    "image segmentation": (lambda: copied.Attention_block(6, 8, 4), SAME_2D),
    "grid 2d": (lambda: copied.GridAttentionBlock2D(6, 8), COARSE_2D),
    "grid": (lambda: copied.GridAttentionBlock3D(6, 8, 4), COARSE_3D),
    "grid debug": (
        lambda: copied.GridAttentionBlock3D(6, 8, 4, "concatenation_debug", (1, 2, 3)),
        COARSE_3D,
    ),
    "grid residual": (
        lambda: copied.GridAttentionBlock2D(6, 8, 4, "concatenation_residual", [2, 3]),
        COARSE_2D,
    ),
    "grid corners": (lambda: copied.AlignedCorners(6, 8), COARSE_2D),
    "grids": (lambda: copied.MultiAttentionBlock(6, 8, 4), COARSE_3D),
    "torr": (lambda: torr(bn_layer=False), COARSE_2D),
    "torr softmax": (lambda: torr("softmax", use_W=False), COARSE_2D),
    "torr linear": (lambda: torr(nonlinearity1=None), COARSE_2D),
}
"""Constructor, and the shapes of the two maps in the order that the block takes them."""
FEW = ("monai", "image segmentation", "grid", "torr softmax")


def settle(model):
    """Biases, norms and running statistics away from where they start, seeded."""
    torch.manual_seed(0)
    for module in model.modules():
        for name, t in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            if "var" in name:
                nn.init.uniform_(t, 0.5, 2.0)
            elif t.dim() == 1:
                nn.init.normal_(t, std=0.5)
    return model


def block(name, dtype=torch.float32):
    """The seeded module in eval mode, and its maps."""
    make, shapes = BLOCKS[name]
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return settle(make()).to(dtype).eval(), maps


def changed(name, child, value):
    """A block with another child, or attribute, at that path."""
    model = BLOCKS[name][0]()
    owner, _, attribute = child.rpartition(".")
    owner = model.get_submodule(owner)
    if attribute.isdigit():
        owner[int(attribute)] = value
    else:
        setattr(owner, attribute, value)
    return model


def gradients(model, maps, **named):
    """Outputs, the gradients of maps and parameters, and the buffers afterwards."""
    maps = [t.detach().clone().requires_grad_() for t in maps]
    named = {key: t.detach().clone().requires_grad_() for key, t in named.items()}
    outputs = testing.as_tuple(model(*maps, **named))
    inputs = [*maps, *named.values(), *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(outputs, inputs, testing.noise_like(outputs), allow_unused=True)
    assert all(grad is not None for grad in grads)
    return [*outputs, *grads, *(b.clone() for b in model.buffers())]


def close(got, want, tolerance=1e-4):
    assert len(got) == len(want)
    steepest = max(float(w.detach().abs().max()) for w in want if w.is_floating_point())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * steepest)


def positions(size, out, dims, axis):
    """The positions of a map of ``size`` along one dim, as its values, and a grid of ``out`` there."""
    given, grid = [2] * dims, [3] * dims
    given[axis], grid[axis] = size, out
    return torch.arange(math.prod(given)).view(1, 1, *given), tuple(grid)


@functools.cache
def rounded():
    """Sizes where a nearest position depends on whether their ratio is rounded to float32: 15 up to 64."""
    found = []
    for size, out in itertools.product(range(1, 65), repeat=2):
        n = torch.arange(out)
        if not torch.equal((n.float() * (size / out)).long(), n * size // out):
            found.append((size, out))
    return found


def check_nearest(dims, dtype, impl, device="cpu"):
    """A gate takes, and gives gradients to, the positions that F.interpolate takes."""
    assert (14, 46) in rounded()
    for size, out in (*rounded(), (5, 17), (17, 5)):
        values, grid = positions(size, out, dims, size % dims)
        values = values.to(device, dtype)
        g = ((values + 1) / values.numel()).requires_grad_()
        x, one = torch.zeros(1, 1, *grid, dtype=dtype, device=device), g.new_ones(1, 1)
        weights = (torch.zeros_like(one), None, one, None, one)
        options = {"upsample": "nearest", "return_alpha": True, "impl": impl}
        _, alpha, _ = attention_gate(x, g, *weights, **options)
        want = g.flatten()[F.interpolate(values, grid, mode="nearest").long()].sigmoid()
        results = ((y.detach(), *torch.autograd.grad(y.sum(), g)) for y in (alpha, want))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, msg=f"{size} to {out}")
