"""Rows of the text embedding for the new tokens of a tokenizer, `family.tokenizer.extra`.

V rows of the embedding, D channels.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosyexp.config import TrainConfig
from cosyexp.errors import UserError
from cosyexp.objectives.base import Objective, ReferenceObjective
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory

log = logging.getLogger(__name__)
COPY = "copy:"


def check_extra(config: TrainConfig, objective: Objective) -> None:
    """Checks the new tokens of an llm, before the data are read.

    Raises:
        UserError: one is known already, the text embedding has too few rows, or a reference model
            does not know them.
    """
    if not _extra(config):
        return
    ids = build(config.family.tokenizer, "tokenizer").new_ids()
    if max(ids) >= config.family.text_vocabulary:
        raise UserError(
            f"family.tokenizer.extra needs {max(ids) + 1} rows of the text embedding, which has "
            f"{config.family.text_vocabulary}: add family.text_vocabulary={max(ids) + 1}, or name "
            f"fewer tokens"
        )
    reference = isinstance(objective, ReferenceObjective) and objective.needs_reference
    if reference and not config.adapter and (unknown := _unknown(config)):
        raise UserError(
            f"the reference model does not know the new token {unknown[0]!r}: train it with "
            f"mode=sft first, and give that run as init_from="
        )


def check_base(config: TrainConfig) -> None:
    """Checks that the base of an adapter knows all new tokens, as its embedding is not trained.

    Raises:
        UserError: it does not.
    """
    if unknown := _unknown(config):
        raise UserError(
            f"an adapter does not train the text embedding, which the new token {unknown[0]!r} "
            f"needs: train it with adapter=none first, and give that run as init_from="
        )


def extended_parameters(config: TrainConfig, network: nn.Module) -> list[str]:
    """Returns the names of the text embedding in a state dict, if new tokens may extend it."""
    if not _extra(config):
        return []
    embedding: Any = network.text_embedding
    parameters = network.named_parameters(remove_duplicate=False)  # v2 and v3 have it twice
    return [name for name, parameter in parameters if parameter is embedding.weight]


def initialize_extra(config: TrainConfig, network: nn.Module) -> None:
    """Initializes the rows of those new tokens that the initial weights do not know.

    `init_extra` says what a row starts from: `mean`, the mean of the rows of all earlier tokens;
    `normal`, random numbers with their mean and standard deviation in each channel; `copy:<token>`,
    the row of that token; null: nothing is changed.

    Args:
        config: of the training.
        network: with its initial weights.

    Raises:
        UserError: `init_extra` cannot be read.
    """
    if config.init_extra is None or not (unknown := _unknown(config)):
        return
    tokenizer = build(config.family.tokenizer, "tokenizer")
    ids: list[int] = tokenizer.new_ids()[-len(unknown) :]
    embedding: Any = network.text_embedding
    weight_VD = embedding.weight.data
    weight_VD[ids] = _rows(config.init_extra, weight_VD[: ids[0]], len(ids), tokenizer, config.seed)
    log.info("new tokens, initialized with %s: %s", config.init_extra, ", ".join(unknown))


def _extra(config: TrainConfig) -> list[str]:
    """Returns the new tokens that the model of a config reads."""
    reads_text = "tokenizer" in config.model.collator
    return list(config.family.tokenizer.get("extra") or ()) if reads_text else []


def _unknown(config: TrainConfig) -> list[str]:
    """Returns the new tokens that the initial weights do not know.

    A run says which it knows; of a file, none is known.

    Raises:
        UserError: the run has others.
    """
    extra, known, source = _extra(config), [], Path(config.init_from or "").expanduser()
    if config.init_from and source.is_dir():
        known = list(RunDirectory(source).config().family.tokenizer.get("extra") or ())
    if extra and known != extra[: len(known)]:
        raise UserError(
            f"{source} has the new tokens {', '.join(known)}: name them first in "
            f"family.tokenizer.extra, in this order"
        )
    return extra[len(known) :]


def _rows(start: str, earlier_VD: Tensor, count: int, tokenizer: Any, seed: int) -> Tensor:
    """Returns the initial rows of new tokens, (count, D), or one that all have."""
    if start == "mean":
        return earlier_VD.mean(0)
    if start == "normal":
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, earlier_VD.size(1), generator=draw)
        return earlier_VD.mean(0) + noise * earlier_VD.std(0)
    ids: Sequence[int] = tokenizer.encode(start.removeprefix(COPY))
    if not start.startswith(COPY) or len(ids) != 1 or ids[0] >= len(earlier_VD):
        raise UserError(
            f"init_extra={start} must be mean, normal, or copy: and the text of one earlier token"
        )
    return earlier_VD[list(ids)]
