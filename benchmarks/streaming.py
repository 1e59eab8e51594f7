"""Cost of the chunks of a stream, by the position in the utterance, and of a batch of texts.

Usage: python benchmarks/streaming.py [seconds] [family ...]

The networks have random weights and, except for their depth and width, the settings of the family.
For each chunk of a second, the flow and the vocoder run once with what they keep of the past, and
once on everything from the start of the utterance, as the original does. The two alternate, so that
a busy machine slows down both alike.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosyexp.cli.compose import compose_train
from cosyexp.exporting.components import fold_parametrizations
from cosyexp.models.flow.generate import FlowStream
from cosyexp.registry import build

FAMILIES = ("cosyvoice2", "cosyvoice3")
SIZES = {
    ("cosyvoice2", "flow"): [
        *("encoder.width=128", "encoder.heads=4", "encoder.hidden=256", "encoder.blocks=2"),
        *("estimator.channels=[64]", "estimator.mid_blocks=2", "estimator.heads=2"),
    ],
    ("cosyvoice3", "flow"): [
        *("hidden=128", "estimator.width=128", "estimator.blocks=6", "estimator.heads=2"),
        "estimator.hidden=256",
    ],
    ("cosyvoice2", "hifigan"): ["channels=32"],
    ("cosyvoice3", "hifigan"): ["channels=32"],
}


def network(family: str, model: str) -> Any:
    """Returns a network with random weights, as synthesis runs it."""
    sizes = [f"network.{size}" for size in SIZES[family, model]]
    config = compose_train([f"family={family}", f"model={model}", *sizes])
    torch.manual_seed(0)
    built = build(config.network, "network").eval().requires_grad_(False)
    fold_parametrizations(built)
    return built


def stream_of(flow: Any, noise_BFT: Tensor) -> FlowStream:
    """Returns a stream without a prompt."""
    left = [noise_BFT]

    def next_noise(frames: int) -> Tensor:
        piece, left[0] = left[0][:, :, :frames], left[0][:, :, frames:]
        return piece

    return FlowStream(
        flow,
        torch.ones(1, 192),
        next_noise,
        prompt_token_BP=torch.zeros(1, 0, dtype=torch.long),
        prompt_mel_BFQ=noise_BFT[:, :, :0],
        guidance=0.7,
    )


def timed(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """Returns the result of a function, and the milliseconds that it took."""
    start = time.perf_counter()
    result = function(*args, **options)
    return result, 1000 * (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    torch.set_num_threads(1)
    print("milliseconds per chunk: with the past kept / from the start of the utterance")
    for family in sys.argv[2:] or FAMILIES:
        measure(family, network(family, "flow"), network(family, "hifigan"), seconds)


def measure(family: str, flow: Any, vocoder: Any, seconds: int) -> None:
    """Prints the rows of a family."""
    hop, frames = vocoder.m_source.hop, 50 * seconds
    tokens = torch.randint(6561, (1, 25 * seconds + flow.look_ahead))
    noise, phase = torch.randn(1, 80, frames), torch.zeros(1, 9)
    excitation = torch.randn(1, 9, frames * hop)
    stream, past, mel, wave = stream_of(flow, noise), None, noise[:, :, :0], noise[:, 0, :0]
    difference = 0.0
    for i in range(seconds):
        end = 25 * (i + 1) + flow.look_ahead
        new, kept = timed(stream, tokens[:, end - 25 if i else 0 : end], False)
        whole, anew = timed(stream_of(flow, noise), tokens[:, :end], False)
        mel = torch.cat([mel, new], dim=2)
        drawn = excitation[:, :, : mel.size(2) * hop]
        (piece, past), kept_wave = timed(
            vocoder.speak, new, phase, drawn[:, :, wave.size(1) :], past=past, final=False
        )
        (speech, _), anew_wave = timed(vocoder, mel, phase, drawn)
        wave = torch.cat([wave, piece], dim=1)
        difference = max(difference, float((whole - mel).abs().max()))
        if i in (0, 1, seconds // 2, seconds - 1):
            print(
                f"{family:11} chunk {i + 1:3}: flow {kept:6.0f} / {anew:6.0f}, "
                f"vocoder {kept_wave:5.0f} / {anew_wave:5.0f}"
            )
    print(
        f"{family:11} largest difference: mel {difference:.1e}, waveform "
        f"{float((speech[:, : wave.size(1)] - wave).abs().max()):.1e}"
    )


if __name__ == "__main__":
    main()
