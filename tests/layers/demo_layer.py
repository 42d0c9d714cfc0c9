"""The public demo's layer, written again from its description: plain torch, its parameter names, dense gradients."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class DemoEmbedding(nn.Module):
    def __init__(self, sizes, dim):
        super().__init__()
        offsets = [0]
        for size in sizes[:-1]:
            offsets.append(offsets[-1] + size)
        self.register_buffer("offsets", torch.tensor(offsets))
        self.embedding = nn.Embedding(sum(sizes), dim)


class DemoConv(nn.Module):
    def __init__(self, d, kernel, dilation, branches):
        super().__init__()
        self.conv = nn.Conv1d(
            d * branches,
            d * branches,
            kernel,
            groups=d * branches,
            bias=False,
            padding=(kernel - 1) * dilation,
            dilation=dilation,
        )
        self.norms = nn.ModuleList(nn.RMSNorm(d, eps=1e-5) for _ in range(branches))


class DemoLayer(nn.Module):
    def __init__(self, sizes, d_mem, dim, d, branches, kernel, dilation):
        super().__init__()
        self.multi_head_embedding = DemoEmbedding(sizes, dim)
        self.short_conv = DemoConv(d, kernel, dilation, branches)
        self.value_proj = nn.Linear(d_mem, d)
        self.key_projs = nn.ModuleList(nn.Linear(d_mem, d) for _ in range(branches))
        self.norm1 = nn.ModuleList(nn.RMSNorm(d) for _ in range(branches))
        self.norm2 = nn.ModuleList(nn.RMSNorm(d) for _ in range(branches))

    def forward(self, hidden, hash_ids):
        """hidden [B, T, M, d], hash_ids [B, T, heads]."""
        table = self.multi_head_embedding
        e = table.embedding(hash_ids + table.offsets).flatten(2)
        gated = []
        for m, key_proj in enumerate(self.key_projs):
            key, query = self.norm1[m](key_proj(e)), self.norm2[m](hidden[:, :, m])
            g = (key * query).sum(-1) / math.sqrt(hidden.shape[-1])
            g = torch.sigmoid(g.abs().clamp_min(1e-6).sqrt() * g.sign())
            gated.append(g.unsqueeze(-1) * self.value_proj(e))
        value = torch.stack(gated, dim=2)
        normed = torch.cat([norm(value[:, :, m]) for m, norm in enumerate(self.short_conv.norms)], dim=-1)
        out = self.short_conv.conv(normed.transpose(1, 2))[..., : value.shape[1]]
        return value + F.silu(out).transpose(1, 2).reshape(value.shape)
