"""Mel synthesis with the flow network of any family.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames, P tokens of the prompt,
Q frames of the prompt, K frames of an earlier call.
"""

import torch
from torch import Tensor

from cosyexp.models.flow.masked_diff import FlowNetwork


@torch.no_grad()
def generate(
    network: FlowNetwork,
    token_BN: Tensor,
    speaker_BE: Tensor,
    noise_BFT: Tensor,
    *,
    prompt_token_BP: Tensor | None = None,
    prompt_mel_BFQ: Tensor | None = None,
    steps: int = 10,
    guidance: float = 0.7,
    streaming: bool = False,
    memory_BFK2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generates the mel spectrogram that follows a prompt.

    Args:
        network: The flow network.
        token_BN: Speech tokens, without padding.
        speaker_BE: Speaker embeddings.
        noise_BFT: Standard normal noise for the T frames of the prompt and of what follows. In v2
            and v3, whose tokens have a fixed number of frames, the noise may have fewer frames than
            the tokens: the last tokens then serve as look-ahead only.
        prompt_token_BP: Speech tokens of the prompt; None without one.
        prompt_mel_BFQ: Mel spectrogram of the prompt; None without one.
        steps: Number of Euler steps.
        guidance: Strength of classifier-free guidance.
        streaming: Whether every frame sees no further than the end of its own chunk.
        memory_BFK2: Noise and mu of the first K frames from an earlier call. They replace the new
            ones, which keeps the mel consistent with that call (the flow cache of v1).

    Returns:
        The mel spectrogram after the prompt (B, F, T - Q), and the noise and mu of all frames,
        (B, F, T, 2).
    """
    batch, frames = noise_BFT.size(0), noise_BFT.size(2)
    prompt_token = token_BN[:, :0] if prompt_token_BP is None else prompt_token_BP
    prompt_mel = noise_BFT[:, :, :0] if prompt_mel_BFQ is None else prompt_mel_BFQ
    tokens = torch.cat([prompt_token, token_BN], dim=1)

    def for_all_rows(size: int) -> Tensor:
        return torch.full((batch,), size, device=tokens.device)

    mu, spks = network.encode(
        tokens,
        for_all_rows(tokens.size(1)),
        speaker_BE,
        frames,
        for_all_rows(frames),
        for_all_rows(1).bool() if streaming else None,
        (for_all_rows(prompt_token.size(1)), for_all_rows(prompt_mel.size(2))),
    )
    noise_and_mu = torch.stack([noise_BFT, mu], dim=-1)
    if memory_BFK2 is not None:
        new = noise_and_mu[:, :, memory_BFK2.size(2) :]
        noise_and_mu = torch.cat([memory_BFK2, new], dim=2)
    noise, mu = noise_and_mu.unbind(-1)
    cond = torch.nn.functional.pad(prompt_mel, (0, frames - prompt_mel.size(2)))
    mel = network.decoder.sample(noise, mu, spks, cond, steps, guidance, streaming)
    return mel[:, :, prompt_mel.size(2) :], noise_and_mu
