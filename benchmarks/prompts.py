"""Writes Asterisk's telephone prompts in five languages as a corpus, and prepares it.

    apt-get download asterisk-core-sounds-{en,es,fr,it,ru}{,-g722}
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    pip install G722
    python benchmarks/prompts.py unpacked data/prompts [override ...]

A prompt that is missing in the list of texts has none, so it is left out.
"""

import csv
import gzip
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

LANGUAGES = ("en", "es", "fr", "it", "ru")


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the names of prompts and their texts; lines in parentheses describe sounds."""
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        for line in file:
            name, separator, text = line.partition(":")
            if separator and not line.startswith(";"):
                yield name.strip(), text.strip()


def write_corpus(unpacked: Path, out: Path) -> int:
    """Decodes all prompts to WAV files, writes `all.tsv`, and returns their number."""
    from G722 import G722

    rows = []
    for language in LANGUAGES:
        named = dict(
            texts(
                unpacked
                / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
            )
        )
        folders = (unpacked / "usr/share/asterisk/sounds").glob(f"{language}_*")
        for folder in sorted(folders):
            for path in sorted(folder.rglob("*.g722")):
                name = path.relative_to(folder).with_suffix("").as_posix()
                wave = np.array(G722(16000, 64000).decode(path.read_bytes()), np.int16)
                wav = out / "wavs" / folder.name / f"{name}.wav"
                wav.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(wav, wave, 16000)
                utt = f"{language}_{name.replace('/', '_')}"
                rows.append(
                    (utt, wav.relative_to(out).as_posix(), named.get(name, ""), folder.name)
                )
    with open(out / "all.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(("utt", "wav", "text", "speaker"))
        writer.writerows(rows)
    return len(rows)


def main() -> None:
    """Writes the corpus, prepares it, and prints the utterances per second."""
    from cosyexp.prepare import main as prepare

    unpacked, out = map(Path, sys.argv[1:3])
    count = write_corpus(unpacked, out)
    sys.argv[1:] = [
        "corpus=table",
        f"corpus.path={out}/all.tsv",
        f"out={out}/prepared",
        "max_bad=0.3",
        *sys.argv[3:],
    ]
    start = time.perf_counter()
    prepare()
    seconds = time.perf_counter() - start
    print(f"{count} prompts in {seconds:.0f} s: {count / seconds:.0f} utterances per second")


if __name__ == "__main__":
    main()
