"""What users do to the layers of a module, after which these are more than their parameters."""

import copy

import torch
from torch import nn
from torch.nn.utils import prune


class Lora(nn.Module):
    """Shows the parameters of the layer that it wraps, and computes more."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return 2 * self.layer(x) + 0.3


def replace(module, name, layer):
    parent, _, last = name.rpartition(".")
    module.get_submodule(parent)._modules[last] = layer


def _subclass(module, name):
    layer = module.get_submodule(name)
    forward = type(layer).forward
    layer.__class__ = type("Sub", (type(layer),), {"forward": lambda s, x: 2 * forward(s, x) + 0.3})


def _own_forward(module, name):
    layer = module.get_submodule(name)
    layer.forward = lambda x: 2 * type(layer).forward(layer, x) + 0.3


def _hook(module, name):
    module.get_submodule(name).register_forward_hook(lambda layer, given, result: 2 * result + 0.3)


def _pre_hook(module, name):
    module.get_submodule(name).register_forward_pre_hook(lambda layer, given: (2 * given[0],))


def _prune(module, name):
    prune.l1_unstructured(module.get_submodule(name), "weight", 0.5)


def _normed(norm):
    return lambda module, name: norm(module.get_submodule(name))


HOOKED = {
    "weight_norm": _normed(nn.utils.weight_norm),
    "spectral_norm": _normed(nn.utils.spectral_norm),
    "prune": _prune,
}
"""Hooks compute the weight of these at a call of the layer."""
ALTERED = {
    "lora": lambda module, name: replace(module, name, Lora(module.get_submodule(name))),
    "subclass": _subclass,
    "own forward": _own_forward,
    "hook": _hook,
    "pre-hook": _pre_hook,
    **HOOKED,
}


def observe(module, name):
    """A hook that changes nothing."""
    module.get_submodule(name).register_forward_hook(lambda *_: None)


def outcome(call, module, *given):
    """Result and gradients."""
    parameters = [*module.parameters()]
    for p in parameters:
        p.grad = None
    inputs = [t.detach().clone().requires_grad_() for t in given]
    y = call(*inputs)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(t.grad for t in (*inputs, *parameters))]


def check(module, eager, name, alter, given, said):
    """The altered ``module`` computes what ``eager`` does with its layers, twice, and says so once.

    In evaluation, where a spectral norm takes no further step.
    """
    module.eval()
    before = module(*given).detach()
    assert not said
    alter(module, name)
    for step in range(2):
        got = outcome(module, module, *given)
        want = outcome(lambda *t: eager(module, *t), module, *given)
        torch.testing.assert_close(got, want)
        assert step or alter is HOOKED["weight_norm"] or not torch.allclose(got[0], before)
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(0.1 * p.grad if p.grad is not None else 0)
    assert len(said) == 1
    assert said[0].startswith(f"{type(module).__name__} is computed layer by layer: its {name} ")


def check_observed(module, name, given, said, **call):
    """A layer that is called and changes nothing leaves results and gradients as they are."""
    twin = copy.deepcopy(module)
    observe(twin, name)

    def results(m):
        y = m(*given, **call)
        y = y if isinstance(y, tuple) else (y,)
        total = sum((t.nan_to_num(0, 0, 0) * torch.arange(t.numel()).view_as(t)).sum() for t in y)
        used = [p for p in m.parameters() if p.requires_grad]
        return [*y, *torch.autograd.grad(total, used, allow_unused=True, materialize_grads=True)]

    want = results(module)
    assert not said
    torch.testing.assert_close(results(twin), want)
    assert said == [f"{type(module).__name__} is computed layer by layer: its {name} has hooks"]
