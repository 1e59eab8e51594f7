"""What a trained llm says of the texts of a data set.

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

from cosyexp.data.draws import keyed
from cosyexp.data.fields import Utterance
from cosyexp.models.llm.decoding import Choose, decode_batch
from cosyexp.models.llm.sampling import drawn_from
from cosyexp.run.targets import build
from cosyexp.run.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """text: token ids, of which the first `lead` are an instruction."""

    utt: str
    lead: int
    text: np.ndarray
    speaker: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Prompts of one size can stand in one batch without padding, and have the same limits."""
        return len(self.text), self.lead


class AnswerGenerator:
    """Speaks each prompt `times` times; every candidate has draws of its own, whatever it is batched with.

    config: of the run. weights: the file. batch_size: candidates side by side, of texts of one length.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Path, *, times: int, batch_size: int, seed: int
    ) -> None:
        self.family, self.fields = config["family"], build(config["model"]["collator"]).fields
        self.sample = build(self.family["sampler"])
        self.times, self.batch_size, self.seed = times, batch_size, seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = build(config["network"])
        load_weights(self.network, weights)
        self.network.eval().requires_grad_(False).to(self.device)

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        """What the network reads of a row. ValueError where the row could not be trained on."""
        utterance = Utterance(row)
        self.fields["speech"](utterance)
        text = [
            self.fields[name](utterance) for name in ("instruct", "text") if name in self.fields
        ]
        lead = sum(map(len, text[:-1]))
        return Prompt(
            utt=row["utt"],
            lead=lead,
            text=np.concatenate(text),
            speaker=self.fields["speaker"](utterance),
        )

    def limits(self, prompt: Prompt) -> tuple[int, int]:
        """The fewest and the most tokens of an answer."""
        min_tokens, max_tokens = (
            int(ratio * (len(prompt.text) - prompt.lead))
            for ratio in self.family["speech_per_text"]
        )
        return min_tokens, max_tokens

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """(place, tokens): the candidates of all prompts, in no order of places, but each prompt's in the order of their draws."""
        jobs = sorted(
            product(range(len(prompts)), range(self.times)), key=lambda job: prompts[job[0]].size
        )
        for _, same in groupby(jobs, key=lambda job: prompts[job[0]].size):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                spoken = self._speak(
                    [prompts[place] for place, _ in batch], [time for _, time in batch]
                )
                yield from zip((place for place, _ in batch), spoken, strict=True)

    @torch.inference_mode()
    def _speak(self, prompts: Sequence[Prompt], times: Sequence[int]) -> list[list[int]]:
        text_BL = (
            torch.from_numpy(np.stack([prompt.text for prompt in prompts])).long().to(self.device)
        )
        speaker_BE = torch.from_numpy(np.stack([prompt.speaker for prompt in prompts])).to(
            self.device
        )
        min_tokens, max_tokens = self.limits(prompts[0])
        limits = {
            "speech_vocabulary": self.family["speech_vocabulary"],
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
        }
        x = self.network.prompt(text_BL, speaker_BE)
        logp_BV, cache = self.network.decode(x, self.network.empty_cache(x))
        choose = [
            self._choose(prompt.utt, time) for prompt, time in zip(prompts, times, strict=True)
        ]
        spoken: list[list[int]] = [[] for _ in prompts]
        for tokens in decode_batch(logp_BV, cache, self._next, choose, **limits):
            for row, token in tokens.items():
                spoken[row].append(token)
        return spoken

    def _next(self, token_B: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        logp_BV, cache = self.network.decode(
            self.network.speech_embedding(token_B.to(self.device)).unsqueeze(1), cache
        )
        return logp_BV, cache

    def _choose(self, utt: str, time: int) -> Choose:
        seed = int(keyed(self.seed, utt, "prefer", time).integers(2**63))
        choose: Choose = partial(self.sample, draw=drawn_from(torch.Generator().manual_seed(seed)))
        return choose
