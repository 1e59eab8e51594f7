"""The speech-token language models of the v2 and v3 families: Qwen2 over text and speech tokens.

B batch, L text tokens, N speech tokens, E speaker embedding, T positions, A labels, D width,
V speech classes, C layers, H key heads, K head width, S cached positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from cosyexp.arguments import Count
from cosyexp.models.llm.sequence import prompt_index, seen_keys, take
from cosyexp.registry import register


class Backbone(nn.Module):
    """Wraps Qwen2 so that its parameters have the names of the official checkpoints.

    Mirrors `Qwen2Encoder` of the original CosyVoice.

    Args:
        config: Sizes of Qwen2.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = Qwen2ForCausalLM(config)


@register("network")
class QwenLM(nn.Module):
    """Qwen2 that predicts speech tokens from text (Du et al. 2024, "CosyVoice 2", section 2.3).

    Mirrors `Qwen2LM` (v2) and `CosyVoice3LM` (v3) of the original CosyVoice.

    Args:
        text_vocabulary: Number of text tokens.
        speech_vocabulary: Number of speech tokens.
        special_tokens: Number of special tokens, whose classes follow the speech tokens.
        sos_task_ids: Indices of the sos and the task token among the special tokens (v3); None if
            both have an embedding of their own, outside the speech classes (v2).
        bias: Whether the output layer has a bias.
        width: D, the number of channels.
        layers: C.
        heads: Number of attention heads.
        key_heads: H, the number of heads of keys and values.
        hidden: Hidden channels of the feed-forward networks.
        positions: Maximum sequence length.
        theta: Base of the rotary position embedding.
        pretrained: A folder with a pretrained Qwen2 that a new run starts from, see
            `load_pretrained`; None to start from random weights.

    Raises:
        ValueError: `width` is not a multiple of 2 * `heads`, or `heads` is not a multiple of
            `key_heads`.
    """

    def __init__(
        self,
        *,
        text_vocabulary: int,
        speech_vocabulary: int,
        special_tokens: Count,
        sos_task_ids: Sequence[Count] | None,
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
                f"width={width} must be a multiple of 2 * heads ({2 * heads}), "
                f"and heads={heads} a multiple of key_heads={key_heads}"
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
        """Predicts speech tokens by teacher forcing.

        Rows are padded on the right, where causal attention does not look, so lengths are not
        needed. The arguments are those of `TransformerLM`, so that both are called alike.

        Args:
            text_BL: Text tokens; padding may be any valid token.
            text_lens_B: Not used.
            speech_BN: Speech tokens; padding may be any valid token.
            speaker_BE: Not used; these models know no speaker.
            gather_index_BT: The index in [text_1..L, speech_1..N, sos, task] of the embedding at
                each position.
            lens_B: Not used.
            label_positions_BA: Positions whose next token is a label.

        Returns:
            Logits at the label positions, (B, A, V).
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
        """The embedding of text tokens."""
        return self.llm.model.model.embed_tokens

    def prompt(self, text_BL: Tensor, speaker_BE: Tensor | None = None) -> Tensor:
        """Embeds the prompt [sos, text_1..L, task].

        Args:
            text_BL: Text tokens, without padding.
            speaker_BE: Not used; these models know no speaker.

        Returns:
            The embedded prompt, (B, L + 2, D).
        """
        start, task = self.sos_task_embedding(text_BL.size(0)).split(1, dim=1)
        return torch.cat([start, self.text_embedding(text_BL), task], dim=1)

    def aligned_prompts(
        self, text_BL: Tensor, text_lens_B: Tensor, speech_BN: Tensor, speech_lens_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeds the prompts [sos, text, task, speech], aligned at their ends.

        Args:
            text_BL: Text tokens; padding may be any valid token.
            text_lens_B: Number of text tokens of each row.
            speech_BN: Speech tokens to continue; padding may be any valid token. N is at least 1.
            speech_lens_B: Number of speech tokens of each row.

        Returns:
            The embedded prompts, (B, L + N + 2, D), and the number of positions before the start of
            each row, (B,).
        """
        parts = [
            self.text_embedding(text_BL),
            self.speech_embedding(speech_BN),
            self.sos_task_embedding(text_BL.size(0)),
        ]
        index_BT, start_B = prompt_index(
            text_lens_B, speech_lens_B, text_BL.size(1), speech_BN.size(1), False
        )
        return take(torch.cat(parts, dim=1), index_BT), start_B

    def empty_cache(self, x: Tensor) -> Tensor:
        """Returns an empty cache, (C, B, H, 0, 2K), with the batch size and dtype of `x`."""
        layers, heads, width = self.cache_shape
        return x.new_zeros(layers, x.size(0), heads, 0, width)

    def decode(
        self, x_BTD: Tensor, cache_CBHSK: Tensor, start_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Appends embeddings to cached sequences and predicts the next token.

        Args:
            x_BTD: The embeddings.
            cache_CBHSK: Keys and values of everything before, (C, B, H, S, 2K).
            start_B: Number of positions before the start of each row; None if all start at 0.

        Returns:
            Log-probabilities after the last position (B, V), and the cache extended by T positions.
        """
        past = DynamicCache()
        for layer, keys_and_values in enumerate(cache_CBHSK):
            past.update(*keys_and_values.chunk(2, dim=-1), layer)
        mask = positions = None
        if start_B is not None:
            before, size = cache_CBHSK.size(3), x_BTD.size(1)
            mask = seen_keys(start_B, size, before + size).unsqueeze(1)
            places = torch.arange(size, device=x_BTD.device) + before
            positions = (places - start_B.unsqueeze(1)).clamp(min=0)
        hidden = self.llm.model.model(
            inputs_embeds=x_BTD,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        ).last_hidden_state
        cache = torch.stack([torch.cat([keys, values], dim=-1) for keys, values, *_ in past])
        return torch.log_softmax(self.llm_decoder(hidden[:, -1]).float(), dim=-1), cache

    def load_pretrained(self, folder: Path) -> None:
        """Loads the weights of a pretrained Qwen2 of the same sizes.

        Args:
            folder: A folder in the format of transformers.

        Raises:
            OSError: The folder holds no readable model.
            ValueError: The model has other sizes.
        """
        loaded: Any = Qwen2ForCausalLM.from_pretrained(
            folder,
            config=self.llm.model.config,  # not that of the folder, which could choose other code
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
            dtype=torch.float32,
        )
        network, info = loaded
        if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise ValueError("the names or shapes of its weights differ from the network's")
        self.llm.model.load_state_dict(network.state_dict())

    def sos_task_embedding(self, batch: int) -> Tensor:
        """Returns the embeddings of the sos and the task token, (B, 2, D)."""
        if self.sos_task_classes is None:
            weight = self.llm_embedding.weight
        else:
            device = self.speech_embedding.weight.device
            weight = self.speech_embedding(torch.tensor(self.sos_task_classes, device=device))
        return weight.unsqueeze(0).expand(batch, -1, -1)
