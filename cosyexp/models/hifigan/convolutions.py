"""The convolutions of the vocoder, centered or causal.

B batch, C channels, S samples or frames.
"""

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


class OneSided(nn.Conv1d):
    """A 1D convolution with padding on either side, after optional upsampling by repetition.

    Mirrors `CausalConv1d`, `CausalConv1dDownSample` and `CausalConv1dUpsample` of the original
    CosyVoice.

    Args:
        ins: Number of input channels.
        outs: Number of output channels.
        kernel: Kernel size.
        before: Zeros on the left.
        after: Zeros on the right.
        stride: Stride.
        dilation: Dilation.
        repeat: How many times each sample is repeated before the convolution.
    """

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int,
        *,
        before: int = 0,
        after: int = 0,
        stride: int = 1,
        dilation: int = 1,
        repeat: int = 1,
    ) -> None:
        super().__init__(ins, outs, kernel, stride, dilation=dilation)
        self.before, self.after, self.repeat = before, after, repeat

    def forward(self, x_BCS: Tensor) -> Tensor:
        """Repeats, pads and convolves `x`."""
        x = x_BCS.repeat_interleave(self.repeat, dim=2) if self.repeat > 1 else x_BCS
        padded = functional.pad(x, (self.before, self.after))
        return self._conv_forward(padded, self.weight, self.bias)


def convolution(ins: int, outs: int, kernel: int, *, causal: bool, dilation: int = 1) -> nn.Conv1d:
    """Returns a convolution with weight norm that keeps the length."""
    reach = dilation * (kernel - 1)
    if causal:
        return weight_norm(OneSided(ins, outs, kernel, before=reach, dilation=dilation))
    return weight_norm(nn.Conv1d(ins, outs, kernel, dilation=dilation, padding=reach // 2))


def entrance(ins: int, outs: int, kernel: int, look_ahead: int | None) -> nn.Conv1d:
    """Returns the first convolution of a module, with weight norm; it keeps the length.

    Args:
        ins: Number of input channels.
        outs: Number of output channels.
        kernel: Kernel size of a centered convolution.
        look_ahead: Frames after its own that it sees; None for a centered convolution.

    Returns:
        The convolution.
    """
    if look_ahead is None:
        return convolution(ins, outs, kernel, causal=False)
    return weight_norm(OneSided(ins, outs, look_ahead + 1, after=look_ahead))


def upsampling(ins: int, outs: int, kernel: int, rate: int, *, causal: bool) -> nn.Module:
    """Returns a convolution with weight norm that makes `rate` samples of each.

    It is a transposed convolution, or, if causal, repetition and a convolution.
    """
    if causal:
        return weight_norm(OneSided(ins, outs, kernel, before=kernel - 1, repeat=rate))
    return weight_norm(nn.ConvTranspose1d(ins, outs, kernel, rate, padding=(kernel - rate) // 2))


def downsampling(ins: int, outs: int, rate: int, *, causal: bool) -> nn.Module:
    """Returns a convolution from rate * n + 1 samples to n; with rate 1, it keeps the length."""
    if rate == 1:
        return nn.Conv1d(ins, outs, 1)
    if causal:
        return OneSided(ins, outs, 2 * rate, before=rate - 1, stride=rate)
    return nn.Conv1d(ins, outs, 2 * rate, rate, padding=rate // 2)
