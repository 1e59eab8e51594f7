"""Attention: with relative positions, as the text encoder, the speech-token LM and the flow encoder use it, and without.

B batch, H heads, K width of a head, Q queries, S keys (Q <= S: a cache holds the first S - Q), D = H * K,
W distances, T positions, C channels, R rotated channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def distance_table(first: int, last: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids of the distances `first`, `first - 1`, ..., `last` between a query and a key.

    Returns (first - last + 1, width) in the dtype and on the device of `like`: sine in the even columns, cosine in the odd
    ones (Vaswani et al. 2017, section 3.5).
    """
    distances = torch.arange(first, last - 1, -1, dtype=torch.float32, device=like.device)
    channels = torch.arange(0, width, 2, dtype=torch.float32, device=like.device)
    angles = distances.unsqueeze(1) * torch.exp(channels * (-math.log(10000.0) / width))
    return torch.stack([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(1).to(like.dtype)


def by_key(scores_BHQW: Tensor, keys: int) -> Tensor:
    """Turns scores by distance into scores by key: out[i, j] = scores[i, column of the distance from query i to key j].

    Row i of the table of distances starts Q - 1 - i columns later than row Q - 1; padding one column on the left and reading
    the memory with another row length shifts every row by that much (Dai et al. 2019, appendix B).
    """
    batch, heads, queries, width = scores_BHQW.shape
    padded = functional.pad(scores_BHQW, [1, 0]).flatten(2)
    return padded[:, :, queries:].view(batch, heads, queries, width)[:, :, :, :keys]


class RelativeAttention(nn.Module):
    """Multi-head attention whose scores add a term of the distance (Dai et al. 2019, section 3.3, parametrisation b).

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . p_(i-j)) / sqrt(K)
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.head_width = width // heads
        self.hidden = -3e4  # score of an invisible key: finite in half precision too, its weight underflows to exactly 0
        self.scale = 1.0 / math.sqrt(self.head_width)
        self.pos_bias_u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, self.head_width)))
        self.pos_bias_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, self.head_width)))
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BQD: Tensor, positions_WD: Tensor, visible: Tensor, cache_BHSK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends from `x` to the cached keys, if any, and to itself.

        positions: the distance table, from the largest distance of a pair down to the smallest.
        visible: bool, broadcastable to (B, 1, Q, S), True where a query may look. What a query that sees nothing returns
            has no meaning, but is finite.
        cache: (B, H, S - Q, 2K), keys and values side by side.
        Returns the output (B, Q, D), and all keys and values, (B, H, S, K) each.
        """
        batch, queries, width = x_BQD.shape
        q = self.linear_q(x_BQD).view(batch, queries, self.heads, self.head_width).transpose(1, 2)
        k = self.linear_k(x_BQD).view(batch, queries, self.heads, self.head_width).transpose(1, 2)
        v = self.linear_v(x_BQD).view(batch, queries, self.heads, self.head_width).transpose(1, 2)
        if cache_BHSK is not None:
            k = torch.cat([cache_BHSK[..., : self.head_width].to(k.dtype), k], dim=2)
            v = torch.cat([cache_BHSK[..., self.head_width :].to(v.dtype), v], dim=2)
        p = self.linear_pos(positions_WD).view(-1, self.heads, self.head_width).permute(1, 2, 0)

        content = torch.matmul((q + self.pos_bias_u.unsqueeze(1)) * self.scale, k.transpose(-2, -1))
        distance = torch.matmul((q + self.pos_bias_v.unsqueeze(1)) * self.scale, p)
        scores = content + by_key(distance, k.size(2))
        weights = torch.softmax(scores.masked_fill(~visible, self.hidden), dim=-1)
        out = torch.matmul(self.dropout(weights).to(v.dtype), v)
        return self.linear_out(out.transpose(1, 2).reshape(batch, queries, width)), k, v


def rotate(x_BTC: Tensor, angles_TR: Tensor) -> Tensor:
    """Turns the first R channels, pair (2i, 2i + 1) after pair, by the angles of their position (Su et al. 2021, eq. 34)."""
    turned, kept = x_BTC.split([angles_TR.size(-1), x_BTC.size(-1) - angles_TR.size(-1)], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    quarter = torch.stack([-odd, even], dim=-1).flatten(-2)
    turned = turned * torch.cos(angles_TR).to(x_BTC.dtype) + quarter * torch.sin(angles_TR).to(
        x_BTC.dtype
    )
    return torch.cat([turned, kept], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention whose inner width need not be the outer one, as the estimators of the flow use it."""

    def __init__(
        self, channels: int, heads: int, head_width: int, dropout: float, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, heads * head_width, bias=bias)
        self.to_k = nn.Linear(channels, heads * head_width, bias=bias)
        self.to_v = nn.Linear(channels, heads * head_width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, channels), nn.Dropout(dropout))

    def forward(self, x_BTC: Tensor, visible: Tensor, angles_TR: Tensor | None = None) -> Tensor:
        """visible: bool, broadcastable to (B, 1, T, T). angles: of rotary positions.

        They turn the first R of all channels, before these are divided into heads: with R the width of a head, only the
        first head knows positions. The original is so, and its weights are trained so.
        """
        q, k, v = self.to_q(x_BTC), self.to_k(x_BTC), self.to_v(x_BTC)
        if angles_TR is not None:
            q, k = rotate(q, angles_TR), rotate(k, angles_TR)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = k.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.to_out(out.transpose(1, 2).flatten(2))
