"""Synthesizes speech: text to speech tokens to mel spectrogram to waveform, by three models.

L text tokens, N speech tokens, E speaker embedding, F mel bands, T mel frames, S samples,
H harmonics.
"""

import logging
import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.models.flow.matching import euler, guided
from cosyexp.models.llm.decoding import decode
from cosyexp.models.llm.sampling import drawn_from
from cosyexp.registry import build
from cosyexp.run.documents import open_regular
from cosyexp.run.files import COPY_SIZE
from cosyexp.run.tensors import read_tensors
from cosyexp.synthesis.backends import LoadedModel

log = logging.getLogger(__name__)
# Family settings that must be equal in the three models.
SHARED = ("sample_rate", "mel", "token_rate", "speech_vocabulary")


class Pipeline:
    """Synthesizes texts with the three models of a family (Du et al. 2024, "CosyVoice").

    Args:
        models: llm, flow and hifigan, by name; without one of them, the others work alone.

    Raises:
        UserError: a model is given under the name of another, or their families differ.
    """

    def __init__(self, models: Mapping[str, LoadedModel]) -> None:
        first = next(iter(models.values()))
        for name, model in models.items():
            if (found := model.config.model.name) != name:
                raise UserError(f"{model.name} is a run of {found}: give one of {name} as {name}=")
            for key in SHARED:
                if getattr(model.config.family, key) != getattr(first.config.family, key):
                    raise UserError(
                        f"{model.name} and {first.name} differ in family.{key}: their "
                        f"models do not fit together"
                    )
        self.family = first.config.family
        if vocoder := models.get("hifigan"):
            self.harmonics: int = vocoder.config.model.collator["harmonics"]
        if "llm" in models:
            self.tokenizer = build(self.family.tokenizer, "tokenizer")
        self.sample = build(self.family.sampler, "token_sampler")
        files = (models[name].speakers for name in ("llm", "flow") if name in models)
        file = next((path for path in files if path), None)
        if file:
            open_regular(file, COPY_SIZE).close()
        self.speakers = read_tensors(file) if file else {}
        self.runners = {
            name: runner for model in models.values() for name, runner in model.runners.items()
        }

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveform, in Hz."""
        return self.family.sample_rate

    def synthesize(self, text: str, speaker: str | None = None, seed: int = 0) -> np.ndarray:
        """Synthesizes a text.

        Args:
            text: what to say.
            speaker: name of a speaker in the training data; None: the first.
            seed: of all random draws.

        Returns:
            The waveform, (S,), in [-1, 1].

        Raises:
            UserError: the text has no known character, or the speaker is unknown.
        """
        draw, speaker_BE = torch.Generator().manual_seed(seed), self._speaker(speaker)
        tokens_BN = self.tokens(text, speaker_BE, draw)
        return self.wave(self.mel(tokens_BN, speaker_BE, draw), draw)

    def tokens(self, text: str, speaker_BE: Tensor, draw: torch.Generator) -> Tensor:
        """Generates the speech tokens of a text.

        Args:
            text: what to say.
            speaker_BE: speaker embedding, (1, E).
            draw: random generator.

        Returns:
            The speech tokens, (1, N).

        Raises:
            UserError: the tokenizer knows no character of the text.
        """
        if unknown := self.tokenizer.unknown(text):
            log.warning("unknown characters are left out: %s", " ".join(map(repr, unknown)))
        text_BL = torch.tensor([self.tokenizer.encode(text)])
        if not text_BL.numel():
            raise UserError(
                f"text={text!r} has no character that the model knows: give another text"
            )
        min_tokens, max_tokens = (
            int(ratio * text_BL.size(1)) for ratio in self.family.speech_per_text
        )
        instruct = self.tokenizer.encode(self.family.instruct or "")
        prompt_BL = torch.cat([torch.tensor([instruct], dtype=torch.long), text_BL], dim=1)
        logp_BV, cache = self.runners["llm.prefill"](text=prompt_BL, speaker=speaker_BE)
        tokens = decode(
            logp_BV,
            cache,
            self._next,
            partial(self.sample, draw=drawn_from(draw)),
            speech_vocabulary=self.family.speech_vocabulary,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
        )
        return torch.tensor([list(tokens)], dtype=torch.long)

    def _next(self, token: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        logp_BV, cache = self.runners["llm.decode"](token=token, cache=cache)
        return logp_BV, cache

    def mel(self, tokens_BN: Tensor, speaker_BE: Tensor, draw: torch.Generator) -> Tensor:
        """Generates the mel spectrogram of speech tokens.

        Each Euler step calls the estimator once, on a batch of two rows, with and without
        conditions, for classifier-free guidance (Ho & Salimans 2022).

        Args:
            tokens_BN: speech tokens, (1, N).
            speaker_BE: speaker embedding, (1, E).
            draw: random generator.

        Returns:
            The mel spectrogram, (1, F, T).
        """
        spec = self.family.mel
        frames = tokens_BN.size(1) * self.sample_rate // (self.family.token_rate * spec.hop)
        noise = torch.randn(1, spec.bins, frames, generator=draw)
        conditions = self.runners["flow.conditions"](
            token=tokens_BN, speaker=speaker_BE, noise=noise
        )
        mu, spks = (torch.cat([x, torch.zeros_like(x)]) for x in conditions)
        noise = noise.to(mu.device)
        mask, prompt = mu.new_ones(2, 1, frames), mu.new_zeros(2, spec.bins, frames)

        def velocity(y: Tensor, t: Tensor) -> Tensor:
            x, times = y.repeat(2, 1, 1), t.repeat(2)
            (both,) = self.runners["flow.decoder.estimator"](
                x=x, mask=mask, mu=mu, t=times, spks=spks, cond=prompt
            )
            return guided(both[:1], both[1:], self.family.guidance)

        return euler(velocity, noise)

    def wave(self, mel_BFT: Tensor, draw: torch.Generator) -> np.ndarray:
        """Generates the waveform of a mel spectrogram.

        Args:
            mel_BFT: mel spectrogram, (1, F, T).
            draw: random generator.

        Returns:
            The waveform, (S,), in [-1, 1].
        """
        phase = (torch.rand(1, self.harmonics, generator=draw) * 2 - 1) * math.pi
        phase[:, 0] = 0
        noise = torch.randn(
            1, self.harmonics, mel_BFT.size(2) * self.family.mel.hop, generator=draw
        )
        (wave,) = self.runners["hift"](mel=mel_BFT, phase=phase, noise=noise)
        return wave[0].cpu().numpy()

    def _speaker(self, name: str | None) -> Tensor:
        if not self.speakers:
            raise UserError(
                "neither the run of the llm nor that of the flow has speakers: resume one with "
                "data.speakers=<speakers.safetensors of its data>, or copy that file into the "
                "folder of the export"
            )
        if name is not None and name not in self.speakers:
            raise UserError(
                f"there is no speaker {name}: the model knows {', '.join(self.speakers)}"
            )
        return self.speakers[name or next(iter(self.speakers))].unsqueeze(0)
