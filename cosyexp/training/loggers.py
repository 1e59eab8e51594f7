"""Where a run writes what it measures. A logger has `scalars`, `media` and `close`; the trainer knows no more of it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from cosyexp.objectives.base import Audio, SpectrogramImage


class Logger(Protocol):
    def scalars(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...

    def media(self, step: int, name: str, thing: SpectrogramImage | Audio) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line, `step`, `epoch` and flat keys such as `train/loss`.

    resumed: lines behind this step are dropped, as the steps will be done again.
    """

    def __init__(self, path: Path, resumed: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resumed:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # cut short by a kill
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        os.replace(part, path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def scalars(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")

    def media(self, step: int, name: str, thing: SpectrogramImage | Audio) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars, mel pictures and audio for TensorBoard; `settings` and the newest validation loss are a row of its page HParams."""

    def __init__(
        self, folder: Path, resumed: int, settings: Mapping[str, str | float | bool]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder), purge_step=resumed + 1)
        for summary in hparams(
            dict(settings), {"valid/loss": 0.0}
        ):  # of the metric its name alone is kept
            self._writer._get_file_writer().add_summary(summary)

    def scalars(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def media(self, step: int, name: str, thing: SpectrogramImage | Audio) -> None:
        if isinstance(thing, SpectrogramImage):
            self._writer.add_image(f"mel/{name}", heat_map(thing.mel), step, dataformats="HWC")
        else:
            self._writer.add_audio(
                f"audio/{name}", thing.wave[None], step, sample_rate=thing.sample_rate
            )

    def close(self) -> None:
        self._writer.close()


def heat_map(mel: np.ndarray) -> np.ndarray:
    """A picture (height, width, 3) in 0..255 of a mel (bands, frames): low bands at the bottom, bright is loud."""
    low, high = np.quantile(mel, [0.01, 0.995])
    level = (
        np.clip((mel[::-1] - low) / max(high - low, 1e-6), 0, 1).repeat(3, axis=0).repeat(2, axis=1)
    )
    stops = np.array(
        [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]
    )  # dark to bright
    at = np.linspace(0, 1, len(stops))
    return np.stack(
        [np.interp(level, at, stops[:, channel]) for channel in range(3)], axis=-1
    ).astype(np.uint8)
