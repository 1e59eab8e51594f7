"""The folder that a preparation writes: its files, its settings, and the cache of its fields.

<out>/train/00000.parquet ...  train.list   the shards of a split, and the list of them
      valid/...                valid.list
      speech_tokenizer.safetensors          fitted front ends, kept to encode new speech
      speaker_encoder.safetensors
      speakers.safetensors                  mean embedding of each speaker
      dropped.tsv                           recordings that were left out, and why
      quality.tsv                           measures of each recording
      report.html  report.json              measures of all, and the worst of them to listen to
      meta.yaml                             settings and statistics; written last
      preparing.yaml  parts/                only while the preparation is not finished
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cosyexp.config import FamilyConfig
from cosyexp.data.cache import ensure
from cosyexp.data.fields import F0, Field, Mel, Wave
from cosyexp.data.shards import read_list
from cosyexp.errors import UserError
from cosyexp.run.documents import DamagedFileError, Fields, read_yaml
from cosyexp.run.files import remove_file
from cosyexp.run.folders import remove_tree

# What a preparation writes.
WRITTEN = (
    *("meta.yaml*", "preparing.yaml*", "*.list*", "*.safetensors*", "*.tsv*", "report.*"),
    *("parts", "parts/*", "train", "train/*", "valid", "valid/*"),
)
META, BEGUN, PARTS = "meta.yaml", "preparing.yaml", "parts"
SPLITS = ("train", "valid")


def prepared(out: Path) -> dict[str, Any] | None:
    """Returns the content of `meta.yaml`; None if the folder is not completely prepared.

    Raises:
        UserError: if the file was not written by a preparation, or is damaged.
    """
    try:
        return settings_of(out / META)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        raise UserError(
            f"{out}/{META} is not what prepare wrote ({error.reason}): remove {out}, and prepare "
            f"it again"
        ) from None


def settings_of(path: Path) -> dict[str, Any]:
    """Returns the content of a YAML file that has settings.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it cannot be read, or has none.
    """
    fields = Fields(read_yaml(path), path)
    fields.inner("settings")
    return fields.content


def tidy(out: Path) -> None:
    """Removes the files that only an unfinished preparation needs."""
    remove_file(out / BEGUN)
    remove_tree(out / PARTS)


def check_family(folder: Path, family: FamilyConfig) -> None:
    """Checks that a folder was prepared for a family with this token rate.

    Raises:
        UserError: if it was not, or is not a prepared folder.
    """
    meta = prepared(folder)
    if meta is None:
        raise UserError(
            f"{folder} is not a prepared data set (it has no {META}): python -m cosyexp.prepare "
            f"out={folder}"
        )
    rate = Fields(meta["settings"], folder / META, "settings.").whole("token_rate")
    if rate != family.token_rate:
        raise UserError(
            f"{folder} holds {rate} speech tokens per second, family={family.name} needs "
            f"{family.token_rate}: prepare another folder with family={family.name}"
        )


def audio_fields(family: FamilyConfig, names: Iterable[str]) -> list[Field]:
    """Returns the fields of the audio that the collators of a family read.

    Args:
        family: gives the sample rate and the settings of the mel spectrogram and of F0.
        names: of the fields: mel, f0 or wave.

    Raises:
        UserError: if a name is unknown.
    """
    rate, mel = family.sample_rate, family.mel
    fields: dict[str, Field] = {
        "mel": Mel(sample_rate=rate, **asdict(mel)),
        "f0": F0(rate, mel.hop, family.pitch),
        "wave": Wave(rate),
    }
    if unknown := [name for name in names if name not in fields]:
        raise UserError(f"cache={unknown[0]} is not a field: choose of {', '.join(fields)}")
    return [fields[name] for name in names]


def fill_cache(out: Path, fields: Sequence[Field], processes: int) -> None:
    """Computes fields of a prepared folder now, instead of when a training starts."""
    for split in SPLITS:
        if (out / f"{split}.list").stat().st_size:
            ensure(read_list(str(out / f"{split}.list")), fields, processes)
