"""corpus=auto: every layout of docs/prepare.md, and what becomes of the defects in its table."""

import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cosyexp.data.corpora.auto import Auto
from cosyexp.data.corpora.base import Recording
from cosyexp.data.corpora.kaldi import decoded_file
from cosyexp.data.encoding import listen
from cosyexp.errors import UserError
from tests.unit import layouts as of
from tests.unit.layouts import PLAIN, SPEAKERS, TEXTS, heard, sound, write

NO_SPEAKER = ["mine"] * 4
IDS = [f"u{i}" for i in range(4)]
# layout, texts, speakers, ids, numbers of the utterances that it holds out
LAYOUTS: dict[Callable[[Path], None], tuple[list[str], list[str], list[str], list[int] | None]] = {
    of.ljspeech: (PLAIN, NO_SPEAKER, IDS, None),
    of.ljspeech_two: (PLAIN, NO_SPEAKER, IDS, None),
    of.css10: (PLAIN, NO_SPEAKER, IDS, None),
    of.piper: (PLAIN, SPEAKERS, IDS, None),
    of.vits: (PLAIN, SPEAKERS, IDS, [3]),
    of.gpt_sovits: (PLAIN, SPEAKERS, IDS, None),
    of.f5: (PLAIN, NO_SPEAKER, IDS, None),
    of.csv_table: (TEXTS, SPEAKERS, IDS, None),
    of.nemo: (TEXTS, NO_SPEAKER, IDS, None),
    of.nemo_offsets: (TEXTS, NO_SPEAKER, IDS, None),
    of.lhotse_manifests: (TEXTS, SPEAKERS, IDS, None),
    of.lhotse_cuts: (TEXTS, SPEAKERS, IDS, None),
    of.common_voice: (PLAIN, SPEAKERS, IDS, [3]),
    of.libritts: (PLAIN, SPEAKERS, IDS, [3]),
    of.aishell3: (
        ["广州女"] * 4,
        [f"SSB000{i}" for i in range(4)],
        [f"SSB000{i}0001" for i in range(4)],
        [3],
    ),
    of.kaldi: (PLAIN, SPEAKERS, IDS, None),
    of.kaldi_segments: (PLAIN, SPEAKERS, IDS, None),
    of.kaldi_ark: (PLAIN, SPEAKERS, IDS, None),
    of.speaker_folders: (PLAIN, SPEAKERS, ["anna_000", "ben_000", "anna_001", "ben_001"], None),
    of.hugging_face: (TEXTS, ["7", "8", "7", "8"], IDS, [3]),
    of.saved_to_disk: (TEXTS, SPEAKERS, IDS, None),
    of.webdataset: (TEXTS, SPEAKERS, IDS, None),
    of.cosyvoice: (TEXTS, SPEAKERS, IDS, None),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layout(layout: Callable[[Path], None], tmp_path: Path) -> None:
    texts, speakers, ids, held_out = LAYOUTS[layout]
    layout(tmp_path / "corpus")
    corpus = Auto(name="mine", root=str(tmp_path / "corpus"))
    recordings = list(corpus.recordings())
    assert [recording.fault for recording in recordings] == [""] * 4
    assert len(corpus) == 4
    by_number = {heard(recording): recording for recording in recordings}
    assert sorted(by_number) == [0, 1, 2, 3]
    for number, recording in by_number.items():
        found = (recording.text, recording.speaker, recording.utt)
        assert found == (texts[number], speakers[number], ids[number])
        assert recording.held_out == (None if held_out is None else number in held_out)
    first, *examples = corpus.found()
    assert first.startswith(f"{tmp_path}/corpus: ") and len(examples) == 3
    assert recordings[0].utt in examples[0] and repr(recordings[0].text) in examples[0]


# defects ------------------------------------------------------------------------------------------


def recordings(root: Path, **settings: object) -> dict[str, Recording]:
    corpus = Auto(name="mine", root=str(root), **settings)  # type: ignore[arg-type]
    return {recording.utt: recording for recording in corpus.recordings()}


def table_of(root: Path, name: str, *lines: str) -> dict[str, Recording]:
    of.table(root, name, list(lines))
    return recordings(root)


def test_a_row_with_other_cells_than_the_rest_is_a_fault(tmp_path):
    found = table_of(tmp_path, "metadata.csv", "u0|a|b", "u1|a|b|c", "u2|a|b", "u3|a")
    assert [found[f"u{i}"].text for i in (0, 2)] == ["b", "b"]
    assert "line 2 of" in found["u1"].fault and "it has 4 cells instead of 3" in found["u1"].fault
    assert "it has 2 cells instead of 3" in found["u3"].fault


def test_a_csv_row_with_a_comma_or_a_stray_quote_is_a_fault_and_swallows_no_other(tmp_path):
    lines = ["wav,text,who", "u0,hello, you,anna", 'u1,"open,anna', "u2,fine,ben", 'u3,5" nail,ben']
    found = table_of(tmp_path, "a.csv", *lines)
    assert "it has 4 cells instead of 3" in found["u0"].fault
    assert "line 3 of" in found["line 3"].fault and "quotation marks" in found["line 3"].fault
    assert [found[utt].text for utt in ("u2", "u3")] == ["fine", '5" nail']


def test_json_values_that_are_no_text_are_faults_and_zero_is_a_name(tmp_path):
    rows = [
        {"wav": "wavs/u0.wav", "text": ["a", "b"], "speaker": 0, "utt": 0},
        {"wav": "wavs/u1.wav", "text": 5, "speaker": 0, "utt": 1},
        {"wav": "wavs/u2.wav", "text": "fine", "speaker": 0, "utt": 2},
        {"wav": None, "text": "fine", "speaker": 0, "utt": 3},
    ]
    found = table_of(tmp_path, "a.jsonl", *map(json.dumps, rows), "{cut")
    assert "its text is a list" in found["0"].fault and "its text is a number" in found["1"].fault
    assert (found["2"].speaker, found["2"].fault) == ("0", "")
    assert "it has no audio file" in found["3"].fault
    assert "it is not a JSON object" in found["line 5"].fault


def test_the_text_of_ljspeech_if_there_is_no_normalized_one(tmp_path):
    found = table_of(tmp_path, "metadata.csv", "u0|Mr. A|Mister A", "u1|b b|", "u2|c c|c c")
    assert [found[f"u{i}"].text for i in range(3)] == ["Mister A", "b b", "c c"]


def test_columns_can_be_named_and_numbered(tmp_path):
    of.table(tmp_path, "a.csv", ["a,b,c,d", "u0,1,said,x", "u1,2,told,y"])
    named = {"audio": "a", "text": "c", "speaker": "d", "utt": "b"}
    assert recordings(tmp_path, columns=named)["1"].text == "said"
    write(tmp_path, {"a.csv": "u0,1,said,x\nu1,2,told,y\n"})
    found = recordings(tmp_path, columns={"audio": 1, "text": 3, "speaker": 4, "utt": 2})["2"]
    assert (found.text, found.speaker) == ("told", "y") and heard(found) == 1
    with pytest.raises(UserError, match="number from 1"):
        recordings(tmp_path, columns={"audio": 1, "text": 9})
    with pytest.raises(UserError, match=r"no column 'z', but .* corpus\.columns\.text="):
        recordings(tmp_path, columns={"audio": "u0", "text": "z"})


def test_names_of_files_with_another_folder_suffix_case_or_unicode_form(tmp_path):
    cafe = unicodedata.normalize("NFD", "café")
    write(tmp_path, {f"wav/{cafe}.WAV": sound(0), "wav/b.WAV": sound(1), "wav/c.flac": sound(2)})
    write(tmp_path, {"metadata.csv": "café|a a\nb.wav|b b\nwavs/gone|c c\nc|d d\n"})
    found = recordings(tmp_path)
    assert [heard(found[utt]) for utt in ("café", "b", "c")] == [0, 1, 2]
    with pytest.raises(ValueError, match="No such file"):
        heard(found["gone"])


def refused(root: Path, message: str, **settings: object) -> None:
    with pytest.raises(UserError, match=message):
        recordings(root, **settings)


def test_what_cannot_be_told_is_a_sentence(tmp_path):
    refused(tmp_path / "gone", r"there is no file or folder .*gone: correct corpus\.root=")
    refused(tmp_path, r"does not have any known layout \(it holds nothing\)")
    refused(tmp_path, "corpus.layout=x is not a layout", layout="x")
    write(tmp_path, {"a.csv": "wav,text\n", "b.csv": "wav,text\n"})
    refused(tmp_path, r"a\.csv, .*b\.csv all list recordings: give one of them as corpus\.root=")
    assert not recordings(tmp_path / "a.csv")
    write(tmp_path, {"x/a.parquet": b"PAR1 no more", "y/a.tar": b"no tar"})
    refused(tmp_path / "x", "not a readable parquet or Arrow file")
    refused(tmp_path / "y", "cannot be read as a tar file .* decompress it")
    with pytest.raises(UserError, match=r"corpus\.held_out_by=x"):
        Auto(name="mine", root=".", held_out_by="x")
    with pytest.raises(UserError, match=r"corpus\.held_out=gone is neither a share"):
        Auto(name="mine", root=".", held_out="gone")


# Kaldi --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("flac -cd 'a b.flac' |", "a b.flac"),
        ("/usr/bin/sox a.wav -t wav -r 16000 -c 1 - |", "a.wav"),
        ("sph2pipe -f wav -p a.sph |", "a.sph"),
        ("cat a.wav |", "a.wav"),
        ("sox a.wav -t wav - speed 1.1 |", ""),
        ("sox -r 8000 a.wav -t wav - |", ""),
        ("sox a.wav b.wav -t wav - |", ""),
        ("cat a.wav; touch owned |", ""),
        ("touch owned |", ""),
        ("flac -cd $(touch owned) |", ""),
        ("cat 'a |", ""),
        ("|", ""),
    ],
)
def test_commands_of_kaldi_are_read_not_run(command, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, fault = decoded_file(command)
    assert found == file and bool(fault) is not bool(file)
    write(tmp_path, {"k/wav.scp": f"u0 {command}\n", "k/text": "u0 a\n", "k/utt2spk": "u0 s\n"})
    for recording in recordings(tmp_path / "k").values():
        with pytest.raises(ValueError, match=r"which is not run|cannot be read"):
            heard(recording)
    assert not (tmp_path / "owned").exists()


def test_segments_outside_of_the_audio_and_archives_that_are_cut(tmp_path):
    of.kaldi_segments(tmp_path / "s")
    lines = ["u0 all 1.4 1.8\n", "u1 all 0.4 0.8\n", "u2 all 0.9 0.4\n", "u3 gone 0 1\n"]
    write(tmp_path, {"s/segments": "".join(lines)})
    found = recordings(tmp_path / "s")
    assert heard(found["u1"]) == 1
    for utt, message in (("u0", "is not in the audio"), ("u2", "ends at 0.4 s but starts at 0.9")):
        with pytest.raises(ValueError, match=message):
            heard(found[utt])
    assert found["u3"].fault == "wav.scp has no gone"
    of.kaldi_ark(tmp_path / "a")
    archive = tmp_path / "a/wav.ark"
    archive.write_bytes(archive.read_bytes()[:-100])
    found = recordings(tmp_path / "a")
    assert heard(found["u2"]) == 2 and "no complete WAV file" in found["u3"].fault


# audio --------------------------------------------------------------------------------------------


def of_bytes(content: bytes) -> Recording:
    return Recording(utt="u", text="t", speaker="s", path="u", audio=content)


def test_audio_that_is_cut_short_or_whose_header_is_wrong(tmp_path):
    wav, ogg = sound(4, seconds=2), sound(4, "OGG", 2)
    for size in (len(wav) // 2, 2 * len(wav)):
        changed = wav[:40] + size.to_bytes(4, "little") + wav[44:]
        with pytest.raises(ValueError, match=r"cut short|goes on after the end"):
            heard(of_bytes(changed))
    for content in (ogg[: len(ogg) // 2], ogg[:-50]):
        with pytest.raises(ValueError, match=r"cut short|cannot be decoded"):
            heard(of_bytes(content))
    assert heard(of_bytes(ogg)) == heard(of_bytes(wav)) == 4


def test_audio_with_the_word_data_in_its_metadata_or_without_a_known_length():
    wav, flac = sound(4), bytearray(sound(4, "FLAC"))
    note = (
        b"LIST"
        + (20).to_bytes(4, "little")
        + b"INFOICMT"
        + (8).to_bytes(4, "little")
        + b"mydata\0\0"
    )
    noted = wav[:12] + note + wav[12:]
    assert heard(of_bytes(noted[:4] + (len(noted) - 8).to_bytes(4, "little") + noted[8:])) == 4
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    assert heard(of_bytes(bytes(flac))) == 4
    with pytest.raises(ValueError, match=r"longer than 0\.2 s"):
        listen(of_bytes(bytes(flac)), 0.2)
    streamed = wav[:40] + b"\xff" * 4 + wav[44:]
    assert heard(of_bytes(streamed)) == 4


class Counted(io.BytesIO):
    """A file that counts the bytes that are read."""

    count = 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = super().readinto(buffer)
        self.count += size
        return size

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.count += len(content)
        return content


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_a_long_file_is_refused_by_its_header_and_cut_without_the_rest(form, monkeypatch):
    half_an_hour = np.tile(np.array([0.1, 0.2, 0.1, 0.0], np.float32), 30 * 60 * of.RATE // 4)
    file = io.BytesIO()
    soundfile.write(file, half_an_hour, of.RATE, format=form)
    opened = Counted(file.getvalue())
    monkeypatch.setattr(Recording, "open", lambda self: opened)  # that of the moment
    long = Recording(utt="u", text="t", speaker="s", path="u")
    with pytest.raises(ValueError, match=r"the audio of 1800\.0 s is longer than 30 s"):
        listen(long, 30.0)
    assert opened.count < 2**20 < len(file.getvalue())
    opened = Counted(file.getvalue())
    wave, audio, *_ = listen(
        Recording(utt="u", text="t", speaker="s", path="u", start=1700.0, end=1710.0), 30.0
    )
    assert len(wave) == 10 * of.RATE and audio and len(audio) < 2**19
    assert opened.count < 2**22
    opened = Counted(file.getvalue())
    with pytest.raises(ValueError, match=r"the part of 100\.0 s is longer than 30 s"):
        listen(Recording(utt="u", text="t", speaker="s", path="u", start=1.0, end=101.0), 30.0)
