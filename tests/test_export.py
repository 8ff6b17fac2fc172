"""torch.export: saved, loaded in a fresh process, and equal; with dynamic sizes."""

from __future__ import annotations

import pytest
import torch
from test_select import fresh

import attnkern
from attnkern import _native


class _Block(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.fc1 = torch.nn.Conv2d(12, 4, 1)
        self.fc2 = torch.nn.Conv2d(4, 12, 1)
        self.impl = impl

    def forward(self, x):
        return attnkern.functional.squeeze_excite(
            x,
            *(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias),
            residual=x,
            out_act="relu",
            impl=self.impl,
        )


def test_round_trip_through_a_file(target, tmp_path):
    torch.manual_seed(0)
    model = _Block(target.impl).to(target.device).eval()
    x = torch.randn(3, 12, 5, 7, device=target.device)
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height")
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch, 2: height}})
    operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    if target.impl != "reference":
        assert operators.count(f"attnkern.squeeze_excite_fwd.{target.impl}") == 1
    path = tmp_path / "block.pt2"
    torch.export.save(program, path)
    other = torch.randn(2, 12, 9, 7, device=target.device)
    torch.save({"x": other, "y": model(other).detach()}, tmp_path / "io.pt")
    out = fresh(
        f"""
        import torch, attnkern
        block = torch.export.load({str(path)!r}).module()
        io = torch.load({str(tmp_path / "io.pt")!r}, weights_only=True)
        torch.testing.assert_close(block(io["x"]), io["y"])
        print("equal")
        """
    )
    assert out.split() == ["equal"]


@pytest.mark.parametrize("strict", [False, True], ids=["draft", "strict"])
def test_both_export_modes_agree(target, strict):
    model = _Block(target.impl).to(target.device)
    x = torch.randn(2, 12, 4, 4, device=target.device)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


class _Gate(torch.nn.Module):
    """MONAI's gate in evaluation, and the authors' strided one on what is left."""

    def __init__(self, impl):
        super().__init__()
        self.first = attnkern.nn.AttentionGate(12, norm=True, theta_bias=True, impl=impl)
        self.second = attnkern.nn.AttentionGate(
            12, 8, kernel=2, upsample="bilinear", out=True, impl=impl
        )

    def forward(self, x, g, coarse):
        return self.second(self.first(x, g), coarse)


def test_a_gate_goes_through_a_file(target, tmp_path):
    torch.manual_seed(0)
    model = _Gate(target.impl).to(target.device).eval()
    batch = torch.export.Dim("batch")

    def inputs(samples):
        shapes = ((12, 9, 8), (12, 9, 8), (8, 3, 3))
        return tuple(torch.randn(samples, *s, device=target.device) for s in shapes)

    program = torch.export.export(model, inputs(3), dynamic_shapes=[{0: batch}] * 3)
    operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    if target.impl != "reference":
        assert operators.count(f"attnkern.attention_gate_fwd.{target.impl}") == 2
    path = tmp_path / "gate.pt2"
    torch.export.save(program, path)
    others = inputs(2)
    torch.save({"inputs": others, "want": model(*others)}, tmp_path / "io.pt")
    out = fresh(
        f"""
        import torch, attnkern
        gate = torch.export.load({str(path)!r}).module()
        io = torch.load({str(tmp_path / "io.pt")!r}, weights_only=True)
        torch.testing.assert_close(gate(*io["inputs"]), io["want"])
        print("equal")
        """
    )
    assert out.split() == ["equal"]


def test_a_gate_without_gradients_is_one_operator(target):
    """Its norms are folded in it, and it takes maps and weights as they are."""
    if target.impl == "reference":
        pytest.skip("the reference is no operator")
    gate = attnkern.nn.AttentionGate(12, impl=target.impl).to(target.device).eval()
    maps = torch.randn(2, 3, 12, 9, 8, device=target.device).unbind()
    with torch.no_grad():
        program = torch.export.export(gate, maps)
        torch.testing.assert_close(program.module()(*maps), gate(*maps))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    operators = [t for t in targets if "getitem" not in t]
    assert operators == [f"attnkern.attention_gate_eval.{target.impl}"]


class _Pool(torch.nn.Module):
    """Two scorers of one operator: a gated pool over padded bags, and a folded latent query over what is left."""

    def __init__(self, impl):
        super().__init__()
        self.V, self.U, self.w = (
            torch.nn.Linear(12, 6),
            torch.nn.Linear(12, 6),
            torch.nn.Linear(6, 3),
        )
        self.kv, self.query = torch.nn.Linear(12, 24), torch.nn.Parameter(torch.randn(1, 1, 12))
        self.impl = impl

    def forward(self, x, mask):
        z, scores = attnkern.functional.gated_attention_pool(
            x,
            *(self.V.weight, self.V.bias, self.U.weight, self.U.bias, self.w.weight, self.w.bias),
            mask=mask,
            return_scores=True,
            impl=self.impl,
        )
        (wk, wv), (bk, bv) = self.kv.weight.chunk(2), self.kv.bias.chunk(2)
        latent = attnkern.functional.query_attention_pool(
            z, self.query, heads=2, k_weight=wk, k_bias=bk, v_weight=wv, v_bias=bv, impl=self.impl
        )
        return latent, scores


def test_a_pool_goes_through_a_file(target, tmp_path):
    torch.manual_seed(0)
    model = _Pool(target.impl).to(target.device).eval()
    x = torch.randn(3, 11, 12, device=target.device)
    mask = torch.rand(3, 11, device=target.device) > 0.3
    batch, items = torch.export.Dim("batch"), torch.export.Dim("items")
    shapes = {"x": {0: batch, 1: items}, "mask": {0: batch, 1: items}}
    program = torch.export.export(model, (x, mask), dynamic_shapes=shapes)
    operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    if target.impl != "reference":
        assert operators.count(f"attnkern.softmax_pool_fwd.{target.impl}") == 2
    path = tmp_path / "pool.pt2"
    torch.export.save(program, path)
    other = torch.randn(2, 40, 12, device=target.device)
    keep = torch.rand(2, 40, device=target.device) > 0.5
    torch.save({"x": other, "mask": keep, "want": model(other, keep)}, tmp_path / "io.pt")
    out = fresh(
        f"""
        import torch, attnkern
        pool = torch.export.load({str(path)!r}).module()
        io = torch.load({str(tmp_path / "io.pt")!r}, weights_only=True)
        torch.testing.assert_close(pool(io["x"], io["mask"]), io["want"])
        print("equal")
        """
    )
    assert out.split() == ["equal"]


r = torch.randn
PACKAGED = {
    "squeeze_excite": (_Block, lambda batch: (r(batch, 12, 5, 7),)),
    "attention_gate": (_Gate, lambda batch: (r(batch, 12, 9, 8), r(batch, 12, 9, 8), r(batch, 8, 3, 3))),
    "softmax_pool": (_Pool, lambda batch: (r(batch, 11, 12), r(batch, 11) > -0.5)),
}  # fmt: skip


@pytest.mark.minutes  # 27 s for the first, 12 s for the next: a C++ compiler runs
@pytest.mark.skipif(not _native.available, reason="the compiled part is not built")
@pytest.mark.parametrize("operator", PACKAGED)
def test_ahead_of_time_inductor_packages_run_in_a_fresh_process(operator, tmp_path):
    """For another number of samples than the one compiled with."""
    torch.manual_seed(0)
    make, inputs = PACKAGED[operator]
    model, example = make("native").eval().requires_grad_(False), inputs(3)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(model, example, dynamic_shapes=[{0: batch}] * len(example))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    others = inputs(5)
    torch.save({"inputs": others, "want": model(*others)}, tmp_path / "io.pt")
    out = fresh(
        f"""
        import torch, attnkern
        import torch._inductor.codecache  # which torch 2.10 uses and does not import
        package = torch._inductor.aoti_load_package({str(path)!r})
        io = torch.load({str(tmp_path / "io.pt")!r}, weights_only=True)
        got = package(*io["inputs"])
        torch.testing.assert_close(tuple(got) if isinstance(got, list) else got, io["want"])
        print("equal")
        """
    )
    assert out.split() == ["equal"]
