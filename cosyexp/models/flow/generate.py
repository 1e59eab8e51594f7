"""Mel synthesis with the flow of any family: whole utterances, and streams.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames, P tokens of the prompt,
Q frames of the prompt.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cosyexp.models.flow.components import StreamingVelocity
from cosyexp.models.flow.matching import sample
from cosyexp.models.flow.parts import nothing_past


@torch.no_grad()
def generate(
    encode: Callable[..., tuple[Tensor, ...]],
    estimate: Callable[..., tuple[Tensor, ...]],
    token_BN: Tensor,
    speaker_BE: Tensor,
    noise_BFT: Tensor,
    *,
    prompt_token_BP: Tensor | None = None,
    prompt_mel_BFQ: Tensor | None = None,
    steps: int = 10,
    guidance: float = 0.7,
) -> Tensor:
    """Generates the mel spectrogram that follows a prompt.

    Args:
        encode: Runs the component `Conditions`, with its inputs by name.
        estimate: Runs the component `Velocity`, with its inputs by name.
        token_BN: Speech tokens, without padding.
        speaker_BE: Speaker embeddings.
        noise_BFT: Standard normal noise for the T frames of the prompt and of what follows. In v2
            and v3, whose tokens have a fixed number of frames, the noise may have fewer frames than
            the tokens: the last tokens then serve as look-ahead only.
        prompt_token_BP: Speech tokens of the prompt; None without one.
        prompt_mel_BFQ: Mel spectrogram of the prompt; None without one.
        steps: Number of Euler steps.
        guidance: Strength of classifier-free guidance.

    Returns:
        The mel spectrogram after the prompt, (B, F, T - Q).
    """
    prompt_token = token_BN[:, :0] if prompt_token_BP is None else prompt_token_BP
    prompt_mel = noise_BFT[:, :, :0] if prompt_mel_BFQ is None else prompt_mel_BFQ
    rows, prompt_frames = len(token_BN), prompt_mel.size(2)
    mu, spks = encode(
        token=torch.cat([prompt_token, token_BN], dim=1),
        speaker=speaker_BE,
        noise=noise_BFT,
        prompt_token_lens=torch.full((rows,), prompt_token.size(1)),
        prompt_mel_lens=torch.full((rows,), prompt_frames),
    )
    cond = functional.pad(prompt_mel, (0, noise_BFT.size(2) - prompt_frames)).to(mu)
    mask = torch.ones_like(mu[:, :1]).repeat(2, 1, 1)

    def velocity(x: Tensor, t: Tensor, mu: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
        return estimate(x=x, mask=mask, mu=mu, t=t, spks=spks, cond=cond)[0]

    mel = sample(velocity, noise_BFT.to(mu), (mu, spks, cond), guidance=guidance, steps=steps)
    return mel[:, :, prompt_frames:]


class FlowStream:
    """Generates the mel spectrogram of one utterance piece by piece, with a v2 or v3 flow.

    Every frame sees no further than the end of its own chunk, so the frames of a piece that ends
    with a chunk are those of the whole utterance (Du et al. 2024, "CosyVoice 2", section 2.4). For
    each Euler step, the estimator keeps what later frames need of earlier ones. The tokens are
    encoded anew for each piece, which costs a few percent of the estimator.

    Args:
        network: The flow network.
        speaker_BE: Speaker embedding; B is 1.
        noise: Returns standard normal noise for so many more frames, (1, F, frames).
        prompt_token_BP: Speech tokens of the prompt; P may be 0.
        prompt_mel_BFQ: Mel spectrogram of the prompt.
        guidance: Strength of classifier-free guidance.
        steps: Number of Euler steps.
    """

    def __init__(
        self,
        network: Any,
        speaker_BE: Tensor,
        noise: Callable[[int], Tensor],
        *,
        prompt_token_BP: Tensor,
        prompt_mel_BFQ: Tensor,
        guidance: float,
        steps: int = 10,
    ) -> None:
        self.network, self.velocity = network, StreamingVelocity(network)
        self.device = next(network.parameters()).device
        self.speaker_BE, self.noise, self.guidance = speaker_BE.to(self.device), noise, guidance
        self.token_BN, self.prompt_mel_BFQ = prompt_token_BP, prompt_mel_BFQ
        self.frames = 0  # made so far, with those of the prompt
        self.pasts = deque(nothing_past(network.decoder.estimator, 2) for _ in range(steps))

    @torch.no_grad()
    def __call__(self, token_BN: Tensor, final: bool) -> Tensor:
        """Returns the mel spectrogram of the next frames.

        Args:
            token_BN: The next speech tokens.
            final: Whether they are the last. Otherwise the last tokens are look-ahead only, and get
                their frames in the next call.

        Returns:
            The mel spectrogram, (1, F, T), without the frames of the prompt.
        """
        self.token_BN = torch.cat([self.token_BN, token_BN], dim=1)
        tokens = self.token_BN.size(1) - (0 if final else self.network.look_ahead)
        first, end = self.frames, max(self.frames, tokens * self.network.frames_per_token)
        noise = self.noise(end - first).to(self.device)
        prompt_frames = self.prompt_mel_BFQ.size(2)
        if end == first:
            return noise
        mu, spks = self.network.encode(
            self.token_BN.to(self.device),
            torch.tensor([self.token_BN.size(1)], device=self.device),
            self.speaker_BE,
            end,
            torch.tensor([end], device=self.device),
            torch.tensor([True], device=self.device),
        )
        prompt = self.prompt_mel_BFQ[:, :, first:end].to(mu)
        cond = functional.pad(prompt, (0, end - first - prompt.size(2)))
        mask = torch.ones_like(noise[:, :1]).repeat(2, 1, 1)

        def velocity(x: Tensor, t: Tensor, mu: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
            past = self.pasts[0]
            self.pasts.rotate(-1)
            return self.velocity(x, mask, mu, t, spks, cond, past)

        mel = sample(
            velocity,
            noise,
            (mu[:, :, first:], spks, cond),
            guidance=self.guidance,
            steps=len(self.pasts),
        )
        self.frames = end
        return mel[:, :, max(0, prompt_frames - first) :]
