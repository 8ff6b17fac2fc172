"""What people copy rather than install, written anew with the same children: CLIP's, CLAM's and captioning pools."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class AttentionPool2d(nn.Module):
    """CLIP's pool as open_clip runs it: every token queries, the first is kept."""

    def __init__(self, spacial_dim, embed_dim, num_heads, output_dim=None):
        super().__init__()
        positions = torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5
        self.positional_embedding = nn.Parameter(positions)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x):
        n = x.reshape(x.shape[0], x.shape[1], -1).permute(2, 0, 1)
        n = torch.cat([n.mean(0, keepdim=True), n])
        n = n + self.positional_embedding[:, None].to(n.dtype)
        n, _ = F.multi_head_attention_forward(
            n, n, n, n.shape[2], self.num_heads, None,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )  # fmt: skip
        return n[0]


class OpenAIAttentionPool2d(AttentionPool2d):
    """CLIP's pool as OpenAI runs it: the first token alone queries."""

    def forward(self, x):
        n = x.flatten(2).permute(2, 0, 1)
        n = torch.cat([n.mean(0, keepdim=True), n])
        n = n + self.positional_embedding[:, None].to(n.dtype)
        n, _ = F.multi_head_attention_forward(
            query=n[:1], key=n, value=n,
            embed_dim_to_check=n.shape[-1],
            num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )  # fmt: skip
        return n.squeeze(0)


class Attn_Net(nn.Module):
    """CLAM's ungated scorer: raw scores and the input.  Any truthy dropout means p = 0.25."""

    def __init__(self, L=32, D=16, dropout=False, n_classes=1):
        super().__init__()
        drop = [nn.Dropout(0.25)] if dropout else []
        self.module = nn.Sequential(nn.Linear(L, D), nn.Tanh(), *drop, nn.Linear(D, n_classes))

    def forward(self, x):
        return self.module(x), x


class Attn_Net_Gated(nn.Module):
    """CLAM's gated scorer."""

    def __init__(self, L=32, D=16, dropout=False, n_classes=1):
        super().__init__()
        drop = [nn.Dropout(0.25)] if dropout else []
        self.attention_a = nn.Sequential(nn.Linear(L, D), nn.Tanh(), *drop)
        self.attention_b = nn.Sequential(nn.Linear(L, D), nn.Sigmoid(), *drop)
        self.attention_c = nn.Linear(D, n_classes)

    def forward(self, x):
        hidden = self.attention_a(x).mul(self.attention_b(x))
        return self.attention_c(hidden), x


class CLAM(nn.Module):
    """CLAM's bag path (CLAM_SB for one class, CLAM_MB's shared net for more)."""

    def __init__(self, gate=True, dropout=0.0, n_classes=1, width=32):
        super().__init__()
        net = (Attn_Net_Gated if gate else Attn_Net)(width, 16, dropout, n_classes)
        layers = nn.Linear(24, width), nn.ReLU(), nn.Dropout(dropout), net
        self.attention_net = nn.Sequential(*layers)
        self.classifiers = nn.Linear(width, 2)

    def forward(self, h, attention_only=False):
        A, h = self.attention_net(h)
        A = torch.transpose(A, 1, 0)
        if attention_only:
            return A
        return self.classifiers(torch.mm(F.softmax(A, dim=1), h)), A


def clam_forward(bag_logits):
    """The forward of CLAM_SB and CLAM_MB, which differ in how a bag's [K, D] becomes its logits."""

    def forward(
        self, h, label=None, instance_eval=False, return_features=False, attention_only=False
    ):
        A, h = self.attention_net(h)
        A = torch.transpose(A, 1, 0)
        if attention_only:
            return A
        raw, A, results = A, F.softmax(A, dim=1), {}
        if instance_eval:
            loss, preds, targets = 0.0, [], []
            own = F.one_hot(label, num_classes=self.n_classes).squeeze()
            for i in range(len(self.instance_classifiers)):
                inside = own[i].item() == 1
                if inside or self.subtyping:
                    found = self.inst_eval(A[i % len(A)], h, self.instance_classifiers[i], inside)
                    loss = loss + found[0]
                    preds.extend(found[1].cpu().numpy())
                    targets.extend(found[2].cpu().numpy())
            results = {"instance_loss": loss, "inst_preds": preds, "inst_labels": targets}
        M = torch.mm(A, h)
        logits = bag_logits(self, M)
        best, probabilities = torch.topk(logits, 1, dim=1)[1], F.softmax(logits, dim=1)
        if return_features:
            results.update({"features": M})
        return logits, probabilities, best, raw, results

    return forward


def bag_logits_by_branch(self, M):
    logits = torch.empty(1, self.n_classes).float().to(M.device)
    for c in range(self.n_classes):
        logits[0, c] = self.classifiers[c](M[c])
    return logits


class CLAM_SB(nn.Module):
    """CLAM's classifier of bags with one row of attention, and its clustering of instances."""

    def __init__(self, gate=True, dropout=0.0, branches=1, n_classes=3, subtyping=False, width=32):
        super().__init__()
        net = (Attn_Net_Gated if gate else Attn_Net)(width, 16, dropout, branches)
        layers = nn.Linear(24, width), nn.ReLU(), nn.Dropout(dropout), net
        self.attention_net = nn.Sequential(*layers)
        self.classifiers = nn.Linear(width, n_classes)
        pairs = (nn.Linear(width, 2) for _ in range(n_classes))
        self.instance_classifiers = nn.ModuleList(pairs)
        self.instance_loss_fn = nn.CrossEntropyLoss()
        self.k_sample, self.n_classes, self.subtyping = 4, n_classes, subtyping

    def inst_eval(self, A, h, classifier, inside):
        """The most attended are evidence of the bag's class, of others they and the least are not."""
        ids = A.topk(self.k_sample)[1]
        ids = torch.cat([ids, (-A).topk(self.k_sample)[1]]) if inside else ids
        targets = (torch.arange(len(ids), device=h.device) < self.k_sample * inside).long()
        logits = classifier(h[ids])
        return self.instance_loss_fn(logits, targets), logits.argmax(1), targets

    forward = clam_forward(lambda self, M: self.classifiers(M))


class CLAM_MB(CLAM_SB):
    """A row of attention and a classifier for each class."""

    def __init__(self, n_classes=3, width=32, **options):
        super().__init__(branches=n_classes, n_classes=n_classes, width=width, **options)
        self.classifiers = nn.ModuleList(nn.Linear(width, 1) for _ in range(n_classes))

    forward = clam_forward(bag_logits_by_branch)


class Slide(nn.Module):
    """What training differentiates of a CLAM classifier: logits, raw scores and features."""

    def __init__(self, clam):
        super().__init__()
        self.clam = clam

    def forward(self, h):
        logits, _, _, raw, results = self.clam(h, return_features=True)
        return logits, raw, results["features"]


class Attention(nn.Module):
    """Show, Attend and Tell's attention: the keys are projected at every call."""

    def __init__(self, encoder_dim=24, decoder_dim=12, attention_dim=16):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu = nn.ReLU()
        self.softmax = nn.Softmax(dim=1)

    def forward(self, encoder_out, decoder_hidden):
        k = self.encoder_att(encoder_out)
        q = self.decoder_att(decoder_hidden)
        e = self.full_att(self.relu(k + q.unsqueeze(1))).squeeze(2)
        alpha = self.softmax(e)
        return (encoder_out * alpha.unsqueeze(2)).sum(dim=1), alpha


class Decoder(nn.Module):
    """Teacher forcing over captions of decreasing length, as the tutorial decodes."""

    def __init__(self, steps=4):
        super().__init__()
        self.attention = Attention()
        self.cell = nn.LSTMCell(24, 12)
        self.steps = steps

    def forward(self, x):
        x = x[torch.arange(len(x))]
        h = c = x.new_zeros(len(x), 12)
        alphas = []
        for step in range(self.steps):
            rows = len(x) - step // 2
            z, alpha = self.attention(x[:rows], h[:rows])
            h, c = self.cell(z, (h[:rows], c[:rows]))
            alphas.append(alpha)
        return torch.cat([h, *(alpha[: len(h)] for alpha in alphas)], 1)


class TorchmilLinear(nn.Module):
    """torchmil's LazyLinear once it knows its width."""

    def __init__(self, *sizes):
        super().__init__()
        self.module = nn.Linear(*sizes)

    def forward(self, x):
        return self.module(x)


TorchmilLinear.__module__, TorchmilLinear.__qualname__ = "torchmil.nn.utils", "LazyLinear"


def masked_softmax(f, mask):
    return F.softmax(f.masked_fill(mask == 0, float("-inf")), dim=1)


class AttentionPool(nn.Module):
    """torchmil's pool, which is found by its qualified name."""

    def __init__(self, in_dim=24, att_dim=16, act="tanh", gated=False):
        super().__init__()
        self.act, self.gated = act, gated
        self.fc1 = TorchmilLinear(in_dim, att_dim)
        self.fc2 = nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated = TorchmilLinear(in_dim, att_dim)
            self.act_gated = nn.Sigmoid()
        self.act_layer = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[act]()

    def forward(self, X, mask=None, return_att=False):
        batch, items = X.shape[0], X.shape[1]
        if mask is None:
            mask = torch.ones(batch, items, device=X.device)
        mask = mask.unsqueeze(dim=-1)
        H = self.fc1(X)
        H = self.act_layer(H)
        if self.gated:
            G = self.fc_gated(X)
            G = self.act_gated(G)
            H = H * G
        f = self.fc2(H)
        s = masked_softmax(f, mask)
        z = torch.bmm(X.transpose(1, 2), s).squeeze(dim=-1)
        return (z, f.squeeze(dim=-1)) if return_att else z


AttentionPool.__module__ = "torchmil.nn.attention.attention_pool"
