"""Autoregressive decoding of speech tokens with a key-value cache.

Classes below `speech_vocabulary` are speech tokens, the others are special tokens without a sound.

B batch, L text tokens, N speech tokens, D width, V speech classes, C layers, H key heads,
S cached positions, K head width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing transformers takes a second
    from cosyexp.models.llm.qwen_lm import QwenLM

# Chooses a class, given log-probabilities (V,) and the classes chosen before.
Choose = Callable[[Tensor, Sequence[int]], int]
# Maps tokens (B,), a cache and, if given, the starts of the rows (B,) to log-probabilities (B, V)
# of the next token and the new cache.
Step = Callable[..., tuple[Tensor, Tensor]]


def decode(
    logp_BV: Tensor,
    cache: Tensor,
    step: Step,
    choose: Choose,
    *,
    speech_vocabulary: int,
    min_tokens: int,
    max_tokens: int,
    forbidden: Sequence[int] | slice | None = None,
) -> Iterator[int]:
    """Decodes the speech tokens of one row until a special token or `max_tokens`.

    Args:
        logp_BV: Log-probabilities after the prompt; B is 1.
        cache: The cache of the prompt.
        step: Runs the network on a token.
        choose: Chooses the next class.
        speech_vocabulary: Number of speech tokens.
        min_tokens: How many speech tokens to decode before the `forbidden` classes are allowed.
        max_tokens: Maximum number of speech tokens.
        forbidden: Classes not allowed during the first `min_tokens` steps; None for all special
            tokens.

    Yields:
        Speech tokens, one after another.
    """
    for tokens in decode_batch(
        logp_BV,
        cache,
        step,
        [choose],
        speech_vocabulary=speech_vocabulary,
        limits=[(min_tokens, max_tokens)],
        forbidden=forbidden,
    ):
        yield tokens[0]


def decode_batch(
    logp_BV: Tensor,
    cache_CBHSK: Tensor,
    step: Step,
    choose: Sequence[Choose],
    *,
    speech_vocabulary: int,
    limits: Sequence[tuple[int, int]],
    start_B: Tensor | None = None,
    forbidden: Sequence[int] | slice | None = None,
) -> Iterator[Mapping[int, int]]:
    """Decodes the speech tokens of several rows.

    Finished rows leave the batch, so that later steps cost less.

    Args:
        logp_BV: Log-probabilities after the prompts.
        cache_CBHSK: The cache of the prompts, (C, B, H, S, 2K).
        step: Runs the network on one token of each remaining row.
        choose: For each row, chooses the next class.
        speech_vocabulary: See `decode`.
        limits: For each row, `min_tokens` and `max_tokens` of `decode`.
        start_B: Number of positions before the start of each row, if their prompts have different
            lengths and are aligned at their ends.
        forbidden: See `decode`.

    Yields:
        At each step, the next speech token of every row that is not finished, by the row's index.
    """
    # Speech tokens so far, by the index of the row; finished rows are removed.
    histories: dict[int, list[int]] = {row: [] for row in range(len(choose))}
    masked = slice(speech_vocabulary, None) if forbidden is None else forbidden
    while True:
        logp_BV, tokens = logp_BV.cpu().clone(), dict[int, int]()
        for (row, history), logp_V in zip(histories.items(), logp_BV, strict=True):
            fewest, most = limits[row]
            if len(history) < fewest:
                logp_V[masked] = -torch.inf
            if len(history) < most and (token := choose[row](logp_V, history)) < speech_vocabulary:
                tokens[row] = token
        for row, token in tokens.items():
            histories[row].append(token)
        if tokens:
            yield tokens
        unfinished = [i for i, row in enumerate(histories) if row in tokens]
        if not unfinished:
            return
        if len(unfinished) < len(histories):
            index = torch.tensor(unfinished, device=cache_CBHSK.device)
            cache_CBHSK = cache_CBHSK.index_select(1, index)
            start_B = None if start_B is None else start_B[index.to(start_B.device)]
        histories = {row: histories[row] for row in tokens}
        starts = () if start_B is None else (start_B,)
        logp_BV, cache_CBHSK = step(torch.tensor(list(tokens.values())), cache_CBHSK, *starts)


def decode_in_blocks(
    network: "QwenLM",
    texts: Iterable[Tensor],
    choose: Choose,
    *,
    speech_vocabulary: int,
    fill_token: int,
    prompt_text_1L: Tensor,
    prompt_speech_1N: Tensor,
    max_tokens: int,
    lead_1L: Tensor | None = None,
    block: tuple[int, int] = (5, 15),
    stutter: bool = False,
) -> Iterator[int]:
    """Decodes speech tokens while the text is still arriving.

    Text and speech alternate in blocks of fixed sizes, as in the interleaved layout of training
    (Du et al. 2024, "CosyVoice 2", section 2.3). Each piece of text allows at most one more block
    of speech. When the text has ended, its rest and the task token follow, then speech until a
    special token.

    Args:
        network: The language model.
        texts: Pieces of the text, (1, L) each.
        choose: Chooses the next class. The classes chosen before include the fill tokens.
        speech_vocabulary: Number of speech tokens.
        fill_token: The class that ends a block of speech and requests the next block of text.
        prompt_text_1L: Text of the prompt, (1, 0) without one.
        prompt_speech_1N: Speech tokens of the prompt, (1, 0) without one.
        max_tokens: Maximum number of chosen classes, fill tokens included.
        lead_1L: Text of the instruction, before the first block; None without one.
        block: Text tokens and speech tokens of a block.
        stutter: Whether to feed the last speech token twice before the rest of the text, as the
            original does.

    Yields:
        Speech tokens, one after another.
    """
    text_size, speech_size = block
    embed = network.text_embedding
    start, task = network.sos_task_embedding(1).split(1, dim=1)
    device = start.device
    text, prompt = embed(prompt_text_1L), network.speech_embedding(prompt_speech_1N)
    # Embeddings that the network has not processed yet.
    pending, cache = [start], network.empty_cache(start)
    if lead_1L is not None:
        pending.append(embed(lead_1L))
    # All chosen classes, fill tokens included.
    history: list[int] = []
    # A block of speech ends at this length of the history.
    block_end = speech_size - prompt.size(1) % speech_size
    needs_text = not prompt.size(1)

    def next_logp(cache: Tensor) -> tuple[Tensor, Tensor]:
        logp_BV, cache = network.decode(torch.cat(pending, dim=1), cache)
        pending.clear()
        return logp_BV[0].cpu(), cache

    def embedded(token: int) -> Tensor:
        return network.speech_embedding(torch.tensor([[token]], device=device))

    for piece in texts:
        text = torch.cat([text, embed(piece)], dim=1)
        while prompt.size(1) and text.size(1) >= text_size:
            pending += [text[:, :text_size], prompt[:, :speech_size]]
            text, prompt = text[:, text_size:], prompt[:, speech_size:]
        if prompt.size(1) or (needs_text and text.size(1) < text_size):
            continue
        if needs_text:
            pending.append(text[:, :text_size])
            text, needs_text = text[:, text_size:], False
        while not needs_text and len(history) < max_tokens:
            logp_V, cache = next_logp(cache)
            if len(history) == block_end:
                token = fill_token
            else:
                special = range(speech_vocabulary, len(logp_V))
                masked = torch.tensor([token for token in special if token != fill_token])
                token = choose(logp_V.index_fill(0, masked, -torch.inf), history)
            history.append(token)
            needs_text = token == fill_token
            if needs_text:
                block_end = len(history) + speech_size
            else:
                yield token
                pending.append(embedded(token))
    if stutter and needs_text and len(history) > 1:
        pending.append(embedded(history[-2]))
    pending += [text, task]
    while len(history) < max_tokens:
        logp_V, cache = next_logp(cache)
        token = choose(logp_V.index_fill(0, torch.tensor([fill_token]), -torch.inf), history)
        if token >= speech_vocabulary:
            return
        history.append(token)
        yield token
        pending.append(embedded(token))
