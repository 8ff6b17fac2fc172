"""torch.export: saved, loaded in a fresh process, and equal; with dynamic sizes."""

from __future__ import annotations

import pytest
import torch
from test_select import fresh

import attnkern


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
