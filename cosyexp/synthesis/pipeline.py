"""Synthesizes speech: text to speech tokens to mel spectrogram to waveform, by three models.

L text tokens, N speech tokens, E speaker embedding, F mel bands, T mel frames, S samples,
H harmonics, P tokens of the prompt, Q frames of the prompt.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cosyexp.errors import UserError
from cosyexp.models.flow.generate import generate
from cosyexp.models.llm.decoding import Choose, decode_batch
from cosyexp.models.llm.sampling import drawn_from
from cosyexp.registry import build
from cosyexp.run.documents import open_regular
from cosyexp.run.files import COPY_SIZE
from cosyexp.run.tensors import read_tensors
from cosyexp.synthesis.backends import LoadedModel
from cosyexp.synthesis.noise import FrameNoise, drawer
from cosyexp.synthesis.sentences import split_text
from cosyexp.synthesis.waves import join

log = logging.getLogger(__name__)
Item = TypeVar("Item")
# Family settings that must be equal in the three models.
SHARED = ("sample_rate", "mel", "token_rate", "speech_vocabulary")


@dataclass(frozen=True)
class Voice:
    """Who speaks: a speaker embedding, and perhaps a recording to continue.

    Attributes:
        speaker_BE: speaker embedding, (1, E).
        token_BP: speech tokens of the recording; None without one.
        mel_BFQ: mel spectrogram of the recording; None without one.
        text: what is said in the recording; None: the llm does not continue it, so only the flow
            hears the voice.
    """

    speaker_BE: Tensor
    token_BP: Tensor | None = None
    mel_BFQ: Tensor | None = None
    text: str | None = None


class Pipeline:
    """Synthesizes texts with the three models of a family (Du et al. 2024, "CosyVoice").

    Attributes:
        seconds: time that each model has taken so far, by name.

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
        self.models, self.family = models, first.config.family
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
        self.seconds: dict[str, float] = defaultdict(float)

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveform, in Hz."""
        return self.family.sample_rate

    def synthesize(
        self,
        text: str,
        speaker: str | None = None,
        seed: int = 0,
        *,
        voice: Voice | None = None,
        instruct: str | None = None,
        speed: float = 1.0,
    ) -> np.ndarray:
        """Synthesizes a text of any length.

        Args:
            text: what to say.
            speaker: name of a speaker in the training data; None: the first.
            seed: of all random draws.
            voice: who speaks, instead of a speaker of the training data.
            instruct: how to say it; None: the default of the family.
            speed: 2.0 takes half the time.

        Returns:
            The waveform, (S,), in [-1, 1].

        Raises:
            UserError: the text has no known character, the speaker is unknown, or the llm takes no
                instructions.
        """
        voice = voice or self.voice(speaker)
        return next(self.synthesize_all([text], voice, seed, instruct=instruct, speed=speed))

    def synthesize_all(
        self,
        texts: Sequence[str],
        voice: Voice,
        seed: int = 0,
        *,
        instruct: str | None = None,
        speed: float = 1.0,
        batch_size: int = 8,
    ) -> Iterator[np.ndarray]:
        """Synthesizes texts; the llm speaks several of their pieces at once.

        The waveforms are those of the texts alone. See `synthesize` for the other arguments.

        Args:
            texts: what to say.
            voice: who speaks.
            batch_size: maximum number of pieces.

        Yields:
            The waveform of each text, in order.
        """
        lead, texts_pieces = self.instruction(instruct), [self.pieces(text) for text in texts]
        jobs = [(piece, i) for pieces in texts_pieces for i, piece in enumerate(pieces)]
        waves: list[np.ndarray] = []
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            draws = [drawer(seed, i, "llm") for _, i in batch]
            tokens = self.tokens([piece for piece, _ in batch], voice, draws, lead)
            for token_BN, (_, i) in zip(tokens, batch, strict=True):
                mel_BFT = self.mel(token_BN, voice.speaker_BE, drawer(seed, i, "flow"), voice)
                if speed != 1.0:
                    frames = max(1, int(mel_BFT.size(2) / speed))
                    mel_BFT = functional.interpolate(mel_BFT, size=frames, mode="linear")
                waves.append(self.wave(mel_BFT, drawer(seed, i, "hifigan")))
                if len(waves) == len(texts_pieces[0]):
                    yield join(waves, self.sample_rate)
                    texts_pieces, waves = texts_pieces[1:], []

    def voice(self, speaker: str | None = None) -> Voice:
        """Returns a speaker of the training data.

        Args:
            speaker: the name; None: the first.

        Raises:
            UserError: there is no such speaker.
        """
        if not self.speakers:
            raise UserError(
                "neither the run of the llm nor that of the flow has speakers: resume one with "
                "data.speakers=<speakers.safetensors of its data>, or copy that file into the "
                "folder of the export, or give a recording as prompt="
            )
        if speaker is not None and speaker not in self.speakers:
            raise UserError(
                f"there is no speaker {speaker}: the model knows {', '.join(self.speakers)}"
            )
        return Voice(self.speakers[speaker or next(iter(self.speakers))].unsqueeze(0))

    def pieces(self, text: str) -> list[str]:
        """Splits a text into what the llm speaks at once.

        Raises:
            UserError: the tokenizer knows no character of the text.
        """
        if unknown := self.tokenizer.unknown(text):
            log.warning("unknown characters are left out: %s", " ".join(map(repr, unknown)))
        if not self.tokenizer.encode(text):
            raise UserError(
                f"text={text!r} has no character that the model knows: give another text"
            )
        pieces = split_text(text, lambda part: len(self.tokenizer.encode(part)))
        return [piece for piece in pieces if self.tokenizer.encode(piece)]

    def instruction(self, instruct: str | None) -> list[int]:
        """Returns the text tokens of an instruction, or of the default of the family.

        Raises:
            UserError: the llm takes no instructions.
        """
        if instruct is not None and self.family.instruct is None:
            raise UserError(
                f"the llm of {self.models['llm'].name} takes no instructions (family.instruct is "
                f"null): leave out instruct="
            )
        tokens: list[int] = self.tokenizer.encode(
            self.family.instruct or "" if instruct is None else instruct
        )
        return tokens

    def tokens(
        self, texts: Sequence[str], voice: Voice, draws: Sequence[torch.Generator], lead: list[int]
    ) -> list[Tensor]:
        """Generates the speech tokens of texts as one batch.

        Args:
            texts: what to say.
            voice: who speaks.
            draws: random generator of each text.
            lead: text tokens of the instruction.

        Returns:
            The speech tokens of each text, (1, N).
        """
        answers: list[list[int]] = [[] for _ in texts]
        for tokens in self.decoded(texts, voice, draws, lead):
            for row, token in tokens.items():
                answers[row].append(token)
        return [torch.tensor([answer], dtype=torch.long) for answer in answers]

    def decoded(
        self, texts: Sequence[str], voice: Voice, draws: Sequence[torch.Generator], lead: list[int]
    ) -> Iterator[Mapping[int, int]]:
        """Yields the next speech token of each text that is not finished; see `tokens`."""
        said = [self.tokenizer.encode(text) for text in texts]
        before = [*lead, *self.tokenizer.encode(voice.text or "")]
        heard = [] if voice.token_BP is None or voice.text is None else voice.token_BP[0].tolist()
        text_BL, text_lens_B = _padded([[*before, *text] for text in said])
        speech_BN, speech_lens_B = _padded([heard] * len(texts))
        with self.timed("llm"):
            logp_BV, cache, start_B = self.runners["llm.prefill"](
                text=text_BL,
                text_lens=text_lens_B,
                speech=speech_BN,
                speech_lens=speech_lens_B,
                speaker=voice.speaker_BE.expand(len(texts), -1),
            )
        least, most = self.family.speech_per_text
        steps = decode_batch(
            logp_BV,
            cache,
            self._next,
            [self.choose(draw) for draw in draws],
            speech_vocabulary=self.family.speech_vocabulary,
            limits=[(int(least * len(text)), int(most * len(text))) for text in said],
            start_B=start_B,
        )
        yield from self.timed_each("llm", steps)

    def choose(self, draw: torch.Generator) -> Choose:
        """Returns a function that draws the next speech token."""
        return partial(self.sample, draw=drawn_from(draw))

    def _next(self, token: Tensor, cache: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        logp_BV, cache = self.runners["llm.decode"](token=token, cache=cache, start=start)
        return logp_BV, cache

    def mel(
        self,
        tokens_BN: Tensor,
        speaker_BE: Tensor,
        draw: torch.Generator,
        voice: Voice | None = None,
    ) -> Tensor:
        """Generates the mel spectrogram of speech tokens.

        Args:
            tokens_BN: speech tokens, (1, N).
            speaker_BE: speaker embedding, (1, E).
            draw: random generator.
            voice: gives the recording that the mel spectrogram continues, if it has one.

        Returns:
            The mel spectrogram, (1, F, T), without that of the recording.
        """
        spec = self.family.mel
        prompt_token_BP, prompt_mel_BFQ = (voice.token_BP, voice.mel_BFQ) if voice else (None, None)
        frames = tokens_BN.size(1) * self.sample_rate // (self.family.token_rate * spec.hop)
        frames += 0 if prompt_mel_BFQ is None else prompt_mel_BFQ.size(2)
        noise_FT = FrameNoise(draw, spec.bins)(frames).T
        with self.timed("flow"):
            return generate(
                self.runners["flow.conditions"],
                self.runners["flow.decoder.estimator"],
                tokens_BN,
                speaker_BE,
                noise_FT.unsqueeze(0),
                prompt_token_BP=prompt_token_BP,
                prompt_mel_BFQ=prompt_mel_BFQ,
                guidance=self.family.guidance,
            )

    def wave(self, mel_BFT: Tensor, draw: torch.Generator) -> np.ndarray:
        """Generates the waveform of a mel spectrogram.

        Args:
            mel_BFT: mel spectrogram, (1, F, T).
            draw: random generator.

        Returns:
            The waveform, (S,), in [-1, 1].
        """
        phase_BH, noise = self.source_draws(draw)
        with self.timed("hifigan"):
            (wave,) = self.runners["hift"](
                mel=mel_BFT, phase=phase_BH, noise=by_harmonic(noise(mel_BFT.size(2)))
            )
            return wave[0].cpu().numpy()

    def source_draws(self, draw: torch.Generator) -> tuple[Tensor, FrameNoise]:
        """Returns the starting phases (1, H) of the excitation, and its noise."""
        phase_BH = (torch.rand(1, self.harmonics, generator=draw) * 2 - 1) * math.pi
        phase_BH[:, 0] = 0
        return phase_BH, FrameNoise(draw, self.harmonics, self.family.mel.hop)

    @contextmanager
    def timed(self, model: str) -> Iterator[None]:
        """Adds the time of the block to that of a model."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the time of a GPU would count for the next model
        self.seconds[model] += time.perf_counter() - start

    def timed_each(self, model: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yields items, and adds the time that each takes to that of a model."""
        while True:
            with self.timed(model):
                item = next(items, None)
            if item is None:
                return
            yield item


def by_harmonic(noise_THN: Tensor) -> Tensor:
    """Returns the noise of frames, (T, H, samples per frame), as (1, H, S)."""
    return noise_THN.transpose(0, 1).flatten(1).unsqueeze(0)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns rows that are padded to at least one token, and their lengths."""
    lens = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), max(1, int(lens.max())), dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.long)
    return padded, lens
