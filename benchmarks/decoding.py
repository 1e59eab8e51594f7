"""Speech tokens a second of the language models, at their real sizes and with random weights: with the cache and without.

    python benchmarks/decoding.py [tokens] [family ...]

Without, the whole sequence goes through the network again for every token. The two take turns within this run.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from cosyexp.registry import build
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from cosyexp.cli.hydra_app import CONFIG_DIR, register

FAMILIES = ("demo", "cosyvoice", "cosyvoice2", "cosyvoice3")
TEXT = 20  # tokens of the prompt
ROUNDS = 3


def network_of(family: str) -> tuple[Any, Any]:
    """The network, and the config of its family."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR.resolve())):
        config: Any = OmegaConf.to_container(
            compose("train", [f"family={family}", "model=llm"]), resolve=True
        )
    return build(config.network, "network").eval(), config["family"]


def cached(network: Any, prompt: Tensor, tokens: int) -> None:
    logp, cache = network.decode(prompt, network.empty_cache(prompt))
    for _ in range(tokens - 1):
        logp, cache = network.decode(network.speech_embedding(next_token(network, logp)), cache)


def again(network: Any, prompt: Tensor, tokens: int) -> None:
    x = prompt
    for _ in range(tokens - 1):
        logp, _ = network.decode(x, network.empty_cache(x))
        x = torch.cat([x, network.speech_embedding(next_token(network, logp))], dim=1)


def next_token(network: Any, logp: Tensor) -> Tensor:
    return logp[:, : network.speech_embedding.num_embeddings].argmax(-1, keepdim=True)


def seconds(decode: Callable[[Any, Tensor, int], None], *arguments: Any) -> float:
    began = time.perf_counter()
    decode(*arguments)
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    print(f"{'family':12} {'tokens/s':>10} {'of real time':>13} {'cached : again':>15}")
    for family in sys.argv[2:] or FAMILIES:
        network, shared = network_of(family)
        prompt = network.prompt(
            torch.ones(1, TEXT, dtype=torch.long), torch.randn(1, shared["speaker_dim"])
        )
        times = [
            (seconds(cached, network, prompt, tokens), seconds(again, network, prompt, tokens))
            for _ in range(ROUNDS)
        ]
        rate = tokens / min(ours for ours, _ in times)
        ratio = statistics.median(ours / theirs for ours, theirs in times)
        print(
            f"{family:12} {rate:10.1f} {rate / shared['token_rate']:13.2f} {ratio:15.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
