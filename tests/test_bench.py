"""The benchmark: no speed-up for a wrong kernel or an impossible figure; files say what ran."""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import html.parser
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attnkern import _select, testing
from attnkern.ops.softmax_pool.cases import case as softmax_pool_case
from attnkern.ops.squeeze_excite.cases import case
from bench import __main__ as cli
from bench import clock, gate, machine, models, report, results, rows, runner, screen

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = rows.Subject(
    "squeeze_excite",
    case("2x8x6x6", 2, 8, (6, 6), 4),
    "fp32",
    {rows.FORWARD: 2, rows.TRAINING: 5},
    group="SE",
)
SETTINGS = runner.Settings(CPU, ("reference",), seconds=0.0, compile=False)


def measure(subject=TINY, settings=SETTINGS):
    return runner.measure(subject, settings, gate.Oracles(CPU))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


def one_percent(function, **arguments):
    return function(**arguments) * 1.01


def remembered(function, memory={}, **arguments):  # noqa: B006
    """The right result of the first input, returned for any."""
    y = function(**arguments)
    return (
        y * 0 + memory.setdefault("y", y.detach().clone())
        if torch.is_grad_enabled()
        else memory["y"]
    )


def wider(function, **arguments):
    return function(**arguments).double()


def other_layout(function, **arguments):
    return testing.to_channels_last(function(**arguments))


def wrong_gradient(function, **arguments):
    return WrongGradient.apply(function(**arguments))


def one_nan(function, **arguments):
    y = function(**arguments)
    mask = torch.zeros_like(y)
    mask.view(-1)[-1] = float("nan")
    return y + mask


def crash(function, **arguments):
    raise RuntimeError("launch failed")


FAULTS = [one_percent, remembered, wider, other_layout, wrong_gradient, one_nan, crash]


@pytest.fixture
def plant(monkeypatch):
    """Replaces the public function of squeeze_excite, for the benchmark, by a faulty one."""

    def install(fault):
        specs = dict(rows._specs())
        spec = specs["squeeze_excite"]
        function = functools.partial(fault, spec.function)
        specs["squeeze_excite"] = dataclasses.replace(spec, function=function)
        monkeypatch.setattr(rows, "_specs", lambda: specs)

    return install


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs the command in this process on the tiny subject; returns its exit code and folder."""
    bench = dataclasses.replace(rows.benches()["squeeze_excite"], subjects={"cpu": [TINY]})
    monkeypatch.setattr(rows, "benches", lambda: {"squeeze_excite": bench})
    monkeypatch.setattr(machine, "allocator_state", lambda device: {"kind": "test", "warm": False})
    copy_rates = {"memory_GBps": 10.0, "forms_GBps": {"copy_": 10.0}, "cache_GBps": 20.0}
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: dict(copy_rates))

    def run(*arguments):
        base = ["--cpu", "--only=kernel", "--impl=reference", "--no-compile", "--plain"]
        code = cli.main([*base, "--seconds", "0", "--out", str(tmp_path), *arguments])
        return code, tmp_path

    return run


# ------------------------------------------------------------------ gate


def test_right_kernel_is_timed_in_both_passes():
    forward, training = measure()
    for row in (forward, training):
        assert row["gate"]["reference"]["ok"]
        assert row["ratios"]["cold"]["eager"] > 0
        assert row["times"]["reference"]["cold"]["samples"] >= 5
        assert row["peak_bytes"]["eager"] >= row["map_bytes"]  # y at least
    assert training["minimum_bytes"] > forward["minimum_bytes"] > 2 * TINY.map_bytes


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_fault_is_red_and_not_timed(plant, fault):
    plant(fault)
    for row in measure():
        assert not row["gate"]["reference"]["ok"]
        assert row["gate"]["reference"]["why"]
        assert row["times"] == {}
        assert row["ratios"] == {}


@pytest.mark.parametrize("fault", [one_percent, crash], ids=lambda f: f.__name__)
def test_red_gate_fails_the_command_and_prints_no_speedup(plant, quick, capsys, fault):
    plant(fault)
    code, out = quick("--json")
    assert code == 1
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("2x8x6x6")]
    assert len(lines) == 2
    for line in lines:
        assert line.endswith("RED")
        assert not any(character.isdigit() for character in line.split("fwd")[1])
    assert "gate red, no speed-up is given (reference)" in printed
    assert len(results.failures(results.load(out / "results.json"))) == 2
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["gate"], line["times_ours"]) for line in lines] == [("red", "")] * 2


def shrunk(c: testing.Case) -> testing.Case:
    """The case with every size over 16 a smaller one, equal sizes equal, multiples of 16 (heads)."""

    def less(size):
        return size if size <= 16 else 16 * (1 + size % 3)

    shapes = {name: tuple(map(less, shape)) for name, shape in c.shapes.items()}
    return dataclasses.replace(c, shapes=shapes)


def formulations():
    """Every other formulation once for each set of options that a subject gives it."""
    found = {}
    for bench in rows.benches().values():
        for s in [s for subjects in bench.subjects.values() for s in subjects]:
            rank = [len(shape) for shape in s.case.shapes.values()]
            for name in s.others:
                key = json.dumps([s.op, name, dict(s.case.options), list(s.case.shapes), rank])
                found.setdefault(key, (s, name))
    return list(found.values())


@pytest.mark.parametrize(
    ("subject", "name"), formulations(), ids=lambda v: v if isinstance(v, str) else v.case.name
)
def test_formulations_compute_the_same(subject, name):
    small = shrunk(subject.case)
    tensors = small.inputs(torch.float64)
    got = subject.others[name](**tensors, **small.options)
    expected = subject.spec().eager(**tensors, **small.options)
    torch.testing.assert_close(got, expected)


def test_every_operator_has_other_formulations():
    assert {s.op for s, _ in formulations()} >= {"squeeze_excite", "query_attention_pool"}


def test_pools_are_held_to_a_read_as_well():
    shapes = {"values": (2, 40, 16), "scores": (2, 40)}
    c = softmax_pool_case("given-2x40x16", shapes)
    trips = {rows.FORWARD: 1, rows.TRAINING: 3}
    subject = rows.Subject("softmax_pool", c, "fp32", trips, moved=("values",))
    forward, training = measure(subject)
    assert forward["layout"] == training["layout"] == "items"
    assert forward["minimum_bytes"] == 4 * (2 * 40 * 16 + 2 * 40)
    for row in (forward, training):
        assert row["gate"]["reference"]["ok"]
        fastest = {name: modes["cold"]["fastest"] for name, modes in row["times"].items()}
        rates = [2 * row["map_bytes"] / fastest["copy"], row["map_bytes"] / fastest["read"]]
        assert row["roof"]["copy_GBps"] == pytest.approx(max(rates) / 1e9)


def test_operator_without_a_kernel_is_measured_on_the_reference(monkeypatch):
    monkeypatch.setattr(
        _select, "refuse", lambda impl, *a: None if impl == "reference" else "planted"
    )
    for row in measure(TINY, dataclasses.replace(SETTINGS, impls=("native",))):
        assert row["impl"] == "reference"
        assert row["notes"] == [
            "native is left out: planted",
            "no kernel can run here, these figures are of the reference",
        ]
        assert row["gate"]["reference"]["ok"]


def test_formulation_that_cannot_run_is_left_out():
    broken = dataclasses.replace(TINY, others={"broken": functools.partial(crash, None)})
    for row in measure(broken):
        assert row["formulation"] == "plain"
        assert row["notes"] == ["broken left out: RuntimeError: launch failed"]


# ------------------------------------------------------------------ figures


def test_statistics():
    stats = clock.Stats.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (stats.q1, stats.median, stats.q3, stats.fastest, stats.samples) == (2, 3, 4, 1, 5)
    assert clock.spread(stats.dict()) == pytest.approx(2 / 3)
    assert clock.Stats.of([7.0]).median == 7
    assert results.geomean([1.0, 4.0]) == pytest.approx(2)
    assert results.geomean([]) is None


def test_competitors_are_interleaved():
    order = []

    def sampler(name):
        return lambda: order.append(name) or 1.0

    clock.interleave({name: sampler(name) for name in "abc"}, seconds=0.0, least=4)
    assert "".join(order) == "abc" * 4


def test_samples_rotate_through_every_input_set():
    seen = []
    sample = clock.sampler(seen.append, clock.Rotation(7), CPU)
    while len(seen) < 200:
        sample()
    assert set(seen) == set(range(7))


def test_competitors_take_the_input_sets_in_turn():
    """None finds in cache what another has just read: together they walk the sets as one does."""
    seen, rotation = [], clock.Rotation(7)
    samplers = [clock.sampler(seen.append, rotation, CPU) for _ in range(2)]
    del seen[:]
    start = rotation.position
    clock.interleave(dict(enumerate(samplers)), seconds=0.0, least=2, most=2)
    walked = [(start + i) % 7 for i in range(len(seen))]
    assert seen == walked


def fabricated(ours: float, copy: float, megabytes: float = 1000.0) -> dict:
    """A forward row whose call moves at least ``megabytes`` and takes ``ours`` seconds."""
    row = copy_of_row()
    row["map_bytes"], row["minimum_bytes"] = int(megabytes * 5e5), int(megabytes * 1e6)

    def stats(t):
        return {"cold": clock.Stats.of([t, t, t]).dict()}

    row["times"] = {"reference": stats(ours), "eager": stats(2 * ours), "copy": stats(copy)}
    return row


def copy_of_row() -> dict:
    return copy.deepcopy(measured_once()[0])


@functools.cache
def measured_once():
    return measure()


def test_figure_above_the_copy_roof_is_refused():
    cache = 32 << 20
    row = fabricated(ours=0.09, copy=0.1)
    results.derive(row, copy_GBps=5.0, cache=cache)
    assert "111 % of the fastest copy" in row["refused"]
    assert row["ratios"] == {}
    file = {"kernels": [row], "models": []}
    assert results.failures(file) == [f"{row['key']}: {row['refused']}"]
    assert "–" in screen.kernel_cells(row)["×eager"]

    slower = fabricated(ours=0.11, copy=0.1)
    results.derive(slower, copy_GBps=5.0, cache=cache)
    assert slower["refused"] is None
    assert slower["ratios"]["cold"]["eager"] == pytest.approx(2)
    # the whole machine's copy counts where no cache holds the data, and only there
    results.derive(slower, copy_GBps=20.0, cache=cache)
    assert slower["roof"]["percent"] == pytest.approx(100 / 0.11 / 20)
    in_cache = fabricated(ours=0.009, copy=0.01, megabytes=100)
    results.derive(in_cache, copy_GBps=5.0, cache=cache)
    assert in_cache["refused"] is None


def test_losses_are_listed_and_targets_missed():
    row = fabricated(ours=0.2, copy=0.1)
    row["times"]["eager"] = {"cold": clock.Stats.of([0.1] * 3).dict()}
    results.derive(row, copy_GBps=5.0, cache=1)
    file = {"kernels": [row], "models": [], "machine": {"device": "cpu"}}
    assert results.losses(file) == [f"{row['key']}, cold: 0.50 x eager"]
    (reached,) = results.against_targets(
        file, [rows.Target("SE", rows.FORWARD, ("fp32",), 1.6, 1.7)]
    )
    assert (reached["met"], reached["worst_key"]) == (False, row["key"])
    assert (reached["rows"], reached["of"]) == (1, 6)  # one of the table's six was run
    assert reached["reached"] == pytest.approx(0.5)


# ------------------------------------------------------------------ files


def test_results_round_trip_and_refuse_other_schemas(quick, tmp_path):
    code, out = quick("--json")
    assert code == 0
    found = results.load(out / "results.json")
    assert found["schema"] == results.SCHEMA
    assert found["machine"]["commit"]
    assert found["settings"]["command"].startswith("python -m bench --cpu")
    assert [row["key"] for row in found["kernels"]] == [TINY.key(which) for which in rows.PASSES]
    results.save(found, tmp_path / "again.json")
    assert results.load(tmp_path / "again.json") == found
    for text, message in (
        ('{"schema": 0}', "must have schema 1, got 0"),
        ('{"schema": 1, "machine": {}}', "must have a section settings"),
        ("{", "is not JSON"),
        ("[]", "must have schema 1, got list"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            results.load(tmp_path / "bad.json")


def test_merged_runs_take_the_median_and_any_red_gate(quick):
    code, out = quick("--json")
    runs = [results.load(out / "results.json") for _ in range(3)]
    for run, factor in zip(runs, (1.0, 5.0, 2.0), strict=True):
        run["kernels"][0]["times"]["reference"]["cold"]["median"] = factor
        run["kernels"][0]["times"]["eager"]["cold"]["median"] = 4.0
    merged = results.merge(runs, models.derive)
    row = merged["kernels"][0]
    assert code == 0
    assert row["times"]["reference"]["cold"]["median"] == 2
    assert row["times"]["reference"]["cold"]["processes"] == [1, 5, 2]
    assert row["ratios"]["cold"]["eager"] == 2
    runs[1]["kernels"][0]["gate"]["reference"] = {"ok": False, "why": "planted"}
    red = results.merge(runs, models.derive)
    assert red["kernels"][0]["ratios"] == {}
    assert results.failures(red)[0].endswith("planted")


def test_shard_resumes_where_it_stopped(quick, monkeypatch):
    assert quick("--shard", "1/1", "--json")[0] == 0
    monkeypatch.setattr(runner, "measure", lambda *a: pytest.fail("measured again"))
    code, out = quick("--shard", "1/1", "--json")
    assert code == 0
    assert len(results.load(out / "results.json")["kernels"]) == 2


class Loads(html.parser.HTMLParser):
    """Collects what a browser would fetch, and counts plots."""

    def __init__(self):
        super().__init__()
        self.fetched, self.plots = [], 0

    def handle_starttag(self, tag, attributes):
        self.plots += tag == "svg"
        self.fetched += [
            (tag, value)
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith("#")
        ]
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append((tag, ""))


def test_report_is_one_file_with_plots(quick, plant):
    code, out = quick()
    page = (out / "report.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert code == 0
    assert loads.fetched == []
    assert loads.plots == 4  # two passes, roof, memory; no networks were run
    assert "http" not in page
    assert "url(http" not in page
    assert TINY.case.name in page
    assert "Against the targets" in page


def test_report_of_a_red_run_says_so_and_draws_no_bars(quick, plant):
    plant(one_percent)
    code, out = quick()
    page = (out / "report.html").read_text()
    assert code == 1
    assert "Red: these rows are wrong" in page
    assert "gate red (reference)" in page
    assert "<svg" not in page


# ------------------------------------------------------------------ command


def test_list_names_every_row_and_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: pytest.fail("measured"))
    assert cli.main(["--cpu", "--list", "--full"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "squeeze_excite/32x256x56x56/fp32/channels_first/forward" in listed
    assert "timm/seresnet50" in listed
    assert len(listed) == len(set(listed))
    assert cli.main(["--cpu", "--list"]) == 0
    assert 0 < len(capsys.readouterr().out.splitlines()) < len(listed)


def test_shards_cover_everything_once(capsys):
    cli.main(["--cpu", "--list", "--full"])
    everything = capsys.readouterr().out.splitlines()
    parts = []
    for i in (1, 2, 3):
        cli.main(["--cpu", "--list", "--full", "--shard", f"{i}/3"])
        parts += capsys.readouterr().out.splitlines()
    assert sorted(parts) == sorted(everything)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--op", "nothing"], "--op must be one of softmax_pool, squeeze_excite, got nothing"),
        (["--impl", "fast"], "--impl must be of native, triton, reference, got fast"),
        (["--shard", "3/2"], "--shard must be between 1/2 and 2/2, got 3/2"),
        (["--shard", "one"], "--shard must be i/n, got one"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--gpu", "--cpu"], "--gpu and --cpu exclude each other"),
        (["--match", "no such row"], "no row matches"),
    ],
)
def test_bad_options_say_what_is_wrong(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--plain", *(["--cpu"] if "--gpu" not in arguments else [])])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_gpu_without_one_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--gpu", "--plain"])
    assert stopped.value.code == 2
    assert "--gpu needs a CUDA GPU" in capsys.readouterr().err


def test_missing_package_is_one_sentence(monkeypatch, capsys):
    real = importlib.util.find_spec
    lacking = ("timm", "jinja2")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in lacking else real(n, *a)
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--cpu", "--plain"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("bench: pip install jinja2 timm (")
    assert message.count("\n") == 1


def test_command_end_to_end(tmp_path):
    """The real command on its smallest row, in a process of its own."""
    arguments = ["--cpu", "--only", "kernel", "--match", "/1x960x7x7/fp32/channels_first"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench",
            *arguments,
            "--no-compile",
            "--seconds",
            "0.05",
            "--out",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len([line for line in run.stdout.splitlines() if line.startswith("1x960x7x7")]) == 2
    assert "allocator:" in run.stdout
    found = results.load(tmp_path / "results.json")
    assert all(row["ratios"]["cold"]["eager"] > 0 for row in found["kernels"])
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.csv", "report.html"}


# ------------------------------------------------------------------ whole models


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        timm_layers = pytest.importorskip("timm.layers")
        self.stem = nn.Conv2d(3, 16, 7, stride=8, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.se = timm_layers.SEModule(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.drop(self.se(self.bn(self.stem(x)).relu()).mean((2, 3))))


class SmallNetwork(models.Network):
    def build(self):
        torch.manual_seed(0)
        return Small()


class ZeroInitialised(Small):
    """A residual block as timm initialises it: SE multiplies zeros, a gate on it proves nothing."""

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.head((x + self.se(0 * x)).mean((2, 3)))


class Inert(models.Network):
    def build(self):
        torch.manual_seed(0)
        return ZeroInitialised()


def test_photographs_ship_with_the_package(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    image, batch = models.photograph(), models.crops(3)
    assert image.shape == (1, 3, 224, 224)
    assert batch.shape == (3, 3, 224, 224)
    assert image.std() > 0.5  # a picture, not a constant
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(models.crops(3), batch)


def test_network_is_gated_and_timed():
    forward, training = models.measure(SmallNetwork("timm", "small"), SETTINGS)
    for row in (forward, training):
        assert row["gate"]["ours"]["ok"]
        assert row["replaced"] == row["se_modules"] == 1
        assert row["ratios"]["eager"] > 0
        assert row["ceiling"] >= 1
        assert row["images_per_second"]["ours"] > 0
        assert screen.model_cells(row)["error"] != "RED"


def test_network_with_a_planted_fault_is_red(monkeypatch):
    import attnkern

    real = attnkern.optimize

    def faulty(model, **options):
        report = real(model, **options)
        head = model.head.forward
        model.head.forward = lambda x: head(x) * 1.0001
        return report

    monkeypatch.setattr(attnkern, "optimize", faulty)
    for row in models.measure(SmallNetwork("timm", "small"), SETTINGS):
        assert not row["gate"]["ours"]["ok"]
        assert row["times"] == {}
        assert row["ratios"] == {}
        assert screen.model_cells(row)["×eager"] == "–"


def test_gate_on_a_network_that_ignores_its_se_is_red():
    forward, training = models.measure(Inert("timm", "inert"), SETTINGS)
    for row in (forward, training):
        assert "do not depend on the SE modules" in row["gate"]["ours"]["why"]


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "bench/results").glob("*/results.json")),
    ids=lambda p: p.parent.name,
)
def test_published_results_make_a_report(path, tmp_path):
    """Every kind of row that has been published: layouts, families, rows without torch.compile."""
    published = json.loads(path.read_text())
    targets = [t for bench in rows.benches().values() for t in bench.targets["cpu"]]
    report.write(published, targets, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for row in published["kernels"]:
        assert row["case"] in text
