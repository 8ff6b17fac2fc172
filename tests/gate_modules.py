"""Attention gates that people copy rather than install, written anew with the same children."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Attention_block(nn.Module):
    """Image_Segmentation's gate: g and x have one size, each branch and the logits a BatchNorm."""

    def __init__(self, F_g, F_l, F_int, dims=2):
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.W_g = nn.Sequential(conv(F_g, F_int, 1), norm(F_int))
        self.W_x = nn.Sequential(conv(F_l, F_int, 1), norm(F_int))
        self.psi = nn.Sequential(conv(F_int, 1, 1), norm(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, g, x):
        hidden = self.relu(self.W_g(g) + self.W_x(x))
        return x * self.psi(hidden)


class AttU_Net(nn.Module):
    """Image_Segmentation's attention U-Net of two levels, its gates called by keyword."""

    def __init__(self, width=8):
        super().__init__()
        self.Conv1 = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.Conv2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.Up2 = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1)
        )
        self.Att2 = Attention_block(F_g=width, F_l=width, F_int=width // 2)
        self.Conv_1x1 = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x):
        x1 = self.Conv1(x)
        d2 = self.Up2(self.Conv2(F.max_pool2d(x1, 2)))
        x1 = self.Att2(g=d2, x=x1)
        return self.Conv_1x1(torch.cat((x1, d2), dim=1))


class _GridAttentionBlockND(nn.Module):
    """Attention-Gated-Networks' gate on a coarser grid: the gated map through W, and the gate."""

    def __init__(self, in_channels, gating_channels, inter_channels=None, dimension=3,
                 mode="concatenation", sub_sample_factor=(2, 2, 2)):  # fmt: skip
        super().__init__()
        factor = sub_sample_factor
        if not isinstance(factor, (tuple, list)):
            factor = (factor,) * dimension
        inter_channels = inter_channels or max(in_channels // 2, 1)
        conv = CONV[dimension]
        self.mode, self.dimension = mode, dimension
        self.upsample_mode = {2: "bilinear", 3: "trilinear"}[dimension]
        self.W = nn.Sequential(conv(in_channels, in_channels, 1), NORM[dimension](in_channels))
        self.theta = conv(in_channels, inter_channels, tuple(factor), tuple(factor), bias=False)
        self.phi = conv(gating_channels, inter_channels, 1)
        self.psi = conv(inter_channels, 1, 1)
        self.operation_function = getattr(self, f"_{mode}")

    def forward(self, x, g):
        return self.operation_function(x, g)

    def _concatenation(self, x, g):
        t = self.theta(x)
        u = F.upsample(self.phi(g), size=t.size()[2:], mode=self.upsample_mode)
        alpha = F.sigmoid(self.psi(F.relu(t + u, inplace=True)))
        alpha = F.upsample(alpha, size=x.size()[2:], mode=self.upsample_mode)
        return self.W(alpha.expand_as(x) * x), alpha

    def _concatenation_debug(self, x, g):
        t = self.theta(x)
        u = F.upsample(self.phi(g), size=t.size()[2:], mode=self.upsample_mode)
        alpha = F.sigmoid(self.psi(F.softplus(t + u)))
        alpha = F.upsample(alpha, size=x.size()[2:], mode=self.upsample_mode)
        return self.W(alpha.expand_as(x) * x), alpha

    def _concatenation_residual(self, x, g):
        t = self.theta(x)
        u = F.upsample(self.phi(g), size=t.size()[2:], mode=self.upsample_mode)
        q = self.psi(F.relu(t + u, inplace=True))
        alpha = F.softmax(q.view(x.size(0), 1, -1), dim=2).view(x.size(0), 1, *t.size()[2:])
        alpha = F.upsample(alpha, size=x.size()[2:], mode=self.upsample_mode)
        return self.W(alpha.expand_as(x) * x), alpha


class GridAttentionBlock2D(_GridAttentionBlockND):
    def __init__(self, in_channels, gating_channels, inter_channels=None, mode="concatenation",
                 sub_sample_factor=(2, 2)):  # fmt: skip
        super().__init__(in_channels, gating_channels, inter_channels, 2, mode, sub_sample_factor)


class GridAttentionBlock3D(_GridAttentionBlockND):
    def __init__(self, in_channels, gating_channels, inter_channels=None, mode="concatenation",
                 sub_sample_factor=(2, 2, 2)):  # fmt: skip
        super().__init__(in_channels, gating_channels, inter_channels, 3, mode, sub_sample_factor)


class AlignedCorners(_GridAttentionBlockND):
    """A copy brought up to date: one method, F.interpolate, the corners as torch 0.3 placed them."""

    def __init__(self, in_channels, gating_channels, dimension=2):
        super().__init__(in_channels, gating_channels, dimension=dimension, sub_sample_factor=2)
        del self.operation_function

    def forward(self, x, g):
        t = self.theta(x)
        u = F.interpolate(self.phi(g), t.shape[2:], mode=self.upsample_mode, align_corners=True)
        alpha = torch.sigmoid(self.psi(F.relu(t + u, inplace=True)))
        alpha = F.interpolate(alpha, x.shape[2:], mode=self.upsample_mode, align_corners=True)
        return self.W(alpha * x), alpha


class MultiAttentionBlock(nn.Module):
    """Two 3-D gates of the same maps, joined."""

    def __init__(self, in_size, gate_size, inter_size, nonlocal_mode="concatenation",
                 sub_sample_factor=(2, 2, 2)):  # fmt: skip
        super().__init__()
        gate = (in_size, gate_size, inter_size, nonlocal_mode, sub_sample_factor)
        self.gate_block_1 = GridAttentionBlock3D(*gate)
        self.gate_block_2 = GridAttentionBlock3D(*gate)
        joint = nn.Conv3d(2 * in_size, in_size, 1)
        self.combine_gates = nn.Sequential(joint, nn.BatchNorm3d(in_size), nn.ReLU(inplace=True))

    def forward(self, input, gating_signal):
        y1, alpha1 = self.gate_block_1(input, gating_signal)
        y2, alpha2 = self.gate_block_2(input, gating_signal)
        return self.combine_gates(torch.cat([y1, y2], 1)), torch.cat([alpha1, alpha2], 1)


class _GridAttentionBlockND_TORR(nn.Module):
    """The classifier's gate: any layer may be the identity, the logits are normalised in five ways."""

    def __init__(self, in_channels, gating_channels, inter_channels=None, dimension=3,
                 mode="concatenation", sub_sample_factor=(1, 1, 1), bn_layer=True, use_W=True,
                 use_phi=True, use_theta=True, use_psi=True, nonlinearity1="relu"):  # fmt: skip
        super().__init__()
        factor, conv = sub_sample_factor[:dimension], CONV[dimension]
        inter_channels = inter_channels or max(in_channels // 2, 1)
        self.mode, self.upsample_mode = mode, {2: "bilinear", 3: "trilinear"}[dimension]
        self.W = self.theta = self.phi = self.psi = self.nl1 = lambda x: x
        if use_W:
            self.W = conv(in_channels, in_channels, 1)
            if bn_layer:
                self.W = nn.Sequential(self.W, NORM[dimension](in_channels))
        if use_theta:
            self.theta = conv(in_channels, inter_channels, factor, factor, bias=False)
        if use_phi:
            self.phi = conv(gating_channels, inter_channels, factor, factor, bias=False)
        if use_psi:
            self.psi = conv(inter_channels, 1, 1)
        if nonlinearity1 == "relu":
            self.nl1 = lambda x: F.relu(x, inplace=True)
        self.operation_function = self._concatenation

    def forward(self, x, g):
        return self.operation_function(x, g)

    def _concatenation(self, x, g):
        t = self.theta(x)
        f = t + F.upsample(self.phi(g), size=t.size()[2:], mode=self.upsample_mode)
        q = self.psi(self.nl1(f))
        flat = q.view(x.size(0), 1, -1)
        if self.mode == "concatenation_softmax":
            alpha = F.softmax(flat, dim=2)
        elif self.mode == "concatenation_mean":
            alpha = flat / torch.sum(flat, dim=2)[:, :, None].expand_as(flat)
        elif self.mode == "concatenation_mean_flow":
            flat = flat - flat.min(dim=2)[0].view(x.size(0), 1, 1)
            alpha = flat / torch.sum(flat, dim=2).view(x.size(0), 1, 1)
        elif self.mode == "concatenation_range_normalise":
            low = torch.min(flat, dim=2)[0].view(x.size(0), 1, 1)
            alpha = (flat - low) / (torch.max(flat, dim=2)[0].view(x.size(0), 1, 1) - low)
        elif self.mode == "concatenation_sigmoid":
            alpha = F.sigmoid(flat)
        else:
            raise NotImplementedError
        alpha = alpha.view(x.size(0), 1, *t.size()[2:])
        alpha = F.upsample(alpha, size=x.size()[2:], mode=self.upsample_mode)
        return self.W(alpha.expand_as(x) * x), alpha
