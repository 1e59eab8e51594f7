"""The export format official: the weights as in the official releases, for their runtime."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cosyexp.config import TrainConfig
from cosyexp.errors import UserError
from cosyexp.exporting.export import refuse_parts
from cosyexp.exporting.report import merge_report
from cosyexp.exporting.source import ExportSource, load_network
from cosyexp.exporting.tokenizer import library_tokenizer
from cosyexp.registry import register
from cosyexp.run.files import create, write_json
from cosyexp.run.folders import staged_files

QWEN_ROWS = 151936  # of the text embedding in the releases of cosyvoice2 and cosyvoice3
TOKENIZER = "tokenizer_config.json"
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
QWEN = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}


@register("format")
class Official:
    """Writes one file, `llm.pt`, `flow.pt` or `hift.pt`, with the state dict of the network.

    An llm with new tokens (`family.tokenizer.extra`) gets a `tokenizer_config.json` too, which
    belongs into the folder CosyVoice-BlankEN of the release.

    Args:
        tokenizer: folder of the tokenizer of Qwen2; None: that of the config of the model.
    """

    name = "official"

    def __init__(self, *, tokenizer: str | None = None) -> None:
        self.tokenizer = tokenizer

    def export(
        self,
        source: ExportSource,
        out: Path,
        *,
        precision: str = "fp32",
        names: Sequence[str] | None = None,
        timed: bool = False,
        device: str = "cpu",
        node: dict[str, Any] | None = None,
    ) -> list[Path]:
        """Writes the file, and returns its path; arguments as of `Format.export`.

        Raises:
            UserError: components or another precision than fp32 are asked for, the runtime of the
                original cannot read the new tokens of the model, or the file does not hold what was
                written.
        """
        refuse_parts(self.name, names, precision)
        added_tokens = self._added_tokens(source.config)
        tensors = load_network(source).state_dict()
        name = source.config.model.official
        path = out / f"{name}.pt"
        with staged_files(out, name) as part:
            # Written to memory first, as torch's writer aborts the process if the disk is full.
            content = io.BytesIO()
            torch.save(dict(tensors), content)
            with create(part / path.name) as file:
                file.write(content.getbuffer())
            written = torch.load(part / path.name, map_location="cpu", weights_only=True)
            if list(written) != list(tensors) or not all(
                torch.equal(written[name], tensors[name]) for name in tensors
            ):
                raise UserError(
                    f"{path} does not hold what was written, and was not kept: check the disk"
                )
            if added_tokens:
                write_json(part / TOKENIZER, {"added_tokens_decoder": added_tokens, **QWEN})
        size = path.stat().st_size
        entry = {"file": path.name, "bytes": size, "tensors": len(tensors)}
        merge_report(out, precision, {"weights": str(source.weights)}, {name: entry})
        print(f"{path}: {size / 1e6:.1f} MB, {len(tensors)} tensors")
        if added_tokens:
            print(f"{out / TOKENIZER}: for the folder CosyVoice-BlankEN of the release")
        return [path]

    def _added_tokens(self, config: TrainConfig) -> dict[str, Any] | None:
        """Returns all special and new tokens of an llm with new ones, by id; None for other models.

        Raises:
            UserError: the runtime of the original cannot read them.
        """
        if "tokenizer" not in config.model.collator or not config.family.tokenizer.get("extra"):
            return None
        tokenizer = library_tokenizer(config, self.tokenizer)
        if tokenizer is None:
            raise UserError(
                "the runtime of the original has the tokenizer of this family in its code, so it "
                "cannot read the tokens of family.tokenizer.extra: choose another format"
            )
        if (rows := config.family.text_vocabulary) != QWEN_ROWS:
            raise UserError(
                f"the runtime of the original builds a Qwen2 of {QWEN_ROWS} text tokens, and this "
                f"model has {rows}: choose another format, or train without family.text_vocabulary="
            )
        return {
            str(i): {name: getattr(token, name) for name in FLAGS}
            for i, token in tokenizer.added_tokens_decoder.items()
        }
