"""Text to speech tokens to mel to wave, by three models.

L text tokens, N speech tokens, E speaker embedding, F mel bands, T mel frames, S samples, H harmonics.
"""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.models.flow.matching import euler, guided
from cosyexp.models.llm.decoding import decode
from cosyexp.models.llm.sampling import drawn_from
from cosyexp.run.targets import build
from cosyexp.run.tensors import read_tensors
from cosyexp.synthesis.backends import LoadedModel

log = logging.getLogger(__name__)
SHARED = (
    "sample_rate",
    "mel",
    "token_rate",
    "speech_vocabulary",
)  # what the three models of one voice must agree on


class Pipeline:
    """Speaks sentences. Every draw follows from a seed. models: the three models, by their names."""

    def __init__(self, models: Mapping[str, LoadedModel]) -> None:
        for name, voice in models.items():
            if voice.config["model"]["name"] != name:
                raise UserError(
                    f"{voice.name} is a run of {voice.config['model']['name']}: give one of {name} as {name}="
                )
            for key in SHARED:
                if voice.config["family"][key] != models["llm"].config["family"][key]:
                    raise UserError(
                        f"{voice.name} and {models['llm'].name} differ in family.{key}: their models do not fit together"
                    )
        self.family: dict[str, Any] = models["llm"].config["family"]
        self.harmonics: int = models["hifigan"].config["model"]["collator"]["harmonics"]
        self.tokenizer, self.sample = build(self.family["tokenizer"]), build(self.family["sampler"])
        named = next((path for name in ("llm", "flow") if (path := models[name].speakers)), None)
        self.speakers = read_tensors(named) if named else {}
        self.runners = {
            key: runner for voice in models.values() for key, runner in voice.runners.items()
        }

    @property
    def sample_rate(self) -> int:
        return int(self.family["sample_rate"])

    def speak(self, text: str, speaker: str | None = None, seed: int = 0) -> np.ndarray:
        """The wave (S,) of a text, in [-1, 1]. speaker: a name of the training data, or None for the first."""
        draw, speaker_BE = torch.Generator().manual_seed(seed), self._speaker(speaker)
        tokens_BN = self.tokens(text, speaker_BE, draw)
        return self.wave(self.mel(tokens_BN, speaker_BE, draw), draw)

    def tokens(self, text: str, speaker_BE: Tensor, draw: torch.Generator) -> Tensor:
        """Speech tokens (1, N) of a text, one after another."""
        if unknown := self.tokenizer.unknown(text):
            log.warning("characters without a sound are left out: %s", " ".join(map(repr, unknown)))
        text_BL = torch.tensor([self.tokenizer.encode(text)])
        if not text_BL.numel():
            raise UserError(
                f"text={text!r} has nothing to say: give a sentence in the alphabet of the model"
            )
        min_tokens, max_tokens = (
            int(ratio * text_BL.size(1)) for ratio in self.family["speech_per_text"]
        )
        instruct = self.tokenizer.encode(self.family["instruct"] or "")
        prompt_BL = torch.cat([torch.tensor([instruct], dtype=torch.long), text_BL], dim=1)
        logp_BV, cache = self.runners["llm.prefill"](text=prompt_BL, speaker=speaker_BE)
        choose = partial(self.sample, draw=drawn_from(draw))
        limits = {
            "speech_vocabulary": self.family["speech_vocabulary"],
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
        }
        return torch.tensor(
            [list(decode(logp_BV, cache, self._next, choose, **limits))], dtype=torch.long
        )

    def _next(self, token: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        logp_BV, cache = self.runners["llm.decode"](token=token, cache=cache)
        return logp_BV, cache

    def mel(self, tokens_BN: Tensor, speaker_BE: Tensor, draw: torch.Generator) -> Tensor:
        """The mel (1, F, T) of speech tokens, by Euler steps with guidance; each is one call on the pair (with, without)."""
        spec = self.family["mel"]
        frames = tokens_BN.size(1) * self.sample_rate // (self.family["token_rate"] * spec["hop"])
        noise = torch.randn(1, spec["bins"], frames, generator=draw)
        conditions = self.runners["flow.conditions"](
            token=tokens_BN, speaker=speaker_BE, noise=noise
        )
        mu, spks = (torch.cat([x, torch.zeros_like(x)]) for x in conditions)
        mask, prompt = torch.ones(2, 1, frames), torch.zeros(2, spec["bins"], frames)

        def velocity(y: Tensor, t: Tensor) -> Tensor:
            x, times = y.repeat(2, 1, 1), t.repeat(2)
            (both,) = self.runners["flow.decoder.estimator"](
                x=x, mask=mask, mu=mu, t=times, spks=spks, cond=prompt
            )
            return guided(both[:1], both[1:], self.family["guidance"])

        return euler(velocity, noise)

    def wave(self, mel_BFT: Tensor, draw: torch.Generator) -> np.ndarray:
        """The wave (S,) of a mel."""
        phase = (torch.rand(1, self.harmonics, generator=draw) * 2 - 1) * math.pi
        phase[:, 0] = 0
        noise = torch.randn(
            1, self.harmonics, mel_BFT.size(2) * self.family["mel"]["hop"], generator=draw
        )
        (wave,) = self.runners["hift"](mel=mel_BFT, phase=phase, noise=noise)
        return wave[0].numpy()

    def _speaker(self, name: str | None) -> Tensor:
        if not self.speakers:
            raise UserError(
                "neither the llm's run nor the flow's keeps speakers: resume one with data.speakers=<speakers.safetensors of its data>, "
                "or lay that file beside what was exported"
            )
        if name is not None and name not in self.speakers:
            raise UserError(
                f"there is no speaker {name}: the model knows {', '.join(self.speakers)}"
            )
        return self.speakers[name or next(iter(self.speakers))].unsqueeze(0)
