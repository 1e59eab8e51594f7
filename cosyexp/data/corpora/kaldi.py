"""A corpus in Kaldi's layout: a folder with `wav.scp`, `text` and `utt2spk`.

A line of each file is an utterance id, white space, and a value. `segments` (id, recording, start,
end) divides recordings into utterances, and `instruct` adds instructions.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cosyexp.data.corpora.base import Recording, SplitCorpus, text_lines
from cosyexp.data.corpora.recordings import span_of
from cosyexp.registry import register
from cosyexp.run.documents import open_regular

HINT = "give a folder with wav.scp, text and utt2spk as corpus.root="
# Commands of wav.scp that only decode a file: their options that change nothing, and those with a
# value, of which OUTPUT may only come after the file.
DECODERS: dict[str, tuple[set[str], set[str]]] = {
    "cat": ({"-"}, set()),
    "flac": ({"-c", "-d", "-s", "-cd", "-dc", "-cds", "-dcs", "-scd", "-sdc", "--decode"}, set()),
    "sox": ({"-", "-G", "-V0", "-V1"}, {"-t", "-r", "-b", "-e", "-c"}),
    "ffmpeg": (
        {"-", "-nostdin", "-hide_banner", "-y"},
        {"-i", "-f", "-v", "-loglevel", "-ar", "-ac", "-acodec"},
    ),
    "sph2pipe": ({"-p"}, {"-f"}),
}
OUTPUT = ("-r", "-b", "-e", "-c", "-ar", "-ac", "-acodec")


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Kaldi(SplitCorpus):
    """A corpus in Kaldi's layout.

    A relative path in `wav.scp` is looked up in its folder, then in the current folder. It may be a
    WAV file inside an archive, `foo.ark:1234`. Commands (`flac -cd foo.flac |`) are not run: the
    file is read if its decoding is all that the command does, otherwise the utterance has a fault.

    Attributes:
        root: the folder.
    """

    root: str

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser()

    def _pairs(self, name: str) -> Iterator[tuple[str, str]]:
        for _, line in text_lines(self._folder / name, HINT):
            utt, *rest = line.split(maxsplit=1)
            yield utt, rest[0].strip() if rest else ""

    def _optional(self, name: str) -> dict[str, str]:
        return dict(self._pairs(name)) if (self._folder / name).exists() else {}

    @property
    def _list(self) -> str:
        return "segments" if (self._folder / "segments").exists() else "wav.scp"

    def __str__(self) -> str:
        return f"Kaldi's layout: {self._folder / self._list}, text, utt2spk"

    def __len__(self) -> int:
        return sum(1 for _ in self._pairs(self._list))

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings in the order of `segments`, or of `wav.scp`."""
        texts, speakers = dict(self._pairs("text")), dict(self._pairs("utt2spk"))
        instruct = self._optional("instruct")
        files = self._optional("wav.scp") if self._list == "segments" else {}
        for utt, value in self._pairs(self._list):
            start, end, fault = 0.0, None, ""
            if files:
                name, *times = value.split() or [""]
                start, end, fault = span_of(dict(zip(("start", "end"), times, strict=False)))
                if len(times) != 2:
                    fault = "its line of segments has no start and end"
                elif name not in files:
                    fault = f"wav.scp has no {name}"
                value = files.get(name, "")
            recording = Recording(
                utt=utt,
                text=texts.get(utt, ""),
                speaker=speakers.get(utt, ""),
                path=value,
                start=start,
                end=end,
                instruct=instruct.get(utt, ""),
                fault=fault or ("" if utt in texts else f"{self.root}/text has no line for it"),
            )
            yield recording if recording.fault else self._located(recording)

    def _located(self, recording: Recording) -> Recording:
        path, place, fault = recording.path, None, ""
        if path.endswith("|"):
            path, fault = decoded_file(path)
        name, colon, offset = path.rpartition(":")
        archived = bool(colon) and offset.isdecimal() and not os.path.exists(path)
        path = os.path.expanduser(name if archived else path)
        in_folder = self._folder / path
        path = str(in_folder) if os.path.exists(in_folder) else path
        if archived and not fault:
            place, fault = wav_in_archive(path, int(offset))
        return replace(recording, path=path, place=place, fault=fault)


def decoded_file(command: str) -> tuple[str, str]:
    """Returns the file that a command of `wav.scp` decodes, and a fault if it does anything else.

    Args:
        command: as `sox foo.mp3 -t wav - |`. It is never run.
    """
    fault = f"wav.scp has the command {command!r}, which is not run: write its output to a file"
    try:
        program, *words = shlex.split(command.strip().removesuffix("|"))
    except ValueError:  # quotation marks that are not closed, or nothing
        return "", fault
    flags, with_value = DECODERS.get(os.path.basename(program), (set(), set()))
    files: list[str] = []
    iterator = iter(words)
    for word in iterator:
        if word in with_value and (files or word not in OUTPUT):
            value = next(iterator, "")
            files += [value] if word == "-i" else []
        elif word not in flags:
            files.append(word)
    return (files[0], "") if len(files) == 1 and flags else ("", fault)


def wav_in_archive(path: str, offset: int) -> tuple[tuple[int, int] | None, str]:
    """Returns offset and size of a WAV file in an archive (.ark), and a fault if there is none."""
    try:
        with open_regular(Path(path)) as file:
            file.seek(offset)
            header = file.read(12)
            size = 8 + int.from_bytes(header[4:8], "little")
            complete = size <= file.seek(0, os.SEEK_END) - offset
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", error)
        return None, f"the archive {path} cannot be read ({reason})"
    if header[:4] != b"RIFF" or header[8:] != b"WAVE" or not complete:
        return None, f"the archive {path} has no complete WAV file at {offset}"
    return (offset, size), ""
