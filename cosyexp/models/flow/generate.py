"""Synthesis with a flow network of any family.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames, P tokens of the prompt, Q frames of the prompt.
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
    """The mel (B, F, T - Q) that follows the prompt, and what was made of each frame, (B, F, T, 2): its noise and its mu.

    noise: standard normal; its T frames are those of the prompt and of what follows. Where a family has a fixed number of
        frames for each token, and there are fewer, the last tokens are only looked at ahead: more will follow.
    streaming: every frame sees the future up to the end of its chunk.
    memory: noise and mu of the first K frames, from an earlier call, in place of new ones: what was said stays.
    """
    batch, frames = noise_BFT.size(0), noise_BFT.size(2)
    prompt_token = token_BN[:, :0] if prompt_token_BP is None else prompt_token_BP
    prompt_mel = noise_BFT[:, :, :0] if prompt_mel_BFQ is None else prompt_mel_BFQ
    tokens = torch.cat([prompt_token, token_BN], dim=1)

    def of_all(size: int) -> Tensor:
        return torch.full((batch,), size, device=tokens.device)

    mu, spks = network.encode(
        tokens,
        of_all(tokens.size(1)),
        speaker_BE,
        frames,
        of_all(frames),
        of_all(1).bool() if streaming else None,
        (of_all(prompt_token.size(1)), of_all(prompt_mel.size(2))),
    )
    made = torch.stack([noise_BFT, mu], dim=-1)
    if memory_BFK2 is not None:
        made = torch.cat([memory_BFK2, made[:, :, memory_BFK2.size(2) :]], dim=2)
    cond = torch.nn.functional.pad(prompt_mel, (0, frames - prompt_mel.size(2)))
    mel = network.decoder.sample(made[..., 0], made[..., 1], spks, cond, steps, guidance, streaming)
    return mel[:, :, prompt_mel.size(2) :], made
