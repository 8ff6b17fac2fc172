"""Trained networks rebuilt on the operators say what their originals say, and a wrong gate is noticed."""

from __future__ import annotations

import pytest
import torch

from attnkern import functional
from bench import __main__ as cli
from bench import run, wheels
from bench.runs import selfie

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
