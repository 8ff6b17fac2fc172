"""Every module of ``attnkern.nn`` with parameters, small, by name, with the shapes of its inputs; and copies of one."""

import copy
import io
import pickle

import torch
from gate_blocks import settle
from torch import nn

from attnkern.nn import (
    AdditiveAttentionPool,
    AttentionGate,
    ContextAttentionPool,
    GatedAttentionPool,
    MultiAttentionGate,
    QueryAttentionPool,
    SqueezeExcite,
)


def seeded(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


SAME = ((2, 6, 9, 8), (2, 8, 9, 8))
POOLS = {
    "context": (lambda: ContextAttentionPool(8, 2), ((2, 5, 8),)),
    "query": (lambda: QueryAttentionPool(8, heads=2, mlp_ratio=1.0), ((2, 5, 8),)),
    "additive": (lambda: AdditiveAttentionPool(8, 6, 4), ((2, 5, 8), (2, 6))),
    "gated": (lambda: GatedAttentionPool(8, 4), ((2, 5, 8),)),
}
GATES = {
    "plain": (lambda: AttentionGate(6, 8), SAME),
    "norms": (lambda: AttentionGate(6, 8, norm=True, theta_bias=True), SAME),
    "out": (lambda: AttentionGate(6, 8, out=True), SAME),
    "two": (lambda: MultiAttentionGate(6, 8, norm=True), SAME),
}
MODULES = {
    "squeeze_excite": (lambda: SqueezeExcite(16, act="prelu"), ((2, 16, 3, 3),)),
    **{name: (lambda make=make: seeded(make()), shapes) for name, (make, shapes) in POOLS.items()},
    **{name: (lambda make=make: settle(make()), shapes) for name, (make, shapes) in GATES.items()},
}


def copies(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "save": torch.load(buffer, weights_only=False),
    }
