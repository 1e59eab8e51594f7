"""Generates answers, speech tokens of a trained llm, to the texts of a data set in batches.

B batch, L text tokens, E speaker embedding, V speech classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyexp.config import TrainConfig
from cosyexp.data.draws import keyed
from cosyexp.data.utterance import Utterance
from cosyexp.models.llm.decoding import Choose, decode_batch
from cosyexp.models.llm.sampling import drawn_from
from cosyexp.registry import build
from cosyexp.run.networks import load_network


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The input that an answer is generated from.

    Attributes:
        utt: id of the utterance.
        lead: number of text tokens, at the start, that belong to the instruction.
        text: text tokens, (L,).
        speaker: speaker embedding, (E,).
    """

    utt: str
    lead: int
    text: np.ndarray
    speaker: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Number of text tokens, and of those of the instruction.

        Prompts of equal size share a batch without padding, and have the same limits.
        """
        return len(self.text), self.lead


class AnswerGenerator:
    """Generates several answers to each prompt.

    The random draws of an answer depend on its utterance and its number, but not on its batch.

    Args:
        config: of the run of the llm.
        weights: file of its weights.
        times: number of answers per prompt.
        batch_size: maximum number of answers that are generated at once.
        seed: of all random draws.
        device: where the llm runs.
    """

    def __init__(
        self,
        config: TrainConfig,
        weights: Path,
        *,
        times: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.family = config.family
        self.fields = build(config.model.collator, "collator").fields
        self.sample = build(self.family.sampler, "token_sampler")
        self.times, self.batch_size, self.seed = times, batch_size, seed
        self.device = device
        self.network: Any = load_network(config.network, weights)
        self.network.eval().requires_grad_(False).to(self.device)

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Returns the prompt of a row of a shard.

        Raises:
            ValueError: the row cannot be used for training either.
        """
        utterance = Utterance(row)
        self.fields["speech"](utterance)
        names = [name for name in ("instruct", "text") if name in self.fields]
        text = [self.fields[name](utterance) for name in names]
        return Prompt(
            utt=row["utt"],
            lead=sum(map(len, text[:-1])),
            text=np.concatenate(text),
            speaker=self.fields["speaker"](utterance),
        )

    def limits(self, prompt: Prompt) -> tuple[int, int]:
        """Returns the minimum and the maximum number of speech tokens of an answer."""
        size = len(prompt.text) - prompt.lead
        fewest, most = (int(ratio * size) for ratio in self.family.speech_per_text)
        return fewest, most

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """Yields the answers, each as the index of its prompt and its speech tokens.

        The order of the prompts is arbitrary; the answers to one prompt are in the order of their
        numbers.
        """

        def size(job: tuple[int, int]) -> tuple[int, int]:
            return prompts[job[0]].size

        jobs = sorted(product(range(len(prompts)), range(self.times)), key=size)
        for _, same in groupby(jobs, key=size):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                indices, numbers = zip(*batch, strict=True)
                answers = self._generate([prompts[i] for i in indices], numbers)
                yield from zip(indices, answers, strict=True)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[list[int]]:
        text = np.stack([prompt.text for prompt in prompts])
        speaker = np.stack([prompt.speaker for prompt in prompts])
        text_BL = torch.from_numpy(text).long().to(self.device)
        speaker_BE = torch.from_numpy(speaker).to(self.device)
        x = self.network.prompt(text_BL, speaker_BE)
        logp_BV, cache = self.network.decode(x, self.network.empty_cache(x))
        pairs = zip(prompts, numbers, strict=True)
        choose = [self._choose(prompt.utt, number) for prompt, number in pairs]
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in decode_batch(
            logp_BV,
            cache,
            self._next,
            choose,
            speech_vocabulary=self.family.speech_vocabulary,
            limits=[self.limits(prompts[0])] * len(prompts),
        ):
            for row, token in tokens.items():
                answers[row].append(token)
        return answers

    def _next(self, token_B: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        x_B1D = self.network.speech_embedding(token_B.to(self.device)).unsqueeze(1)
        logp_BV, cache = self.network.decode(x_B1D, cache)
        return logp_BV, cache

    def _choose(self, utt: str, number: int) -> Choose:
        seed = int(keyed(self.seed, utt, "prefer", number).integers(2**63))
        draw = drawn_from(torch.Generator().manual_seed(seed))
        choose: Choose = partial(self.sample, draw=draw)
        return choose
