"""Synthesizes speech as a stream: waveforms while the llm still decodes, or the text still arrives.

L text tokens, N speech tokens, F mel bands, T mel frames, S samples.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyexp.errors import UserError
from cosyexp.models.flow.generate import FlowStream
from cosyexp.models.llm.decoding import decode_in_blocks
from cosyexp.synthesis.backends import STREAMED
from cosyexp.synthesis.noise import FrameNoise, drawer
from cosyexp.synthesis.pipeline import Pipeline, Voice, by_harmonic
from cosyexp.synthesis.waves import fade

LONGEST = 600  # seconds of speech to a text whose length is not known


class Stream:
    """Synthesizes with the networks of a pipeline, chunk by chunk.

    The flow makes the frames of a chunk once its speech tokens and a few more are decoded, and the
    vocoder the samples that later frames no longer change (Du et al. 2024, "CosyVoice 2", section
    2.4). Both keep what they need of the past, so that a chunk costs the same anywhere in a
    sentence, but for the keys that it attends to.

    Args:
        pipeline: its models must be in PyTorch.
        voice: who speaks.
        seed: of all random draws.
        instruct: how to say it; None: the default of the family.

    Raises:
        UserError: the models are exported files, or the flow has no chunks.
    """

    def __init__(
        self, pipeline: Pipeline, voice: Voice, seed: int = 0, instruct: str | None = None
    ) -> None:
        self.pipeline, self.voice, self.seed = pipeline, voice, seed
        flow = pipeline.models["flow"]
        if STREAMED not in flow.config.components:
            raise UserError(
                f"the flow of {flow.name} has no chunks, so it cannot stream: leave out "
                f"stream=true, or give models of cosyvoice2 or cosyvoice3"
            )
        self.networks: dict[str, Any] = {
            name: model.network for name, model in pipeline.models.items()
        }
        if None in self.networks.values():
            raise UserError("stream=true needs backend=torch: give llm=, flow= and hifigan=")
        self.lead = pipeline.instruction(instruct)

    def __call__(self, text: str) -> Iterator[np.ndarray]:
        """Yields the waveform of a text, (S,) each, in [-1, 1].

        Raises:
            UserError: the text has no known character.
        """
        pieces = self.pipeline.pieces(text)
        for i, piece in enumerate(pieces):
            draw = drawer(self.seed, i, "llm")
            steps = self.pipeline.decoded([piece], self.voice, [draw], self.lead)
            tokens = (token for step in steps for token in step.values())
            yield from self._speak(tokens, i, start=i > 0, end=i + 1 < len(pieces))

    def while_arriving(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the waveform of a text that arrives in pieces, (S,) each, in [-1, 1].

        Text and speech alternate in blocks, as in the interleaved rows of the training (Du et al.
        2024, "CosyVoice 2", section 2.3).

        Raises:
            UserError: the llm was not trained for it.
        """
        layout = self.pipeline.models["llm"].config.model.collator.get("layout", {})
        if layout.get("fill_token") is None:
            raise UserError("the llm takes whole texts only: give text=<what to say>")
        block, vocabulary = tuple(layout["block"]), self.pipeline.family.speech_vocabulary
        voice, encode, network = self.voice, self.pipeline.tokenizer.encode, self.networks["llm"]
        device = next(network.parameters()).device
        heard = voice.token_BP if voice.text is not None else None

        def tensor(tokens: list[int]) -> Tensor:
            return torch.tensor([tokens], dtype=torch.long, device=device)

        def blocks() -> Iterator[Tensor]:
            arrived = 0
            for text in texts:
                yield from tensor(encode(text)).split(block[0], dim=1)
                arrived += len(encode(text))
            if not arrived:
                raise UserError("no text arrived that the model knows: give text=<what to say>")

        tokens = decode_in_blocks(
            network,
            blocks(),
            self.pipeline.choose(drawer(self.seed, 0, "llm")),
            speech_vocabulary=vocabulary,
            fill_token=vocabulary + layout["fill_token"],
            lead_1L=tensor(self.lead),
            prompt_text_1L=tensor(encode(voice.text or "")),
            prompt_speech_1N=tensor([]) if heard is None else heard.to(device),
            max_tokens=LONGEST * self.pipeline.family.token_rate,
            block=block,
        )
        timed = self.pipeline.timed_each("llm", tokens)
        yield from self._speak(timed, 0, start=False, end=False)

    def _speak(
        self, tokens: Iterator[int], number: int, *, start: bool, end: bool
    ) -> Iterator[np.ndarray]:
        """Yields the waveform of a piece of the text.

        Args:
            tokens: speech tokens.
            number: of the piece.
            start: whether it follows another one.
            end: whether another one follows it.
        """
        rate, flow = self.pipeline.sample_rate, self._flow(number)
        vocode = VocoderStream(self.pipeline, self.networks["hifigan"], self.seed, number)
        network, prompt = self.networks["flow"], flow.token_BN.size(1)
        chunk: int = network.decoder.estimator.chunk // network.frames_per_token
        waiting: list[int] = []
        needed = chunk - prompt % chunk + network.look_ahead
        for token in tokens:
            waiting.append(token)
            if len(waiting) == needed:
                wave_S = vocode(self._mel(flow, waiting, False), False)
                waiting, needed = [], chunk
                if len(wave_S):
                    yield fade(wave_S, rate, start, False)
                    start = False
        if flow.token_BN.size(1) + len(waiting) == prompt:
            raise UserError("the llm gives no speech to the text: give another seed=")
        yield fade(vocode(self._mel(flow, waiting, True), True), rate, start, end)

    def _mel(self, flow: FlowStream, tokens: list[int], final: bool) -> Tensor:
        with self.pipeline.timed("flow"):
            return flow(torch.tensor([tokens], dtype=torch.long), final)

    def _flow(self, number: int) -> FlowStream:
        bins, voice = self.pipeline.family.mel.bins, self.voice
        noise = FrameNoise(drawer(self.seed, number, "flow"), bins)
        token_BP, mel_BFQ = voice.token_BP, voice.mel_BFQ
        return FlowStream(
            self.networks["flow"],
            voice.speaker_BE,
            lambda frames: noise(frames).T.unsqueeze(0),
            prompt_token_BP=torch.zeros(1, 0, dtype=torch.long) if token_BP is None else token_BP,
            prompt_mel_BFQ=torch.zeros(1, bins, 0) if mel_BFQ is None else mel_BFQ,
            guidance=self.pipeline.family.guidance,
        )


class VocoderStream:
    """Generates the waveform of one utterance piece by piece; see `HiFTGenerator.speak`.

    Args:
        pipeline: gives the random numbers, and measures the time.
        network: the vocoder.
        seed: of the random numbers.
        number: of the piece of the text.
    """

    def __init__(self, pipeline: Pipeline, network: Any, seed: int, number: int) -> None:
        self.pipeline, self.network, self.past = pipeline, network, None
        self.device = next(network.parameters()).device
        phase_BH, self.draw = pipeline.source_draws(drawer(seed, number, "hifigan"))
        self.phase_BH, self.noise_THN = phase_BH.to(self.device), self.draw(0)

    def __call__(self, mel_BFT: Tensor, final: bool) -> np.ndarray:
        """Returns the waveform of the next frames, (S,), that the frames to come do not change.

        Args:
            mel_BFT: the next mel frames.
            final: whether they are the last.
        """
        self.noise_THN = torch.cat([self.noise_THN, self.draw(mel_BFT.size(2))])
        with self.pipeline.timed("hifigan"), torch.no_grad():
            wave_BS, self.past = self.network.speak(
                mel_BFT.to(self.device),
                self.phase_BH,
                by_harmonic(self.noise_THN).to(self.device),
                past=self.past,
                final=final,
            )
            wave_S: np.ndarray = wave_BS[0].cpu().numpy()
        self.noise_THN = self.noise_THN[len(wave_S) // self.pipeline.family.mel.hop :]
        return wave_S
