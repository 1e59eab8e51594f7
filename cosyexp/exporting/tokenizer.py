"""The text tokenizer of a model, for exports that hand it to other runtimes."""

import copy
from typing import Any

from cosyexp.config import TrainConfig
from cosyexp.errors import UserError
from cosyexp.registry import build


def library_tokenizer(config: TrainConfig, folder: str | None = None) -> Any:
    """Returns a copy of the tokenizer of transformers that a model reads text with.

    Args:
        config: of the model.
        folder: of the pretrained tokenizer; None: that of the config.

    Returns:
        The tokenizer; None if the model does not read the tokens of transformers.

    Raises:
        UserError: the folder has no tokenizer of Qwen2.
    """
    node = dict(config.family.tokenizer)
    if "folder" not in node:
        return None
    try:
        tokenizer = build({**node, "folder": folder or node["folder"]}, "tokenizer")
        return copy.deepcopy(tokenizer.library)
    except UserError as error:
        raise UserError(
            f"this export needs the tokenizer of Qwen2: give its folder as format.tokenizer= "
            f"({error})"
        ) from None
