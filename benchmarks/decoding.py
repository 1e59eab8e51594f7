"""Decoding speed of the language models at their real sizes, with and without the cache.

Usage: python benchmarks/decoding.py [tokens] [family ...]

The weights are random. Without the cache, the whole sequence goes through the network again for
every token. The two alternate, so that a busy machine slows down both alike.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosyexp.cli.compose import compose_train
from cosyexp.registry import build

FAMILIES = ("demo", "cosyvoice", "cosyvoice2", "cosyvoice3")
TEXT = 20  # tokens of the prompt
ROUNDS = 3
Decode = Callable[[Any, Tensor, int], None]  # of the network, the prompt and the number of tokens


def cached(network: Any, prompt: Tensor, tokens: int) -> None:
    """Decodes with the key-value cache."""
    logp, cache = network.decode(prompt, network.empty_cache(prompt))
    for _ in range(tokens - 1):
        logp, cache = network.decode(network.speech_embedding(next_token(network, logp)), cache)


def again(network: Any, prompt: Tensor, tokens: int) -> None:
    """Decodes by running the network on the whole sequence for each token."""
    x = prompt
    for _ in range(tokens - 1):
        logp, _ = network.decode(x, network.empty_cache(x))
        x = torch.cat([x, network.speech_embedding(next_token(network, logp))], dim=1)


def next_token(network: Any, logp: Tensor) -> Tensor:
    """Returns the most likely speech token."""
    return logp[:, : network.speech_embedding.num_embeddings].argmax(-1, keepdim=True)


def seconds(decode: Decode, network: Any, prompt: Tensor, tokens: int) -> float:
    """Returns the time of decoding."""
    start = time.perf_counter()
    decode(network, prompt, tokens)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    torch.set_num_threads(1)
    print(f"{'family':12} {'tokens/s':>10} {'of real time':>13} {'cached : again':>15}")
    for family in sys.argv[2:] or FAMILIES:
        config = compose_train([f"family={family}", "model=llm"])
        network = build(config.network, "network").eval()
        text, speaker = torch.ones(1, TEXT, dtype=torch.long), config.family.speaker_dim
        prompt = network.prompt(text, torch.randn(1, speaker))
        times = [
            tuple(seconds(decode, network, prompt, tokens) for decode in (cached, again))
            for _ in range(ROUNDS)
        ]
        rate = tokens / min(ours for ours, _ in times)
        ratio = statistics.median(ours / theirs for ours, theirs in times)
        real_time = rate / config.family.token_rate
        print(f"{family:12} {rate:10.1f} {real_time:13.2f} {ratio:15.3f}", flush=True)


if __name__ == "__main__":
    main()
