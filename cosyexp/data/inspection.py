"""What a data set holds, whoever wrote it."""

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
HEARD = 500  # utterances at most whose audio is looked at
SHOWN = 3


def inspect(path: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines about a data list, a parquet file, or each list of a prepared folder; UserError where it cannot be read."""
    lists = (
        [str(found) for found in sorted(Path(path).glob("*.list")) if found.stat().st_size]
        if Path(path).is_dir()
        else [path]
    )
    for name in lists or [path]:
        yield from inspect_list(name, read_list(name), tokenizer)


def inspect_list(name: str, shards: Sequence[Path], tokenizer: Tokenizer) -> Iterator[str]:
    ids: Counter[int] = Counter()
    lacking, speakers, characters, known = (
        Counter[str](),
        Counter[str](),
        Counter[str](),
        set[int](),
    )
    sizes: list[int] = []
    texts: list[int] = []
    examples: list[dict[str, Any]] = []
    columns: dict[str, str] = {}
    for shard in shards:
        columns |= {field.name: str(field.type) for field in open_shard(shard).schema_arrow}
        for row in read_rows(shard, TEXT):
            ids[hash(row["utt"])] += 1
            speakers[str(row.get("spk"))] += 1
            tokens, text = row.get("speech_token"), row.get("text")
            lacking.update(
                column for column in TEXT[1:] if column in columns and not present(row.get(column))
            )
            known.update(tokens or ())
            sizes.append(len(tokens or ()))
            texts.append(len(text) if isinstance(text, str) else 0)
            characters.update(set(text) if isinstance(text, str) else ())
            if len(examples) < SHOWN:
                examples.append(row)
    count = len(sizes)
    yield f"{name}: {count} utterances in {len(shards)} shards, {len(speakers)} speakers"
    if not count:
        return
    seconds, tokens_heard = listen_to(shards, columns)
    if seconds.size:
        rate = tokens_heard.sum() / seconds.sum()
        hours = seconds.mean() * count / 3600 if not rate else sum(sizes) / rate / 3600
        yield f"  hours      {'' if len(seconds) == count else 'about '}{hours:.2f}, by the audio of {len(seconds)} utterances"
        shortest, median, longest = np.quantile(seconds, (0, 0.5, 1))
        yield f"  lengths    {shortest:.2f} to {longest:.2f} s, median {median:.2f} s; texts {spread(texts)} characters"
        yield f"  tokens     {rate:.2f} a second; {spread(sizes)} an utterance; {len(known)} different, largest {max(known, default=0)}"
    yield f"  columns    {', '.join(f'{column} {kind}' for column, kind in columns.items())}"
    often = ", ".join(f"{speaker} {heard}" for speaker, heard in speakers.most_common(8))
    yield f"  speakers   {often}{' ...' if len(speakers) > 8 else ''}"
    yield f"  characters {''.join(sorted(characters))!r}"
    if strange := tokenizer.unknown("".join(characters)):
        yield f"  unknown    {''.join(strange)!r} (the tokenizer skips them)"
    if lacking:
        yield f"  lacking    {', '.join(f'{column} in {rows} rows' for column, rows in lacking.items())}"
    if again := sum(number - 1 for number in ids.values()):
        yield f"  repeated   {again} rows have an id that occurred before"
    for row in examples:
        yield f"  example    {row['utt']}: {row.get('text')!r}"


def listen_to(shards: Sequence[Path], columns: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and tokens of the utterances whose audio can be opened, at most HEARD of them, spread over the shards."""
    seconds: list[float] = []
    tokens: list[int] = []
    if "audio_data" in columns:
        for shard in shards:
            for i, row in enumerate(read_rows(shard, ("utt", "audio_data", "speech_token"))):
                if i >= max(HEARD // len(shards), 1) or len(seconds) >= HEARD:
                    break
                try:
                    seconds.append(soundfile.info(io.BytesIO(row["audio_data"] or b"")).duration)
                except soundfile.SoundFileError:
                    continue
                tokens.append(len(row.get("speech_token") or ()))
    return np.array(seconds), np.array(tokens)


def present(value: Any) -> bool:
    return value is not None and len(value) > 0


def spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)}"
