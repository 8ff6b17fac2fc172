"""The benchmark as a command: its options and exit codes, and files that say what ran."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_subject import TINY, crash, one_percent, plant

from bench import __main__ as cli
from bench import machine, models, report, results, rows, runner

ROOT = Path(__file__).resolve().parent.parent


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


def test_report_is_one_file_with_plots(quick):
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


def test_report_of_a_red_run_says_so_and_draws_no_bars(quick, monkeypatch):
    plant(monkeypatch, one_percent)
    code, out = quick()
    page = (out / "report.html").read_text()
    assert code == 1
    assert "Red: these rows are wrong" in page
    assert "gate red (reference)" in page
    assert "<svg" not in page


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


# ------------------------------------------------------------------ command


@pytest.mark.parametrize("fault", [one_percent, crash], ids=lambda f: f.__name__)
def test_red_gate_fails_the_command_and_prints_no_speedup(quick, capsys, fault, monkeypatch):
    plant(monkeypatch, fault)
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
        (["--op", "nothing"], f"--op must be one of {', '.join(rows.benches())}, got nothing"),
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
