"""The benchmark of whole networks: photographs, gate, planted faults."""

from __future__ import annotations

import socket

import pytest
import torch
from bench_subject import SETTINGS
from torch import nn

from bench import models, screen


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
        assert row["replaced"] == row["attention_modules"] == 1
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
        assert "do not depend on the attention modules" in row["gate"]["ours"]["why"]
