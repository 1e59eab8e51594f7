"""How a language model speaks: token after token, with a cache.

B batch, L text tokens, N speech tokens, D width, V classes, C layers, H key heads, S cached positions, K width of a head; classes
from `speech_vocabulary` on are marks, none of which is a sound.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # transformers takes a second to import
    from cosyexp.models.llm.qwen_lm import QwenLM

Choose = Callable[
    [Tensor, Sequence[int]], int
]  # a class, from log-probabilities (V,) and the classes before
Step = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # tokens (B,) and a cache to log-probabilities (B, V) and a cache


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
    """The speech tokens of one row that follow its prompt, whose log-probabilities and cache are given, until a mark or `max_tokens`.

    forbidden: classes that may not come before there are `min_tokens` tokens; None: all marks.
    """
    limits = {
        "speech_vocabulary": speech_vocabulary,
        "min_tokens": min_tokens,
        "max_tokens": max_tokens,
    }
    for tokens in decode_batch(logp_BV, cache, step, [choose], forbidden=forbidden, **limits):
        yield tokens[0]


def decode_batch(
    logp_BV: Tensor,
    cache_CBHSK: Tensor,
    step: Step,
    choose: Sequence[Choose],
    *,
    speech_vocabulary: int,
    min_tokens: int,
    max_tokens: int,
    forbidden: Sequence[int] | slice | None = None,
) -> Iterator[Mapping[int, int]]:
    """As `decode`, for rows with prompts of one length: at each step the next token of every row that has not ended.

    A row that has ended leaves the batch. choose: of each row.
    """
    said: dict[int, list[int]] = {row: [] for row in range(len(choose))}  # by the rows that go on
    for length in range(max_tokens):
        logp_BV = logp_BV.cpu().clone()
        if length < min_tokens:
            logp_BV[
                :, slice(speech_vocabulary, None) if forbidden is None else forbidden
            ] = -torch.inf
        chosen = [
            (row, choose[row](logp_V, said[row])) for row, logp_V in zip(said, logp_BV, strict=True)
        ]
        going = [place for place, (_, token) in enumerate(chosen) if token < speech_vocabulary]
        if not going:
            return
        tokens = dict(chosen[place] for place in going)
        if len(going) < len(chosen):
            cache_CBHSK = cache_CBHSK.index_select(
                1, torch.tensor(going, device=cache_CBHSK.device)
            )
        said = {row: said[row] for row in tokens}
        for row, token in tokens.items():
            said[row].append(token)
        yield tokens
        logp_BV, cache_CBHSK = step(torch.tensor(list(tokens.values())), cache_CBHSK)


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
    block: tuple[int, int] = (5, 15),
    stutter: bool = False,
) -> Iterator[int]:
    """Speaks while the text is still coming (Du et al. 2024, "CosyVoice 2", section 2.3), at most one block for each piece of it.

    texts: pieces of the text, (1, L) each. fill_token: the class that asks for the next block of text.
    prompt_text, prompt_speech: what was said before, (1, 0) where nothing was.
    stutter: the network hears the last token before the rest of the text twice, as in the original.
    """
    wide, long = block
    embed = network.text_embedding
    start, task = network.sos_task_embedding(1).split(1, dim=1)
    text, prompt = embed(prompt_text_1L), network.speech_embedding(prompt_speech_1N)
    waiting, cache = [start], network.empty_cache(start)  # what the network has not seen yet
    spoken: list[int] = []  # with the marks that were chosen
    ends_at = long - prompt.size(1) % long  # a block of speech is over when so many were chosen
    hungry = not prompt.size(1)  # for text

    def listen(cache: Tensor) -> tuple[Tensor, Tensor]:
        logp_BV, cache = network.decode(torch.cat(waiting, dim=1), cache)
        waiting.clear()
        return logp_BV[0], cache

    for piece in texts:
        text = torch.cat([text, embed(piece)], dim=1)
        while prompt.size(1) and text.size(1) >= wide:
            waiting += [text[:, :wide], prompt[:, :long]]
            text, prompt = text[:, wide:], prompt[:, long:]
        if prompt.size(1) or (hungry and text.size(1) < wide):
            continue
        if hungry:
            waiting.append(text[:, :wide])
            text, hungry = text[:, wide:], False
        while not hungry and len(spoken) < max_tokens:
            logp_V, cache = listen(cache)
            if len(spoken) == ends_at:
                token = fill_token
            else:
                others = [
                    mark for mark in range(speech_vocabulary, len(logp_V)) if mark != fill_token
                ]
                token = choose(logp_V.index_fill(0, torch.tensor(others), -torch.inf), spoken)
            spoken.append(token)
            if hungry := token == fill_token:
                ends_at = len(spoken) + long
            else:
                yield token
                waiting.append(network.speech_embedding(torch.tensor([[token]])))
    if stutter and hungry and len(spoken) > 1:
        waiting.append(network.speech_embedding(torch.tensor([[spoken[-2]]])))
    waiting += [text, task]
    while len(spoken) < max_tokens:
        logp_V, cache = listen(cache)
        if (
            token := choose(logp_V.index_fill(0, torch.tensor([fill_token]), -torch.inf), spoken)
        ) >= speech_vocabulary:
            return
        spoken.append(token)
        yield token
        waiting.append(network.speech_embedding(torch.tensor([[token]])))
