"""The logger tensorboard: curves, spectrograms, audio, and a table of hyper-parameters."""

from collections.abc import Mapping

import numpy as np

from cosyexp.objectives.base import Audio, SpectrogramImage
from cosyexp.registry import register
from cosyexp.training.loggers.base import RunInfo
from cosyexp.training.loggers.image import mel_image


@register("logger")
class TensorBoard:
    """Writes event files; on resume, TensorBoard purges what comes after the resumed step.

    Args:
        folder: None for `<run_dir>/tensorboard/`.
    """

    def __init__(self, *, folder: str | None = None) -> None:
        self.folder = folder

    def start(self, info: RunInfo) -> None:
        """Opens the event file and adds the run to the HParams page."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = self.folder or str(info.directory.file("tensorboard"))
        self._writer = SummaryWriter(folder, purge_step=info.resumed_step + 1)
        # of the metric the name alone is kept; its values are the scalars of that name
        for summary in hparams(dict(info.hparams), {"valid/loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary)

    def log_metrics(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Adds scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_media(self, step: int, name: str, media: SpectrogramImage | Audio) -> None:
        """Adds a spectrogram as `mel/<name>`, or audio as `audio/<name>`."""
        if isinstance(media, SpectrogramImage):
            image = mel_image(media.mel)
            self._writer.add_image(f"mel/{name}", image, step, dataformats="HWC")
        else:
            wave = np.nan_to_num(media.wave)[None]
            self._writer.add_audio(f"audio/{name}", wave, step, sample_rate=media.sample_rate)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()
