"""The folder that a preparation writes: its files, its settings, and the cache of its fields.

<out>/train/00000.parquet ...  train.list   the shards of a split, and the list of them
      valid/...                valid.list
      speech_tokenizer.safetensors          fitted front ends, kept to encode new speech
      speaker_encoder.safetensors
      speakers.safetensors                  mean embedding of each speaker
      dropped.tsv                           recordings that were left out, and why
      lengths.png                           histogram of the lengths of the utterances
      meta.yaml                             settings and statistics; written last
      preparing.yaml  parts/                only while the preparation is not finished
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cosyexp.config import FamilyConfig
from cosyexp.data.cache import ensure
from cosyexp.data.fields import F0, Field, Mel, Wave
from cosyexp.data.shards import read_list
from cosyexp.errors import UserError

META, BEGUN, PARTS = "meta.yaml", "preparing.yaml", "parts"
SPLITS = ("train", "valid")


def prepared(out: Path) -> dict[str, Any] | None:
    """Returns the content of `meta.yaml`; None if the folder is not completely prepared.

    Raises:
        UserError: if the file was not written by a preparation, or is damaged.
    """
    try:
        meta = yaml.safe_load((out / META).read_text())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        meta = None
    if not isinstance(meta, dict) or "settings" not in meta:
        raise UserError(
            f"{out}/{META} is not what prepare wrote: remove {out}, and prepare it again"
        )
    return meta


def tidy(out: Path) -> None:
    """Removes the files that only an unfinished preparation needs."""
    (out / BEGUN).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)


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
    rate = meta["settings"]["token_rate"]
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
