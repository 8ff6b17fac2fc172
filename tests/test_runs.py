"""The real runs, smaller and shorter: they learn, their attention points, their costs are those of the op."""

from __future__ import annotations

import pytest
import torch

from bench import __main__ as cli
from bench import digits, run
from bench.runs import bag, captions, mil, roi, slide

pytest.importorskip("sklearn")
pytest.importorskip("skimage")


@pytest.fixture(autouse=True)
def one_thread(poison):
    """As the suite runs: two workers on two cores; poison would fill every activation of a training."""
    torch.use_deterministic_algorithms(False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path):
    return run.Settings(tmp_path, quick=True, seconds=0.0)


def claims(outcome):
    return {claim.what: claim.value for claim in outcome.claims}


def written(outcome):
    """Pictures that are pictures: larger than an empty canvas of their size would be."""
    from PIL import Image

    return all(len(set(Image.open(p).convert("L").tobytes())) > 50 for p in outcome.pictures)


# ------------------------------------------------------------------ digits


def test_no_digit_is_both_known_and_held_out():
    known, held_out = digits.split(0)
    assert len(known.labels) + len(held_out.labels) == 1797
    rows = {image.numpy().tobytes() for image in known.pixels}
    shared = sum(image.numpy().tobytes() in rows for image in held_out.pixels)
    assert shared == 0
    assert (held_out.labels == 9).sum() > 30


def test_bags_hold_what_their_label_says():
    source = mil.Pool(digits.split(0)[0])
    bags = source.draw(40, 1000, torch.Generator().manual_seed(0))
    sizes = bags.offsets.diff()
    assert sizes.min() >= 10
    assert sizes.max() > 100
    held = torch.stack([w.any() for w in bags.wanted.split(sizes.tolist())])
    assert torch.equal(held, bags.labels > 0)
    assert held.sum() == 20


def test_canvases_hold_their_captions():
    known, _ = digits.split(0)
    c = captions.draw(known, 50, torch.Generator().manual_seed(0))
    assert c.lengths.tolist() == sorted(c.lengths.tolist(), reverse=True)
    assert set(c.lengths.tolist()) == {1, 2, 3}
    for b, length in enumerate(c.lengths.tolist()):
        assert (c.words[b, :length] < 10).all()
        assert (c.words[b, length:] == captions.END).all()
        for n in range(length):
            row, column = c.corners[b, n].tolist()
            image = c.pixels[b, 0, row : row + 8, column : column + 8]
            label = known.labels[(known.pixels - image).square().sum((1, 2)).argmin()]
            assert label == c.words[b, n]
        lines = c.corners[b, :length] // captions.LINE
        order = (lines[:, 0] * 10 + lines[:, 1]).tolist()
        assert order == sorted(set(order))


# ------------------------------------------------------------------ runs


def test_bags_of_digits(settings):
    outcome = mil.run(settings)
    found = claims(outcome)
    assert found["accuracy on 400 bags of held-out digits"] > 0.9
    assert found["attention on the 9s of a bag that holds some"] > 0.8
    assert found["a 9 scores above another digit"] > 0.95
    assert written(outcome)


def test_eager_pool_of_bags_is_ours():
    torch.manual_seed(0)
    model = mil.Classifier("auto").double()
    h = torch.rand(60, mil.FEATURES, dtype=torch.float64)
    offsets = torch.tensor([0, 10, 11, 60])
    torch.testing.assert_close(model.pool(h, offsets), model.eager_pool(h, offsets))


def test_slides(settings):
    outcome = slide.run(settings)
    found = claims(outcome)
    for name, sought in (("histology", "stain"), ("retina", "vessels")):
        assert (
            found[f"{name}: a patch of {sought} has a larger score than another, right half"] > 0.85
        )
        assert found[f"{name}: accuracy on 400 windows of the right half"] > 0.8
        assert found[f"{name}: A_raw, error over that of the eager head"] <= 2
    assert len(outcome.pictures) == 2
    assert written(outcome)


def test_captions(settings):
    """The short training reads far better than chance (0.1) and looks where it reads (0.1 of the map)."""
    outcome = captions.run(settings)
    found = claims(outcome)
    assert found["digits read on 300 canvases of held-out digits"] > 0.4
    assert found["attention at the digit that is read"] > 0.4
    assert written(outcome)


def test_regularisers_gradient_reaches_the_weights():
    """Eager and ours agree on every parameter's gradient of the whole loss, doubly stochastic term included."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    known, _ = digits.split(0)
    model = captions.Captioner(captions.pretrained(known, True, generator), "auto").double()
    batch = captions.draw(known, 6, generator)
    batch = batch._replace(pixels=batch.pixels.double())
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, eager = (
        torch.autograd.grad(captions.loss_of(model, batch, attend), parameters)
        for attend in (model.attend, model.eager_attend)
    )
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs)
    _, weights = model(batch.pixels, batch.words, batch.lengths)
    assert [len(p) for p in weights] == [int((batch.lengths >= t).sum()) for t in range(4)]


def test_regions(settings):
    outcome = roi.run(settings)
    assert all(value <= 2 for value in claims(outcome).values())
    assert len(outcome.costs) == 4
    many = outcome.costs["64 regions, 91 classes, forward and backward"]
    assert many["ours"].peak_bytes < many["eager"].peak_bytes / 4  # no tanh(k + q) of every class


def test_memory_of_a_bag_does_not_grow_with_its_features():
    """Between two sizes a step of ours holds O(1) scalars an item more, eager its hidden layer."""
    held = {
        name: [bag.measure(name, items, "auto")["held"] for items in (2000, 6000)]
        for name in ("eager", "ours")
    }
    growth = {name: (large - small) / 4000 for name, (small, large) in held.items()}
    assert growth["ours"] <= 64  # bytes an item
    assert growth["eager"] > 4 * 2 * bag.HIDDEN


# ------------------------------------------------------------------ command


def test_command_prints_claims_and_fails_on_a_missed_one(monkeypatch, tmp_path, capsys):
    cost = run.Cost(0.002, 10_000_000)

    def outcome(settings):
        assert settings.quick
        missed = run.Claim("accuracy", 0.5, 0.95)
        good = run.Claim("error", 0.5, 2, at_most=True)
        costs = {"step": {"eager": cost, "ours": run.Cost(0.001, 4_000_000)}}
        return run.Outcome([missed, good], {"figure": 1.0}, costs)

    monkeypatch.setattr(mil, "run", outcome)
    code = cli.main(["--run", "mil", "--quick", "--plain", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 1
    assert "MISSED accuracy: 0.5 (at least 0.95)" in printed
    assert "met    error: 0.5 (at most 2)" in printed
    assert "eager 2 ms, 10 MB (2.00 x the time of ours, 6 MB more); ours 1 ms, 4 MB" in printed
    assert (tmp_path / "mil.json").exists()


def test_every_run_is_listed_and_an_unknown_one_refused(capsys):
    assert cli.main(["--cpu", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {f"--run {name}" for name in run.runs()} <= set(listed)
    assert {"bag", "captions", "mil", "roi", "slide"} <= set(run.runs())
    with pytest.raises(SystemExit):
        cli.main(["--run", "nothing", "--plain"])
    assert f"--run must be of {', '.join(run.runs())} or all" in capsys.readouterr().err
