"""Trained networks rebuilt on the operators say what their originals say, and a wrong gate is noticed."""

from __future__ import annotations

import collections
from dataclasses import replace

import pytest
import torch

from attnkern import functional
from bench import __main__ as cli
from bench import cut, run, wheels
from bench.runs import ocr, selfie

pytest.importorskip("skimage")


@pytest.fixture(autouse=True)
def one_thread(poison):
    """As the suite runs: two workers on two cores."""
    torch.use_deterministic_algorithms(False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path):
    return run.Settings(tmp_path, quick=True, seconds=0.0)


def needs(module):
    """Skips where a plain installation lacks what ``make setup`` brings."""
    for name in module.NEEDS:
        pytest.importorskip(name)
    for wheel in module.WHEELS:
        if wheels.find(wheel) is None:
            pytest.skip(wheels.advice(wheel))


def missed(outcome):
    return [claim.what for claim in outcome.claims if not claim.met]


# ------------------------------------------------------------------ selfie


@pytest.fixture
def astronaut():
    needs(selfie)
    original, pixels = selfie.Original("astronaut"), selfie.photograph("astronaut")
    return original.weights(), pixels, original(pixels)


def test_selfie_masks_are_the_originals(settings):
    needs(selfie)
    outcome = selfie.run(settings)
    assert missed(outcome) == []
    assert len(outcome.claims) == 4
    # the astronaut fills half of her photograph: the mask is neither empty nor full
    assert 0.5 < outcome.figures["astronaut: share of the photograph in the mask"] < 0.6
    assert all(path.stat().st_size > 100_000 for path in outcome.pictures)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_selfie_by_every_implementation_and_layout(astronaut, layout):
    weights, pixels, wanted = astronaut
    pixels = pixels.contiguous(memory_format=layout)
    for impl in ("auto", "reference"):
        mask = selfie.Segmenter(weights, selfie.Ours(impl))(pixels)
        assert (mask - wanted).abs().max() <= selfie.HALF


def test_selfie_can_be_trained_on(astronaut):
    """Every parameter's gradient through the rebuilt gates is eager's."""
    weights, pixels, _ = astronaut
    pixels = pixels[:, :, ::4, ::4].double()
    found = []
    for gates in (selfie.Eager(), selfie.Ours("auto")):
        network = selfie.Segmenter(weights, gates).double()
        loss = (network(pixels) - 0.3).square().mean()
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)


def hard(x, *mlp, **options):
    return functional.squeeze_excite(x, *mlp, gate="hard_sigmoid", **options)


def unsummed(x, *mlp, src=None, **options):
    return functional.squeeze_excite(x, *mlp, **options)


def without_residual(x, *mlp, residual=None, **options):
    return functional.squeeze_excite(x, *mlp, **options)


@pytest.mark.parametrize("wrong", [hard, unsummed, without_residual])
def test_selfie_notices_a_wrong_gate(settings, monkeypatch, wrong):
    needs(selfie)
    monkeypatch.setattr(selfie, "GRAPHS", {"astronaut": selfie.GRAPHS["astronaut"]})
    monkeypatch.setattr(selfie, "squeeze_excite", wrong)
    monkeypatch.setattr(selfie, "picture", lambda shown, settings: settings.out)
    assert len(missed(selfie.run(settings))) == 2


# ------------------------------------------------------------------ ocr


def test_ocr_reads_what_onnxruntime_reads(settings):
    needs(ocr)
    outcome = ocr.run(settings)
    assert missed(outcome) == []
    assert len(outcome.claims) == 9
    read = [text for name, text in outcome.figures.items() if name.startswith("line ")]
    assert len(read) == 7
    assert read[0] == "Region-based segmentation"
    assert all(path.stat().st_size > 50_000 for path in outcome.pictures)


def test_ocr_finds_every_block():
    """Of three kinds; the classifier's last mean feeds its head and is none."""
    needs(ocr)
    kinds = {
        name: collections.Counter((b.apply, round(b.slope, 3)) for b in ocr.graph(name).blocks)
        for name in ocr.FILES
    }
    assert kinds == {
        "detector": {("scale", 0.167): 2, ("scale1p", 0.2): 8},
        "classifier": {("scale", 0.2): 9},
        "recogniser": {("scale", 0.167): 2},
    }


def other_slope(block, x):
    slope = 0.2 if block.slope < 0.19 else 1 / 6
    return cut.ours(replace(block, slope=slope), x)


def other_apply(block, x):
    return cut.ours(replace(block, apply="scale1p" if block.apply == "scale" else "scale"), x)


def no_bias(block, x):
    w1, b1, w2, b2 = block.mlp
    return cut.ours(replace(block, mlp=(w1, b1, w2, torch.zeros_like(b2))), x)


@pytest.mark.parametrize("name", ["detector", "classifier", "recogniser"])
@torch.no_grad()
def test_ocr_notices_a_wrong_gate(name):
    needs(ocr)
    network = cut.Cut(ocr.graph(name))
    whole = ocr.page(192)
    x = whole if name == "detector" else whole[:, :, 60:108, :192].contiguous()
    right = ocr.compared(network, [x], cut.ours)
    assert right.gates <= 2
    assert right.apart <= ocr.HALF
    for gate in (other_slope, other_apply, no_bias):
        wrong = ocr.compared(network, [x], gate)
        assert wrong.gates > 100
        assert wrong.apart > ocr.HALF


# ------------------------------------------------------------------ wheels


def test_files_come_from_an_archive_or_an_installed_package(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="make setup"):
        wheels.read("no_such_package", "a.txt")
    with zipfile.ZipFile(tmp_path / "no_such_package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("no_such_package/a.txt", "archived")
    assert wheels.read("no_such_package", "a.txt") == b"archived"
    assert b"def importorskip" in wheels.read("_pytest", "outcomes.py")


def test_command_says_how_to_get_a_wheel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    monkeypatch.setattr(selfie, "WHEELS", ("no_such_package",))
    with pytest.raises(SystemExit):
        cli.main(["--run", "selfie", "--plain"])
    assert "no_such_package is neither in .venv/wheels nor installed" in capsys.readouterr().err
