"""The summary of a data set that `prepare inspect=` prints, whoever wrote the data."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from cosyexp.data.shards import open_shard, read_list, read_rows
from cosyexp.data.tokenizers import Tokenizer

TEXT = ("utt", "text", "spk", "speech_token", "instruct", "reject_speech_token")
MAX_AUDIOS = 500  # utterances whose audio is opened
EXAMPLES = 3


def inspect(path: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields lines about a data set.

    Args:
        path: a data list, a parquet file, or a prepared folder, of which each list is summarized.
        tokenizer: names the characters that it does not know.

    Raises:
        UserError: if a file cannot be read.
    """
    lists = (
        [str(listed) for listed in sorted(Path(path).glob("*.list")) if listed.stat().st_size]
        if Path(path).is_dir()
        else [path]
    )
    for name in lists or [path]:
        yield from inspect_list(name, read_list(name), tokenizer)


def inspect_list(name: str, shards: Sequence[Path], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields lines about one data list.

    Args:
        name: printed in the first line.
        shards: the parquet files of the list.
        tokenizer: names the characters that it does not know.
    """
    ids, missing = Counter[int](), Counter[str]()
    speakers, characters = Counter[str](), Counter[str]()
    token_ids: set[int] = set()
    token_counts: list[int] = []
    text_lengths: list[int] = []
    examples: list[dict[str, Any]] = []
    columns: dict[str, str] = {}
    for shard in shards:
        columns |= {field.name: str(field.type) for field in open_shard(shard).schema_arrow}
        for row in read_rows(shard, TEXT):
            ids[hash(row["utt"])] += 1
            speakers[str(row.get("spk"))] += 1
            tokens, text = row.get("speech_token"), row.get("text")
            missing.update(
                column for column in TEXT[1:] if column in columns and not present(row.get(column))
            )
            token_ids.update(tokens or ())
            token_counts.append(len(tokens or ()))
            text_lengths.append(len(text) if isinstance(text, str) else 0)
            characters.update(set(text) if isinstance(text, str) else ())
            if len(examples) < EXAMPLES:
                examples.append(row)
    count = len(token_counts)
    yield f"{name}: {count} utterances in {len(shards)} shards, {len(speakers)} speakers"
    if not count:
        return
    seconds, tokens_of_audio = listen_to(shards, columns)
    if seconds.size:
        rate = tokens_of_audio.sum() / seconds.sum()
        hours = seconds.mean() * count / 3600 if not rate else sum(token_counts) / rate / 3600
        about = "" if len(seconds) == count else "about "
        yield f"  hours      {about}{hours:.2f}, from the audio of {len(seconds)} utterances"
        shortest, median, longest = np.quantile(seconds, (0, 0.5, 1))
        yield (
            f"  lengths    {shortest:.2f} to {longest:.2f} s, median {median:.2f} s; "
            f"texts {spread(text_lengths)} characters"
        )
        yield (
            f"  tokens     {rate:.2f} per second; {spread(token_counts)} per utterance; "
            f"{len(token_ids)} different, largest {max(token_ids, default=0)}"
        )
    yield f"  columns    {', '.join(f'{column} {kind}' for column, kind in columns.items())}"
    frequent = ", ".join(f"{speaker} {number}" for speaker, number in speakers.most_common(8))
    yield f"  speakers   {frequent}{' ...' if len(speakers) > 8 else ''}"
    yield f"  characters {''.join(sorted(characters))!r}"
    if unknown := tokenizer.unknown("".join(characters)):
        yield f"  unknown    {''.join(unknown)!r} (the tokenizer skips them)"
    if missing:
        counts = ", ".join(f"{column} in {number} rows" for column, number in missing.items())
        yield f"  missing    {counts}"
    if repeated := sum(number - 1 for number in ids.values()):
        yield f"  repeated   {repeated} rows have the id of an earlier one"
    for row in examples:
        yield f"  example    {row['utt']}: {row.get('text')!r}"


def listen_to(shards: Sequence[Path], columns: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Measures the audio of some utterances, at most `MAX_AUDIOS`, spread over the shards.

    Args:
        shards: the parquet files.
        columns: types of their columns, by name.

    Returns:
        Seconds and speech tokens of the utterances whose audio can be opened, both (utterances,).
    """
    seconds: list[float] = []
    tokens: list[int] = []
    if "audio_data" in columns:
        for shard in shards:
            for i, row in enumerate(read_rows(shard, ("utt", "audio_data", "speech_token"))):
                if i >= max(MAX_AUDIOS // len(shards), 1) or len(seconds) >= MAX_AUDIOS:
                    break
                try:
                    seconds.append(soundfile.info(io.BytesIO(row["audio_data"] or b"")).duration)
                except soundfile.SoundFileError:
                    continue
                tokens.append(len(row.get("speech_token") or ()))
    return np.array(seconds), np.array(tokens)


def present(value: Any) -> bool:
    """Returns whether a value is neither null nor empty."""
    return value is not None and len(value) > 0


def spread(values: Sequence[int]) -> str:
    """Formats the range of some values."""
    return f"{min(values)} to {max(values)}"
