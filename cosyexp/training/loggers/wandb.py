"""The logger wandb: Weights & Biases."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cosyexp.errors import UserError
from cosyexp.objectives.base import Audio, SpectrogramImage
from cosyexp.registry import register
from cosyexp.training.loggers.base import BufferedLogger, RunInfo
from cosyexp.training.loggers.image import mel_image


@register("logger")
class WandB(BufferedLogger):
    """Logs to Weights & Biases, online or offline; a resumed run continues the same W&B run.

    Args:
        project, entity, group, tags: as in `wandb.init`.
        mode: "online", or "offline" to write to `<run_dir>/wandb/` for `wandb sync`; None: the
            environment variable WANDB_MODE.

    Raises:
        UserError: wandb is not installed.
    """

    name = "wandb"

    def __init__(
        self,
        *,
        project: str = "cosyexp",
        mode: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise UserError(
                "logger=wandb needs a package that is not installed: pip install 'cosyexp[wandb]'"
            ) from None
        self._wandb: Any = wandb
        self._options = {"project": project, "mode": mode, "entity": entity, "group": group}
        self._tags = list(tags)

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        """Starts a W&B run, or resumes the one with an id."""
        run_id = run_id or secrets.token_hex(4)
        info.directory.file("wandb")  # the folder that it writes to
        self._run = self._wandb.init(
            id=run_id,
            name=info.name,
            dir=str(info.directory.path),
            config=dict(info.hparams),
            tags=self._tags,
            resume="allow",
            **self._options,
        )
        self._media: dict[str, Any] = {}
        return run_id

    def log_media(self, step: int, name: str, media: SpectrogramImage | Audio) -> None:
        """Adds a spectrogram or audio to the record of a step."""
        self.at_step(step)
        if isinstance(media, SpectrogramImage):
            self._media[f"mel/{name}"] = self._wandb.Image(mel_image(media.mel))
        else:
            audio = self._wandb.Audio(media.wave, sample_rate=media.sample_rate)
            self._media[f"audio/{name}"] = audio

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the record of a step."""
        self._run.log({**values, **self._media}, step=step)

    def flush(self) -> None:
        """Sends the current record."""
        super().flush()
        self._media = {}

    def close(self) -> None:
        """Sends the current record and finishes the run."""
        super().close()
        self._run.finish()
