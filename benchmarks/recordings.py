"""What `prepare` finds in raw recordings, and what its measures cost.

    python benchmarks/recordings.py /data/ljspeech-120 [cuts|faults|cost ...]

The folder has the layout of LJSpeech. `cuts` joins its recordings with a second of silence between
two, has them cut and transcribed, and compares boundaries and texts. `faults` plants noise,
clipping, wrong texts and truncations in half of them, and counts what a filter leaves out. `cost`
compares the time of the measures with that of decoding and encoding.
"""

import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile

from cosyexp.data.corpora.base import Recording
from cosyexp.data.encoding import listen
from cosyexp.data.filtering import Filter
from cosyexp.data.frontends.base import Wanted
from cosyexp.data.frontends.kmeans import KMeans
from cosyexp.data.frontends.mel_speaker import MelStatistics
from cosyexp.data.segmentation import PauseSegmenter
from cosyexp.data.treatment import Treatment
from cosyexp.evaluation.metrics import word_error_rate
from cosyexp.evaluation.transcriber import WhisperTranscriber

GAP = 1.0  # seconds of silence between joined recordings
NEAR = 0.2  # seconds by which a boundary may be off
FILTER = "snr > 20 and clipping < 0.001 and wer < 0.25"
FAULTS = ("noise", "clipping", "wrong text", "truncation")


def recordings(root: Path) -> list[Recording]:
    """Returns the recordings of a corpus in the layout of LJSpeech."""
    lines = (root / "metadata.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in lines]
    return [
        Recording(utt=utt, text=text, speaker="one", path=str(root / "wavs" / f"{utt}.wav"))
        for utt, _, text in rows
    ]


def cuts(corpus: list[Recording], folder: Path) -> None:
    """Prints F1 of the boundaries, and the word error rate of the joined texts."""
    waves, wanted, at = [], [], 0.0
    for recording in corpus:
        wave, rate = soundfile.read(recording.path, dtype="float32")
        waves += [wave, np.zeros(int(GAP * rate), np.float32)]
        wanted += [at, at + len(wave) / rate]
        at += (len(wave) + int(GAP * rate)) / rate
    joined = replace(corpus[0], path=str(folder / "joined.wav"))
    soundfile.write(joined.path, np.concatenate(waves), rate)
    spans = PauseSegmenter()(joined)
    found = [edge for span in spans for edge in span]
    hits = sum(min(abs(edge - other) for other in wanted) <= NEAR for edge in found)
    hit = sum(min(abs(edge - other) for other in found) <= NEAR for edge in wanted)
    f1 = 2 / (len(found) / hits + len(wanted) / hit)
    print(f"{len(spans)} pieces of {len(corpus)}: F1 of the boundaries {f1:.3f}")
    treatment = Treatment(transcribe=WhisperTranscriber(language="en"))
    texts = [
        treatment.describe("", listen(replace(joined, start=start, end=end), 30))["text"]
        for start, end in spans
    ]
    rate_of_errors = word_error_rate(" ".join(r.text for r in corpus), " ".join(texts))
    print(f"word error rate of the texts {rate_of_errors:.3f}")


def plant(kind: str, wave: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Returns a waveform (S,) with a fault."""
    if kind == "noise":
        noise = draw.standard_normal(len(wave)) * np.sqrt(np.mean(wave**2))
        wave = wave + noise * 10 ** (-draw.uniform(5, 15) / 20)
        return np.asarray(wave / max(1.0, np.abs(wave).max()))
    if kind == "clipping":
        return np.clip(wave * draw.uniform(2.5, 6) / np.abs(wave).max(), -1, 1)
    return wave[: int(len(wave) * draw.uniform(0.4, 0.7))] if kind == "truncation" else wave


def faults(corpus: list[Recording], folder: Path) -> None:
    """Prints how many recordings of each kind the filter leaves out."""
    draw, keep = np.random.default_rng(1), Filter(FILTER)
    treatment = Treatment(verify=WhisperTranscriber(language="en"))
    total, left_out = Counter[str](), Counter[str]()
    for i, recording in enumerate(corpus):
        kind = "good" if i % 2 == 0 else FAULTS[i // 2 % len(FAULTS)]
        wave, rate = soundfile.read(recording.path)
        path = folder / f"{i}.wav"
        soundfile.write(path, plant(kind, wave, draw), rate)
        text = corpus[i - len(corpus) // 2].text if kind == "wrong text" else recording.text
        row = treatment.describe(text, listen(replace(recording, path=str(path)), 30))
        total[kind] += 1
        left_out[kind] += not keep(row)
    print(f"left out by {FILTER}:")
    for kind, count in total.items():
        print(f"  {kind:12} {left_out[kind]} of {count}")


def cost(corpus: list[Recording], folder: Path) -> None:
    """Prints the time of the measures as a share of decoding and encoding, in turns."""
    wanted = Wanted(token_rate=50, codes=512, speaker_dim=192)
    sounds = [listen(recording, 30).speech_S for recording in corpus]
    front_ends: list[Any] = [recipe.fit(sounds, wanted) for recipe in (KMeans(), MelStatistics())]
    encoding = measuring = 0.0
    for recording in corpus:
        started = time.process_time()
        sound = listen(recording, 30)
        for front_end in front_ends:
            front_end.encode(sound.speech_S)
        between = time.process_time()
        Treatment().describe(recording.text, sound)
        encoding += between - started
        measuring += time.process_time() - between
    print(f"measures : decoding and encoding = {measuring / encoding:.2f}")


def main() -> None:
    """Runs the named benchmarks, or all."""
    known = {"cuts": cuts, "faults": faults, "cost": cost}
    corpus = recordings(Path(sys.argv[1]))
    for name in sys.argv[2:] or known:
        with TemporaryDirectory() as folder:
            known[name](corpus, Path(folder))


if __name__ == "__main__":
    main()
