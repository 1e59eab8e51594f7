"""Synthesis by the command: a file of texts, and refusals."""

import pytest
import soundfile

from tests.support import RUNS

LINES = "hello there\n\nwhere is the lamp? it is here.\nno\n"


def test_each_line_of_a_file_becomes_a_file(runs, warm, tmp_path):
    (tmp_path / "lines.txt").write_text(LINES)
    words = ["speed=2", "seed=3", *RUNS]
    output = warm("synthesize", "texts=lines.txt", "out=all.wav", *words, cwd=tmp_path).stdout
    waves = [soundfile.read(tmp_path / f"all/{i}.wav")[0] for i in (1, 2, 3)]
    seconds = sum(map(len, waves)) / 16000
    assert f"all: {seconds:.2f} s of speech in " in output and "real-time factor" in output
    assert len(list((tmp_path / "all").iterdir())) == 3
    warm("synthesize", "text=no", *words, cwd=tmp_path)
    alone, _ = soundfile.read(tmp_path / "out.wav")
    assert len(alone) == len(waves[2]) and abs(alone - waves[2]).max() < 1e-3


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["texts=none.txt"], ["texts=none.txt cannot be read"]),
        (["texts=runs"], ["runs", "not a regular file"]),
        (["text=hello", "prompt=none.wav"], ["prompt=none.wav cannot be used"]),
        (
            ["text=hello", "prompt=a.wav", "speech_tokenizer=onnx"],
            ["speech_tokenizer.path must be given"],
        ),
        (["text=hello", "instruct=be slow"], ["takes no instructions"]),
        (["text=hello", "speed=0"], ["speed=0", "must be >= 0.25"]),
    ],
)
def test_refused_words(words, parts, runs, refused):
    refused("synthesize", [*words, *RUNS], *parts)
