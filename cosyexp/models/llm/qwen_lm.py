"""The speech-token language models of the v2 and v3 families: Qwen2 over text and speech tokens.

B batch, L text tokens, N speech tokens, T positions, A answers, D width, V speech classes, C layers, H key heads, K width of a head,
S cached positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from cosyexp.models.llm.sequence import take


class Backbone(nn.Module):
    """Holds Qwen2 under the name that it has in the official checkpoints."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = Qwen2ForCausalLM(config)


class QwenLM(nn.Module):
    """Text in, log-odds of the next speech token out (Du et al. 2024, "CosyVoice 2", section 2.3).

    text_vocabulary, speech_vocabulary: numbers of token ids. special_tokens: number of classes after the speech vocabulary.
    sos_task_ids: which of those classes start a sequence and begin its speech; None: a separate embedding of two vectors.
    bias: whether the head has one.
    width, layers, heads, key_heads, hidden (feed-forward), positions: sizes of Qwen2. theta: base of its rotary embedding.
    pretrained: a folder with a Qwen2 whose weights a new run takes over; see `load_pretrained`.
    """

    def __init__(
        self,
        *,
        text_vocabulary: int,
        speech_vocabulary: int,
        special_tokens: int,
        sos_task_ids: Sequence[int] | None,
        bias: bool,
        width: int,
        layers: int,
        heads: int,
        key_heads: int,
        hidden: int,
        positions: int = 32768,
        theta: float = 1e6,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        if width % (2 * heads) or heads % key_heads:
            raise ValueError(
                f"a width of {width} does not divide into {heads} heads of even width, or these not into {key_heads} key heads"
            )
        config = Qwen2Config(
            vocab_size=text_vocabulary,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=positions,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            tie_word_embeddings=True,
        )
        classes = speech_vocabulary + special_tokens
        self.sos_task_classes = (
            None if sos_task_ids is None else [speech_vocabulary + i for i in sos_task_ids]
        )
        self.pretrained = pretrained
        self.cache_shape = (layers, key_heads, 2 * (width // heads))
        if sos_task_ids is None:
            self.llm_embedding = nn.Embedding(2, width)
        self.llm = Backbone(config)
        self.llm_decoder = nn.Linear(width, classes, bias=bias)
        self.speech_embedding = nn.Embedding(classes, width)

    def forward(
        self,
        text_BL: Tensor,
        text_lens_B: Tensor,
        speech_BN: Tensor,
        speaker_BE: Tensor,
        gather_index_BT: Tensor,
        lens_B: Tensor,
        label_positions_BA: Tensor,
    ) -> Tensor:
        """Teacher forcing; padded ids may be anything inside the vocabulary. Neither lengths nor the speaker change anything.

        order: which of [text_1..L, speech_1..N, start, task] stands at each position. A row is padded on the right, where causal
        attention does not look.
        Returns (B, A, V), the log-odds at the positions `answer`.
        """
        parts = [
            self.text_embedding(text_BL),
            self.speech_embedding(speech_BN),
            self.sos_task_embedding(len(text_BL)),
        ]
        hidden = self.llm.model.model(
            inputs_embeds=take(torch.cat(parts, dim=1), gather_index_BT), use_cache=False
        ).last_hidden_state
        return self.llm_decoder(take(hidden, label_positions_BA))

    @property
    def text_embedding(self) -> nn.Embedding:
        return self.llm.model.model.embed_tokens

    def prompt(self, text_BL: Tensor, speaker_BE: Tensor | None = None) -> Tensor:
        """The embedded prompt [start, text_1..L, task] of texts without padding, (B, L + 2, D)."""
        start, task = self.sos_task_embedding(text_BL.size(0)).split(1, dim=1)
        return torch.cat([start, self.text_embedding(text_BL), task], dim=1)

    def empty_cache(self, x: Tensor) -> Tensor:
        """A cache with nothing in it, (C, B, H, 0, 2K), for a batch like `x`."""
        layers, heads, width = self.cache_shape
        return x.new_zeros(layers, x.size(0), heads, 0, width)

    def decode(self, x_BTD: Tensor, cache_CBHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Continues a cached sequence; returns the log-probabilities (B, V) after its last position, and the cache."""
        past = DynamicCache()
        for layer, keys_and_values in enumerate(cache_CBHSK):
            past.update(*keys_and_values.chunk(2, dim=-1), layer)
        hidden = self.llm.model.model(
            inputs_embeds=x_BTD, past_key_values=past, use_cache=True
        ).last_hidden_state
        cache = torch.stack([torch.cat([keys, values], dim=-1) for keys, values, *_ in past])
        return torch.log_softmax(self.llm_decoder(hidden[:, -1]).float(), dim=-1), cache

    def load_pretrained(self, folder: Path) -> None:
        """Takes the weights of a pretrained Qwen2 of the same sizes. OSError or ValueError where the folder has none that fit."""
        loaded: Any = Qwen2ForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
        found, info = loaded[0].state_dict(), loaded[1]
        wanted = {name: tensor.shape for name, tensor in self.llm.model.state_dict().items()}
        if info["missing_keys"] or {name: tensor.shape for name, tensor in found.items()} != wanted:
            raise ValueError("its weights do not have the sizes of the network")
        self.llm.model.load_state_dict(found)

    def sos_task_embedding(self, batch: int) -> Tensor:
        """What starts a sequence, and what begins its speech, (B, 2, D)."""
        if self.sos_task_classes is None:
            weight = self.llm_embedding.weight
        else:
            weight = self.speech_embedding(
                torch.tensor(self.sos_task_classes, device=self.speech_embedding.weight.device)
            )
        return weight.unsqueeze(0).expand(batch, -1, -1)
