"""Small corpora in every layout of docs/prepare.md: four utterances, told apart by loudness."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from cosyexp.data.corpora.base import Recording
from cosyexp.data.encoding import check, listen

RATE = 16000
TEXTS = ["Hello, there.", 'Good | morning: 5 "o\'clock"', "what, now?", "你好世界。"]
PLAIN = ["Hello there.", "Good morning.", "What now?", "你好世界。"]
SPEAKERS = ["anna", "ben", "anna", "ben"]


def sound(number: int, form: str = "WAV", seconds: float = 0.4) -> bytes:
    """A tone whose amplitude tells the number of the utterance."""
    time = np.arange(round(seconds * RATE)) / RATE
    file = io.BytesIO()
    soundfile.write(file, (number + 1) / 10 * np.sin(1000 * time), RATE, format=form)
    return file.getvalue()


def heard(recording: Recording) -> int:
    """The number of the utterance in a recording."""
    check(recording)
    return round(10 * float(np.abs(listen(recording, 30.0)[0]).max())) - 1


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def wavs(root: Path, names: str, form: str = "WAV") -> list[str]:
    """Writes the four audio files; {} in their names is the number, {speaker} the speaker."""
    found = [names.format(i, speaker=SPEAKERS[i]) for i in range(4)]
    write(root, {name: sound(i, form) for i, name in enumerate(found)})
    return found


def table(root: Path, name: str, lines: list[str], audio: str = "wavs/u{}.wav") -> None:
    wavs(root, audio)
    write(root, {name: "".join(f"{line}\n" for line in lines)})


def numbered(line: str) -> list[str]:
    return [line.format(i, text=PLAIN[i], speaker=SPEAKERS[i]) for i in range(4)]


# layouts ------------------------------------------------------------------------------------------


def ljspeech(root: Path) -> None:
    table(root, "metadata.csv", numbered("u{0}|raw {0}|{text}"))


def ljspeech_two(root: Path) -> None:
    table(root, "metadata.csv", numbered("u{}|{text}"))


def css10(root: Path) -> None:
    table(root, "transcript.txt", numbered("wavs/u{0}.wav|raw {0}|{text}|2.5{0}"))


def piper(root: Path) -> None:
    table(root, "metadata.csv", numbered("u{}|{speaker}|{text}"), "wav/u{}.wav")


def vits(root: Path) -> None:
    lines = numbered("wavs/u{}.wav|{speaker}|{text}")
    table(root, "filelist_train.txt", lines[:3])
    write(root, {"filelist_val.txt": lines[3] + "\n"})


def gpt_sovits(root: Path) -> None:
    table(root, "all.list", numbered("wavs/u{}.wav|{speaker}|en|{text}"))


def f5(root: Path) -> None:
    table(root, "metadata.csv", ["audio_file|text", *numbered("wavs/u{}.wav|{text}")])


def csv_table(root: Path) -> None:
    lines = ['u{},"{}",{}'.format(i, TEXTS[i].replace('"', '""'), SPEAKERS[i]) for i in range(4)]
    table(root, "data.csv", ["File_Name,Transcript,Speaker_ID", *lines], "clips/u{}.WAV")


def nemo(root: Path) -> None:
    wavs(root, "u{}.wav")
    lines = [
        {"audio_filepath": f"u{i}.wav", "duration": 0.4, "text": t} for i, t in enumerate(TEXTS)
    ]
    write(root, {"manifest.json": "".join(json.dumps(line) + "\n" for line in lines)})


def nemo_offsets(root: Path) -> None:
    write(root, {"all.wav": joined()})
    lines = [
        {"audio_filepath": "all.wav", "offset": 0.4 * i, "duration": 0.4, "text": t, "id": f"u{i}"}
        for i, t in enumerate(TEXTS)
    ]
    write(root, {"manifest.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})


def joined() -> bytes:
    """The four utterances in one file of 1.6 s."""
    file = io.BytesIO()
    waves = [soundfile.read(io.BytesIO(sound(i)))[0] for i in range(4)]
    soundfile.write(file, np.concatenate(waves), RATE, format="FLAC")
    return file.getvalue()


def lhotse_manifests(root: Path) -> None:
    write(root, {"all.flac": joined()})
    recording = {
        "id": "all",
        "sources": [{"type": "file", "channels": [0], "source": "all.flac"}],
        "sampling_rate": RATE,
        "duration": 1.6,
    }
    supervisions = [
        {"id": f"u{i}", "recording_id": "all", "start": 0.4 * i, "duration": 0.4, "text": text,
         "speaker": SPEAKERS[i]}
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip
    lines = "".join(json.dumps(line) + "\n" for line in supervisions)
    write(root, {"x_recordings.jsonl": json.dumps(recording) + "\n"})
    write(root, {"x_supervisions.jsonl.gz": gzip.compress(lines.encode())})


def lhotse_cuts(root: Path) -> None:
    files = wavs(root, "u{}.wav")
    cuts = [
        {"id": f"u{i}", "start": 0, "duration": 0.4, "type": "MonoCut",
         "supervisions": [{"id": f"s{i}", "start": 0, "duration": 0.4, "text": TEXTS[i],
                           "speaker": SPEAKERS[i]}],
         "recording": {"id": "r", "duration": 0.4, "sources": [{"type": "file", "source": file}]}}
        for i, file in enumerate(files)
    ]  # fmt: skip
    lines = "".join(json.dumps(cut) + "\n" for cut in cuts)
    write(root, {"cuts.jsonl.gz": gzip.compress(lines.encode())})


def common_voice(root: Path) -> None:
    wavs(root, "clips/u{}.mp3", "MP3")
    head = "client_id\tpath\tsentence_id\tsentence\tup_votes\n"
    rows = numbered("{speaker}\tu{}.mp3\t1\t{text}\t2\n")
    write(root, {"train.tsv": head + "".join(rows[:3]), "dev.tsv": head + rows[3]})
    write(root, {"other.tsv": head + rows[0], "validated.tsv": head + "".join(rows)})


def libritts(root: Path) -> None:
    for i in range(4):
        subset = "dev-clean" if i == 3 else "train-clean-100"
        stem = f"{subset}/{SPEAKERS[i]}/7/u{i}"
        write(root, {f"{stem}.wav": sound(i), f"{stem}.normalized.txt": PLAIN[i] + "\n"})


def aishell3(root: Path) -> None:
    for split, i in (("train", 0), ("train", 1), ("train", 2), ("test", 3)):
        write(root, {f"{split}/wav/SSB000{i}/SSB000{i}0001.wav": sound(i)})
    lines = [f"SSB000{i}0001.wav\t广 guang3 州 zhou1 女 nv3\n" for i in range(4)]
    write(root, {"train/content.txt": "".join(lines[:3]), "test/content.txt": lines[3]})


def kaldi(root: Path) -> None:
    wavs(root, "audio/u{}.flac", "FLAC")
    commands = [
        "audio/u0.flac",
        "flac -c -d -s {}/audio/u1.flac |",
        "sox {}/audio/u2.flac -t wav - |",
    ]
    commands.append("ffmpeg -i '{}/audio/u3.flac' -f wav -ar 16000 - |")
    lines = "".join(f"u{i} {command.format(root)}\n" for i, command in enumerate(commands))
    write(root, {"wav.scp": lines, **kaldi_texts()})


def kaldi_texts() -> dict[str, str | bytes]:
    return {
        "text": "".join(numbered("u{} {text}\n")),
        "utt2spk": "".join(numbered("u{} {speaker}\n")),
    }


def kaldi_segments(root: Path) -> None:
    write(root, {"all.flac": joined(), "wav.scp": "all all.flac\n", **kaldi_texts()})
    lines = [f"u{i} all {0.4 * i:.1f} {0.4 * (i + 1):.1f}\n" for i in range(4)]
    write(root, {"segments": "".join(lines)})


def kaldi_ark(root: Path) -> None:
    ark, scp = b"", ""
    for i in range(4):
        ark += f"u{i} ".encode()
        scp += f"u{i} wav.ark:{len(ark)}\n"
        ark += sound(i)
    write(root, {"wav.ark": ark, "wav.scp": scp, **kaldi_texts()})


def speaker_folders(root: Path) -> None:
    for i in range(4):
        number = i // 2
        stem = f"{SPEAKERS[i]}/00{number}"  # the names repeat
        text = ".lab" if i % 2 else ".txt"
        write(root, {f"{stem}.flac": sound(i, "FLAC"), f"{stem}{text}": PLAIN[i]})


def hugging_face(root: Path) -> None:
    audio = [{"bytes": sound(i, "FLAC"), "path": f"u{i}.flac"} for i in range(4)]
    columns = {
        "audio": audio,
        "text": ["raw"] * 4,
        "normalized_text": TEXTS,
        "speaker_id": [7, 8, 7, 8],
    }
    everything = pa.table(columns)
    (root / "data").mkdir(parents=True)
    pq.write_table(everything[:3], root / "data/train-00000-of-00001.parquet")
    pq.write_table(everything[3:], root / "data/validation-00000-of-00001.parquet")


def saved_to_disk(root: Path) -> None:
    audio = [{"bytes": sound(i), "path": f"u{i}.wav"} for i in range(4)]
    everything = pa.table({"audio": audio, "sentence": TEXTS, "speaker": SPEAKERS})
    root.mkdir(parents=True)
    with (
        pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, everything.schema) as writer,
    ):
        writer.write_table(everything)
    write(root, {"state.json": "{}", "dataset_info.json": "{}"})


def webdataset(root: Path) -> None:
    root.mkdir(parents=True)
    with tarfile.open(root / "shard-000.tar", "w") as tar:
        for i in range(4):
            described = json.dumps({"text": TEXTS[i], "speaker": SPEAKERS[i]}).encode()
            for extension, content in (("flac", sound(i, "FLAC")), ("json", described)):
                member = tarfile.TarInfo(f"u{i}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def cosyvoice(root: Path) -> None:
    columns = {
        "utt": [f"u{i}" for i in range(4)],
        "audio_data": [sound(i) for i in range(4)],
        "wav": [f"/gone/u{i}.wav" for i in range(4)],
        "text": TEXTS,
        "spk": SPEAKERS,
    }
    (root / "parquet").mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "parquet/parquet_000000000.tar")
    write(root, {"data.list": f"{root}/parquet/parquet_000000000.tar\n"})
