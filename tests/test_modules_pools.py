"""``attnkern.nn``'s pools: other libraries' state dicts, every option and result, altered layers, errors."""

import pool_modules as copied
import pytest
import torch
import torch.nn.functional as F
from altered_layers import ALTERED, Lora, check, check_observed, observe, replace
from nn_modules import POOLS, noise, seeded
from timm.layers import AttentionPoolLatent, GlobalContext
from torch import nn
from torch.nn.utils import parametrizations

from attnkern.nn import (
    AdditiveAttentionPool,
    ContextAttentionPool,
    GatedAttentionPool,
    QueryAttentionPool,
    SoftmaxPool,
)

LATENT = {
    "default": ({}, {}),
    "no bias": ({"qkv_bias": False}, {"bias": False}),
    "latents": (
        {"latent_len": 3, "pool_type": "avg", "mlp_ratio": 2.0, "act_layer": nn.SiLU},
        {"queries": 3, "pool": "avg", "mlp_ratio": 2.0, "act_layer": nn.SiLU},
    ),
    "all latents": ({"latent_len": 2, "pool_type": ""}, {"queries": 2, "pool": ""}),
    "norm": ({"norm_layer": nn.LayerNorm}, {"norm_layer": nn.LayerNorm}),
    "no output": ({"out_features": 0}, {"out_features": 0, "mlp_ratio": 0}),
    "width": ({"out_features": 20}, {"out_features": 20}),
    "no q": ({"q_proj": False}, {"q_proj": False}),
}


@pytest.mark.parametrize(("theirs", "ours"), LATENT.values(), ids=LATENT)
def test_state_dicts_of_timm_load_both_ways(theirs, ours):
    stock = seeded(AttentionPoolLatent(32, num_heads=4, **theirs))
    pool = QueryAttentionPool(32, heads=4, **{"mlp_ratio": 4.0, **ours}).double()
    pool.load_state_dict(stock.state_dict())
    back = AttentionPoolLatent(32, num_heads=4, **theirs).double()
    back.load_state_dict(pool.state_dict())
    x = noise(2, 9, 32).requires_grad_()
    want, got = stock(x), pool(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(back(x), want, rtol=0, atol=0)
    dy = torch.randn_like(want)
    pairs = zip(sorted(stock.named_parameters()), sorted(pool.named_parameters()), strict=True)
    for (name, p), (same, q) in [(("x", x), ("x", x)), *pairs]:
        assert name == same
        torch.testing.assert_close(
            torch.autograd.grad(got, q, dy, retain_graph=True),
            torch.autograd.grad(want, p, dy, retain_graph=True),
        )


class SiglipHead(nn.Module):
    """A probe that attends through nn.MultiheadAttention, and an MLP."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 64), "fc2": nn.Linear(64, width)})

    def forward(self, x):
        z, _ = self.attention(self.probe.expand(len(x), -1, -1), x, x)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layernorm(z))))
        return (z + y)[:, 0]


def test_a_head_of_multihead_attention_loads_also_as_a_child():
    head = seeded(SiglipHead())
    net = nn.ModuleDict(
        {"head": QueryAttentionPool(32, heads=4, mlp_ratio=2.0, norm_layer=nn.LayerNorm)}
    ).double()
    net.load_state_dict({f"head.{name}": t for name, t in head.state_dict().items()})
    torch.testing.assert_close(net["head"](noise(2, 9, 32)), head(noise(2, 9, 32)))


def test_masks_and_results_of_the_query_pool():
    pool = seeded(QueryAttentionPool(32, heads=4, queries=2, pool=""))
    x, mask = noise(2, 9, 32), torch.arange(9).expand(2, 9) < 5
    z, weights, lse = pool(x, mask=mask, return_weights=True, return_lse=True)
    assert (z.shape, weights.shape, lse.shape) == ((2, 2, 32), (2, 4, 2, 9), (2, 4, 2))
    assert not weights[..., 5:].any()
    torch.testing.assert_close(z, pool(x[:, :5]))
    folded = QueryAttentionPool(32, heads=4, queries=2, pool="", fold=False).double()
    folded.load_state_dict(pool.state_dict())
    torch.testing.assert_close(folded(x), pool(x))


@pytest.mark.parametrize("spatial_dims", [0, 2])
def test_context_pool_is_timms(spatial_dims):
    stock = seeded(GlobalContext(32)).conv_attn
    layer = stock if spatial_dims else nn.Linear(32, 1).double()
    pool = ContextAttentionPool(32, spatial_dims=spatial_dims).double()
    pool.load_state_dict(layer.state_dict())
    layer.load_state_dict(pool.state_dict())
    x = noise(2, 32, 3, 4)
    items = x.flatten(2).transpose(1, 2)
    p = (items @ pool.weight.flatten(1).t() + pool.bias).softmax(1)
    torch.testing.assert_close(pool(x), p.transpose(1, 2) @ items)
    _, scores = pool(x, return_scores=True)
    torch.testing.assert_close(
        scores, (items @ pool.weight.flatten(1).t() + pool.bias).transpose(1, 2)
    )


def test_additive_pool_is_show_attend_and_tells():
    stock = seeded(copied.Attention())
    pool = AdditiveAttentionPool(24, 12, hidden=16, act="relu").double()
    pool.load_state_dict(stock.state_dict())
    stock.load_state_dict(pool.state_dict())
    x, h = noise(3, 9, 24), noise(3, 12)
    keys = pool.project_keys(x)
    for given in (None, keys):
        for a, b in zip(pool(x, h, given, return_weights=True), stock(x, h), strict=True):
            torch.testing.assert_close(a, b)
    maps = x.transpose(1, 2).reshape(3, 24, 3, 3)
    assert pool.project_keys(maps).shape == (3, 16, 3, 3)
    torch.testing.assert_close(pool(maps, h), stock(x, h)[0])
    torch.testing.assert_close(pool(maps, h, pool.project_keys(maps)), stock(x, h)[0])
    rows = AdditiveAttentionPool(24, 12, hidden=16, act="relu", channels_first=True).double()
    rows.load_state_dict(stock.state_dict())
    torch.testing.assert_close(rows(x.transpose(1, 2), h), stock(x, h)[0])


class Abmil(nn.Module):
    """The authors' gated attention."""

    def __init__(self):
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(32, 16), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(32, 16), nn.Sigmoid())
        self.attention_w = nn.Linear(16, 1)

    def forward(self, x):
        return self.attention_w(self.attention_V(x) * self.attention_U(x))


class Monai(nn.Module):
    """MILModel's ``attention``."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x):
        return self.attention(x)


class Torchmil(copied.AttentionPool):
    def forward(self, x):
        return super().forward(x[None], None, True)[1].mT


SCORERS = {
    "clam gated": (lambda: copied.Attn_Net_Gated(n_classes=3), {"branches": 3}, True),
    "clam plain": (copied.Attn_Net, {"gated": False}, True),
    "clam gated with dropout": (lambda: copied.Attn_Net_Gated(dropout=0.1), {}, True),
    "clam plain with dropout": (lambda: copied.Attn_Net(dropout=0.1), {"gated": False}, False),
    "abmil": (Abmil, {}, False),
    "monai": (Monai, {"gated": False}, False),
    "monai's attention": (lambda: Monai().attention, {"gated": False}, False),
    "torchmil": (
        lambda: Torchmil(32, 16, "relu"),
        {"gated": False, "act": "relu", "out_bias": False},
        False,
    ),
    "torchmil gated": (
        lambda: Torchmil(32, 16, "gelu", True),
        {"act": "gelu", "out_bias": False},
        False,
    ),
}


@pytest.mark.parametrize(("make", "options", "back"), SCORERS.values(), ids=SCORERS)
def test_scorers_of_multiple_instance_learning_load(make, options, back):
    stock = seeded(make()).eval()
    pool = GatedAttentionPool(32, hidden=16, **options).double()
    pool.load_state_dict(stock.state_dict())
    if back:
        stock.load_state_dict(pool.state_dict())
    x = noise(40, 32)
    scores = stock(x)
    scores = scores[0] if isinstance(scores, tuple) else scores
    z, weights, raw = pool(x[None], return_weights=True, return_scores=True)
    torch.testing.assert_close(raw[0], scores.t())
    torch.testing.assert_close(weights[0], scores.t().softmax(1))
    torch.testing.assert_close(z[0], scores.t().softmax(1) @ x)
    offsets = torch.tensor([0, 10, 40])
    bags = pool(x, offsets=offsets)
    torch.testing.assert_close(bags[1:], pool(x[None, 10:]))


def test_softmax_pool_has_the_options_of_the_function():
    scores, values = noise(2, 3, 5), noise(2, 4, 5)
    pool = SoftmaxPool(temperature=0.5, channels_first=True)
    want = (scores / 0.5).softmax(2) @ values.mT
    torch.testing.assert_close(pool(scores, values), want)
    assert pool(scores, values, return_lse=True)[1].shape == (2, 3)


@pytest.mark.parametrize(("make", "shapes"), POOLS.values(), ids=POOLS)
def test_modules_run_under_autocast_and_in_low_precision(make, shapes):
    pool = seeded(make()).float()
    inputs = [noise(*shape).float() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        low = pool(*inputs)
    torch.testing.assert_close(low.float(), pool(*inputs), rtol=0.05, atol=0.05)
    half = pool.bfloat16()(*(x.bfloat16() for x in inputs))
    assert half.dtype == low.dtype == torch.bfloat16


def test_repr_names_sizes_and_options():
    text = repr(GatedAttentionPool(8, 4, 3, act="relu", temperature=2.0))
    for part in ("features=8", "hidden=4", "branches=3", "act='relu'", "temperature=2.0"):
        assert part in text
    assert "pool='avg'" in repr(QueryAttentionPool(8, heads=2, pool="avg"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextAttentionPool(0), "ContextAttentionPool: features must be an int of at"),
        (lambda: ContextAttentionPool(8, spatial_dims=4), "spatial_dims must be 0, 1, 2 or 3"),
        (lambda: QueryAttentionPool(8, heads=3), "heads must divide embed_dim=8, got 3"),
        (lambda: QueryAttentionPool(8, heads=0), "heads must be an int of at least 1, got 0"),
        (lambda: QueryAttentionPool(8, pool="max"), "pool must be one of token, avg, , got 'max'"),
        (lambda: QueryAttentionPool(8, 0, mlp_ratio=1.0), "mlp_ratio must be 0 without an output"),
        (lambda: AdditiveAttentionPool(8, 4, act="silu"), "act must be one of tanh, relu, gelu"),
        (lambda: GatedAttentionPool(8, temperature=0.0), "temperature must be greater than 0"),
        (lambda: SoftmaxPool(impl="cuda"), "SoftmaxPool: impl must be one of auto, .*'cuda'"),
    ],
)
def test_bad_arguments_name_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ altered layers


def eager_query(pool, x):
    q = pool.q(pool.latent).expand(len(x), -1, -1)
    heads = [t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, *pool.kv(x).chunk(2, 2))]
    return pool.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))[:, 0]


def eager_additive(pool, x, h):
    e = pool.full_att((pool.encoder_att(x) + pool.decoder_att(h)[:, None]).tanh())
    return (e.softmax(1) * x).sum(1)


def eager_gated(pool, x):
    e = pool.attention_c(pool.attention_a(x) * pool.attention_b(x))
    return e.softmax(1).mT @ x


def eager_ungated(pool, x):
    return pool.module(x).softmax(1).mT @ x


def ungated():
    return GatedAttentionPool(8, 4, 2, gated=False, act="gelu")


LAYERS = {
    "kv": (lambda: QueryAttentionPool(8, heads=2), eager_query, ((2, 5, 8),)),
    "full_att": (lambda: AdditiveAttentionPool(8, 6, 4), eager_additive, ((2, 5, 8), (2, 6))),
    "attention_a.0": (lambda: GatedAttentionPool(8, 4, 2), eager_gated, ((2, 5, 8),)),
    "attention_b.0": (lambda: GatedAttentionPool(8, 4), eager_gated, ((2, 5, 8),)),
    "attention_c": (lambda: GatedAttentionPool(8, 4), eager_gated, ((2, 5, 8),)),
    "module.0": (ungated, eager_ungated, ((2, 5, 8),)),
    "module.2": (ungated, eager_ungated, ((2, 5, 8),)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_altered_layers_are_called_and_it_is_said_once(alter, name, said):
    make, eager, shapes = LAYERS[name]
    check(seeded(make()), eager, name, alter, [noise(*shape) for shape in shapes], said)


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("attention_a.1", nn.ReLU(), "is ReLU()"),
        ("attention_b.1", nn.Tanh(), "is Tanh()"),
        ("attention_b", nn.Sequential(nn.Linear(8, 4)), "has other layers"),
        (
            "attention_a",
            nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Softsign()),
            "has other layers",
        ),
        ("module.1", nn.GELU("tanh"), "is GELU(approximate='tanh')"),
        ("module", nn.Linear(8, 2), "is Linear(in_features=8, out_features=2, bias=True)"),
    ],
)
def test_other_layers_of_the_gated_scorer_are_called(name, layer, why, said):
    pool = ungated() if name.startswith("module") else GatedAttentionPool(8, 4, 2)
    before = seeded(pool)(noise(2, 5, 8))
    replace(pool, name, layer.double())
    want = (eager_ungated if name.startswith("module") else eager_gated)(pool, noise(2, 5, 8))
    torch.testing.assert_close(pool(noise(2, 5, 8)), want)
    assert not torch.allclose(want, before)
    assert said == [f"GatedAttentionPool is computed layer by layer: its {name} {why}"]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 5, "groups": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["attention_a.0", "attention_b.0", "module.0"])
def test_convolutions_in_place_of_linear_layers_are_called(name, options, said):
    """Here along the features of five items."""
    make, eager, ((_, items, features),) = LAYERS[name]
    pool, x = seeded(make()), noise(2, items, features)
    before = pool(x)
    replace(pool, name, nn.Conv1d(items, items, **options).double())
    torch.testing.assert_close(pool(x), eager(pool, x))
    assert not torch.allclose(pool(x), before)
    assert len(said) == 1


@pytest.mark.parametrize("name", [*LAYERS, "attention_a", "attention_b.1", "module", "module.1"])
@pytest.mark.parametrize("layout", ["rows", "channels first", "map", "bags"])
def test_observed_layers_change_nothing(name, layout, said):
    key = next(k for k in LAYERS if k.partition(".")[0] == name.partition(".")[0])
    make, _, (_, *others) = LAYERS[key]
    pool = seeded(make())
    x = noise(2, 6, 8)
    call = {"mask": torch.tensor([[True] * 4 + [False] * 2, [False] * 6])}
    if layout == "bags":
        x, call = noise(6, 8), {"offsets": torch.tensor([0, 4, 6])}
    elif layout != "rows":
        pool.options["channels_first"] = layout == "channels first"
        x = x.mT.contiguous() if layout == "channels first" else x.mT.reshape(2, 8, 3, 2)
    call |= {"return_weights": True, "return_scores": True, "return_lse": True}
    check_observed(pool, name, [x, *(noise(*shape) for shape in others)], said, **call)


@pytest.mark.parametrize("shape", [(2, 3, 6), (1, 3, 6), (1, 6)])
@pytest.mark.parametrize("bags", [False, True], ids=["samples", "bags"])
def test_observed_additive_pools_of_many_queries(shape, bags, said):
    pool = seeded(AdditiveAttentionPool(8, 6, 4))
    x, call = noise(2, 6, 8), {"return_weights": True}
    if bags:
        x, call = noise(6, 8), {"return_weights": True, "offsets": torch.tensor([0, 4, 6])}
    check_observed(pool, "full_att", (x, noise(*shape)), said, **call)


def test_a_folded_query_pool_whose_kv_is_observed(said):
    pool = seeded(QueryAttentionPool(8, heads=2, queries=3, pool="", fold=True))
    check_observed(pool, "kv", (noise(2, 5, 8),), said)


@pytest.mark.parametrize("name", LAYERS)
def test_observed_pools_under_autocast_and_in_low_precision(name, said):
    make, _, shapes = LAYERS[name]
    pool = seeded(make()).float()
    inputs = [noise(*shape).float() for shape in shapes]
    want = pool(*inputs)
    observe(pool, name)
    with torch.autocast("cpu", torch.bfloat16):
        low = pool(*inputs)
    half = pool.bfloat16()(*(x.bfloat16() for x in inputs))
    assert half.dtype == low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_parametrized_layers_are_inlined(name, said):
    make, eager, shapes = LAYERS[name]
    pool, given = seeded(make()).eval(), [noise(*shape) for shape in shapes]
    parametrizations.spectral_norm(pool.get_submodule(name))
    torch.testing.assert_close(pool(*given), eager(pool, *given))
    assert not said


@pytest.mark.parametrize("name", ["kv", "full_att", "attention_a.0", "module.0"])
def test_plain_and_altered_modules_compile_whole(name):
    make, eager, shapes = LAYERS[name]
    pool, given = seeded(make()), [noise(*shape) for shape in shapes]
    for _ in range(2):
        compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), eager(pool, *given))
        replace(pool, name, Lora(pool.get_submodule(name)))


def test_norms_of_a_context_pool_are_its_own():
    module = ContextAttentionPool(8, 2)
    parametrizations.weight_norm(module)
    x = torch.randn(2, 5, 8)
    want = F.linear(x, module.weight, module.bias).softmax(1).mT @ x
    torch.testing.assert_close(module(x), want)
