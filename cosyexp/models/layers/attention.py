"""Multi-head attention of the CosyVoice networks, with relative, rotary or no positions.

B batch, H heads, K head width, Q queries, S keys (Q <= S: the first S - Q come from a cache),
D = H * K, W relative distances, T positions, C channels, R rotated channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def distance_table(first: int, last: int, width: int, like: Tensor) -> Tensor:
    """Returns sinusoidal embeddings of the distances `first`, `first - 1`, ..., `last`.

    The distance from query i to key j is i - j. Even columns are sines, odd columns cosines
    (Vaswani et al. 2017, "Attention Is All You Need", section 3.5).

    Args:
        first: The largest distance, in positions.
        last: The smallest distance, in positions; negative for keys after the query.
        width: Number of columns.
        like: A tensor with the dtype and device of the table.

    Returns:
        The table, (first - last + 1, width).
    """
    distances = torch.arange(first, last - 1, -1, dtype=torch.float32, device=like.device)
    channels = torch.arange(0, width, 2, dtype=torch.float32, device=like.device)
    angles = distances.unsqueeze(1) * torch.exp(channels * (-math.log(10000.0) / width))
    return torch.stack([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(1).to(like.dtype)


def by_key(scores_BHQW: Tensor, keys: int) -> Tensor:
    """Realigns attention scores from distances to keys (the "relative shift" of Transformer-XL).

    The scores of query i start Q - 1 - i columns later than those of the last query. Padding one
    column on the left and reading the same memory with the original row length shifts each row by
    that amount (Dai et al. 2019, "Transformer-XL", appendix B).

    Args:
        scores_BHQW: Scores by distance; column 0 is the distance S - 1, the largest one. If the
            table stops at distance 0, scores of later keys are undefined and must be masked.
        keys: S, the number of keys.

    Returns:
        Scores by key, (B, H, Q, S).
    """
    batch, heads, queries, width = scores_BHQW.shape
    padded = functional.pad(scores_BHQW, [1, 0]).flatten(2)
    return padded[:, :, queries:].view(batch, heads, queries, width)[:, :, :, :keys]


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions (Dai et al. 2019, section 3.3).

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . p_(i-j)) / sqrt(K), where u and v are learned
    biases and p is a projection of `distance_table`. Mirrors `RelPositionMultiHeadedAttention` of
    the original CosyVoice.

    Args:
        width: D, the number of channels.
        heads: H; must divide `width`.
        dropout: Dropout probability of the attention weights.

    Raises:
        ValueError: `width` is not a multiple of `heads`.
    """

    shared_by_rows = ("linear_pos",)  # its input is the distance table, which has no rows

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        self.head_width = width // heads
        # Finite in half precision too, and low enough that its softmax weight is exactly 0.
        self.masked_score = -3e4
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
        """Attends from `x` to the cached positions, if any, and to `x` itself.

        Args:
            x_BQD: The last Q of the S positions.
            positions_WD: `distance_table` from S - 1 down to the smallest distance that is visible.
            visible: Boolean mask that broadcasts to (B, 1, Q, S), True where a query may attend.
                The output of a query that sees no key is finite but meaningless.
            cache_BHSK: Keys and values of earlier positions, concatenated along the channels,
                (B, H, S - Q, 2K); None if there are none.

        Returns:
            The output (B, Q, D), and the keys and values of all positions, (B, H, S, K) each.
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
        weights = torch.softmax(scores.masked_fill(~visible, self.masked_score), dim=-1)
        out = torch.matmul(self.dropout(weights).to(v.dtype), v)
        return self.linear_out(out.transpose(1, 2).reshape(batch, queries, width)), k, v


def rotate(x_BTC: Tensor, angles_TR: Tensor) -> Tensor:
    """Applies rotary positions to the first R channels (Su et al. 2021, "RoFormer", eq. 34).

    Args:
        x_BTC: Queries or keys. Channels 2i and 2i + 1 form a pair that is rotated together;
            channels from R on stay as they are.
        angles_TR: The angle of each channel at each position, in radians, equal within a pair.

    Returns:
        The rotated tensor, (B, T, C).
    """
    first, rest = x_BTC.split([angles_TR.size(-1), x_BTC.size(-1) - angles_TR.size(-1)], dim=-1)
    even, odd = first.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)
    cos = torch.cos(angles_TR).to(x_BTC.dtype)
    sin = torch.sin(angles_TR).to(x_BTC.dtype)
    return torch.cat([first * cos + quarter_turn * sin, rest], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention of the flow estimators (Vaswani et al. 2017, section 3.2).

    The inner width H * K need not equal the number of channels.

    Args:
        channels: C.
        heads: H.
        head_width: K.
        dropout: Dropout probability of the output.
        bias: Whether the projections to queries, keys and values have a bias.
    """

    def __init__(
        self, channels: int, heads: int, head_width: int, dropout: float, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, heads * head_width, bias=bias)
        self.to_k = nn.Linear(channels, heads * head_width, bias=bias)
        self.to_v = nn.Linear(channels, heads * head_width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, channels), nn.Dropout(dropout))

    def forward(
        self,
        x_BTC: Tensor,
        visible: Tensor,
        angles_TR: Tensor | None = None,
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Attends from every position to the visible ones.

        Args:
            x_BTC: The input.
            visible: Boolean mask that broadcasts to (B, 1, T, T), True where a query may attend;
                with `past`, to (B, 1, T, S + T).
            angles_TR: Rotary angles, see `rotate`; None for no positions. They are applied before
                the channels are split into heads, so with R = K only the first head knows about
                positions. The original does the same, and its checkpoints are trained that way.
            past: Keys and values of the S positions before, see `models/flow/parts.py`; None if
                there are none.

        Returns:
            The output, (B, T, C).
        """
        q, k, v = self.to_q(x_BTC), self.to_k(x_BTC), self.to_v(x_BTC)
        if angles_TR is not None:
            q, k = rotate(q, angles_TR), rotate(k, angles_TR)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = k.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if past is not None:
            before_k, before_v = past[1].pop(0).chunk(2, dim=-1)
            k, v = torch.cat([before_k, k], dim=2), torch.cat([before_v, v], dim=2)
            past[1].append(torch.cat([k, v], dim=-1))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.to_out(out.transpose(1, 2).flatten(2))
