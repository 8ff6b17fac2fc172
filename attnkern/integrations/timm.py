"""timm: its five squeeze-and-excitation classes, and the ResNet blocks that end in one.

A block computes act(shortcut + drop_path(se(x))); it is rerouted to do so in one call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnkern._activations import qualified_name
from attnkern._reading import kept
from attnkern.integrations import Rule, _squeeze_excite
from attnkern.integrations._children import altered, inlinable
from attnkern.integrations._squeeze_excite import Arguments, accepts
from attnkern.ops.squeeze_excite.op import Call, run

# ------------------------------------------------------------------ squeeze-and-excitation modules
# Children are read from `_modules`: `Module.__getattr__` costs 0.5 us each.


def _read_se(m: Any) -> Arguments | str:
    if m.add_maxpool:
        return "add_maxpool=True: its squeeze is not the mean alone"
    c = m._modules
    if type(bn := c["bn"]) is not nn.Identity:
        return f"a {type(bn).__name__} stands between its layers"
    if reason := altered(bn):
        return f"its bn {reason}"
    return _squeeze_excite.read(c["fc1"], c["act"], c["fc2"], c["gate"])


def _read_effective_se(m: Any) -> Arguments | str:
    if m.add_maxpool:
        return "add_maxpool=True: its squeeze is not the mean alone"
    return _squeeze_excite.read_one_layer(m._modules["fc"], m._modules["gate"])


def _read_efficientnet_se(m: Any) -> Arguments | str:
    c = m._modules
    return _squeeze_excite.read(c["conv_reduce"], c["act1"], c["conv_expand"], c["gate"])


def _read_legacy_se(m: Any) -> Arguments | str:
    c = m._modules
    return _squeeze_excite.read(c["fc1"], c["relu"], c["fc2"], c["sigmoid"])


def se(module: Any, x: Any, *, impl: str) -> Any:
    names = ("add_maxpool", "fc1", "bn", "act", "fc2", "gate")
    return _squeeze_excite.forward(module, _read_se, names, x, impl)


def effective_se(module: Any, x: Any, *, impl: str) -> Any:
    names = ("add_maxpool", "fc", "gate")
    return _squeeze_excite.forward(module, _read_effective_se, names, x, impl)


def efficientnet_se(module: Any, x: Any, *, impl: str) -> Any:
    names = ("conv_reduce", "act1", "conv_expand", "gate")
    return _squeeze_excite.forward(module, _read_efficientnet_se, names, x, impl)


def legacy_se(module: Any, x: Any, *, impl: str) -> Any:
    names = ("fc1", "relu", "fc2", "sigmoid")
    return _squeeze_excite.forward(module, _read_legacy_se, names, x, impl)


_SE = Rule(
    "timm.layers.squeeze_excite.SEModule",
    "squeeze_excite",
    "squeeze_excite_fwd",
    _read_se,
    se,
    {"forward": "mean add_maxpool amax fc1 act bn fc2 gate"},
)
_EFFECTIVE_SE = Rule(
    "timm.layers.squeeze_excite.EffectiveSEModule",
    "squeeze_excite",
    "squeeze_excite_fwd",
    _read_effective_se,
    effective_se,
    {"forward": "mean add_maxpool amax fc gate"},
)
_EFFICIENTNET_SE = Rule(
    "timm.models._efficientnet_blocks.SqueezeExcite",
    "squeeze_excite",
    "squeeze_excite_fwd",
    _read_efficientnet_se,
    efficientnet_se,
    {"forward": "mean conv_reduce act1 conv_expand gate"},
)
_LEGACY_SE = Rule(
    "timm.models.senet.SEModule",
    "squeeze_excite",
    "squeeze_excite_fwd",
    _read_legacy_se,
    legacy_se,
    {"forward": "mean fc1 relu fc2 sigmoid"},
)
_READERS = {rule.cls: rule.read for rule in (_SE, _EFFECTIVE_SE, _LEGACY_SE)}

# ------------------------------------------------------------------ blocks: SE + shortcut + relu


def _read_tail(attention: Any, drop_path: Any, act: Any) -> Arguments | str:
    """The arguments of the block's last call, or why its shortcut stays outside."""
    reader = _READERS.get(qualified_name(type(attention)))
    if reader is None:
        return f"its attention is a {type(attention).__name__}"
    if reason := altered(attention):
        return f"its squeeze-and-excitation {reason}"
    if drop_path is not None:
        if qualified_name(type(drop_path)) != "timm.layers.drop.DropPath":
            return f"its drop_path is a {type(drop_path).__name__}"
        if reason := altered(drop_path):
            return f"its drop_path {reason}"
    if type(act) is not nn.ReLU:
        return f"its last activation is {type(act).__name__}, not ReLU"
    if reason := altered(act):
        return f"its last activation {reason}"
    arguments = reader(attention)
    if isinstance(arguments, str):
        return arguments
    options = arguments.call.options._replace(out_act="relu")
    return arguments._replace(call=Call("squeeze_excite", options, {}))


def _drop_path_factor(drop_path: Any, x: Tensor) -> Tensor | None:
    """The per-sample factor, [B, 1, 1, 1], drawn by the same random call as timm's."""
    if drop_path is None or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    factor = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
    return factor.div_(keep) if keep > 0 and drop_path.scale_by_keep else factor


def _finish(
    block: Any, tail: Arguments, x: Tensor, shortcut: Tensor, act: nn.Module, impl: str
) -> Tensor:
    """act(drop_path(se(x)) + shortcut) in one call, or in steps where dtypes or shapes differ."""
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    *weights, call = tail
    if _fits(x, shortcut, weights):
        factor = _drop_path_factor(block.drop_path, x)
        return run(call, impl, (x, None, *weights, shortcut, factor))[0]
    x = block.se(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    x += shortcut
    return act(x)


def _fits(x: Tensor, shortcut: Tensor, weights: list[Tensor | None]) -> bool:
    return accepts(x, None, *weights) and x.dtype == shortcut.dtype and x.shape == shortcut.shape


def _read_basic_block(m: Any) -> Arguments | str:
    return _read_tail(m.se, m.drop_path, m.act2)


def _read_bottleneck(m: Any) -> Arguments | str:
    return _read_tail(m.se, m.drop_path, m.act3)


def _read_legacy_block(m: Any) -> Arguments | str:
    return _read_tail(m.se_module, None, m.relu)


def basic_block(block: Any, x: Any, *, impl: str) -> Any:
    tail = kept(block, _read_basic_block, ("se", "drop_path", "act2"))
    if isinstance(tail, str) or not inlinable():
        return type(block).forward(block, x)
    shortcut = x
    x = block.drop_block(block.bn1(block.conv1(x)))
    x = block.aa(block.act1(x))
    x = block.bn2(block.conv2(x))
    return _finish(block, tail, x, shortcut, block.act2, impl)


def bottleneck(block: Any, x: Any, *, impl: str) -> Any:
    tail = kept(block, _read_bottleneck, ("se", "drop_path", "act3"))
    if isinstance(tail, str) or not inlinable():
        return type(block).forward(block, x)
    shortcut = x
    x = block.act1(block.bn1(block.conv1(x)))
    x = block.drop_block(block.bn2(block.conv2(x)))
    x = block.aa(block.act2(x))
    x = block.bn3(block.conv3(x))
    return _finish(block, tail, x, shortcut, block.act3, impl)


def legacy_bottleneck(block: Any, x: Any, *, impl: str) -> Any:
    tail = kept(block, _read_legacy_block, ("se_module", "relu"))
    if isinstance(tail, str) or not inlinable():
        return type(block).forward(block, x)
    out = block.relu(block.bn1(block.conv1(x)))
    out = block.relu(block.bn2(block.conv2(out)))
    return _finish_legacy(block, tail, block.bn3(block.conv3(out)), x, impl)


def legacy_basic_block(block: Any, x: Any, *, impl: str) -> Any:
    tail = kept(block, _read_legacy_block, ("se_module", "relu"))
    if isinstance(tail, str) or not inlinable():
        return type(block).forward(block, x)
    out = block.relu(block.bn1(block.conv1(x)))
    out = block.relu(block.bn2(block.conv2(out)))
    return _finish_legacy(block, tail, out, x, impl)


def _finish_legacy(block: Any, tail: Arguments, out: Tensor, shortcut: Tensor, impl: str) -> Tensor:
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    *weights, call = tail
    if _fits(out, shortcut, weights):
        return run(call, impl, (out, None, *weights, shortcut, None))[0]
    return block.relu(block.se_module(out) + shortcut)


_FUSED = "squeeze_excite(residual, relu)"

RULES = (
    _SE,
    _EFFECTIVE_SE,
    _EFFICIENTNET_SE,
    _LEGACY_SE,
    Rule(
        "timm.models.resnet.BasicBlock",
        _FUSED,
        "squeeze_excite_fwd",
        _read_basic_block,
        basic_block,
        {"forward": "conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path downsample act2"},
        part="se",
    ),
    Rule(
        "timm.models.resnet.Bottleneck",
        _FUSED,
        "squeeze_excite_fwd",
        _read_bottleneck,
        bottleneck,
        {
            "forward": "conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 "
            "se drop_path downsample act3"
        },
        part="se",
    ),
    Rule(
        "timm.models.senet.Bottleneck",
        _FUSED,
        "squeeze_excite_fwd",
        _read_legacy_block,
        legacy_bottleneck,
        {"forward": "conv1 bn1 relu conv2 bn2 conv3 bn3 downsample se_module"},
        part="se_module",
    ),
    Rule(
        "timm.models.senet.SEResNetBlock",
        _FUSED,
        "squeeze_excite_fwd",
        _read_legacy_block,
        legacy_basic_block,
        {"forward": "conv1 bn1 relu conv2 bn2 downsample se_module"},
        part="se_module",
    ),
)
