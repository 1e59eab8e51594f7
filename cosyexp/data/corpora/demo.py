"""The built-in demo corpus: sentences of a small vocabulary, synthesized by espeak-ng."""

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, cycle, islice

from cosyexp.arguments import Count, Fraction
from cosyexp.data.corpora.base import Recording
from cosyexp.data.draws import keyed
from cosyexp.errors import UserError
from cosyexp.registry import register

WORDS = {
    "who": [
        "my sister",
        "my brother",
        "the teacher",
        "our doctor",
        "the old man",
        "a young woman",
        "she",
        "he",
    ],
    "did": ["found", "bought", "lost", "saw", "painted", "cleaned", "sold", "carried"],
    "how": ["red", "green", "small", "big", "old", "new", "heavy", "empty"],
    "what": ["book", "cup", "box", "lamp", "chair", "clock", "letter", "bottle", "door", "table"],
    "where": [
        "in the garden",
        "in the kitchen",
        "at the station",
        "behind the house",
        "near the river",
        "on the train",
    ],
    "when": ["today", "this morning", "yesterday", "after lunch", "on monday", "last night"],
}
PATTERNS = [
    "{who} {did} the {how} {what} {where}.",
    "{when}, {who} {did} a {how} {what}.",
    "{who} {did} the {what} and the {how} {what2} {when}.",
    "please put the {how} {what} {where}.",
    "where is the {how} {what}?",
    "hello, the {what} {where} is {how}.",
    "good morning, {who} {did} your {what} {when}.",
    "the {how} {what} is {where}, not {where2}.",
    "thank you, the {what} is {how}.",
    "is the {how} {what} {where}?",
]
VOICES = {
    "anna": {"voice": "en-us+f2", "rate": 160, "pitch": 60, "range": 45},
    "ben": {"voice": "en-us", "rate": 160, "pitch": 45, "range": 45},
    "carl": {"voice": "en-us+m3", "rate": 160, "pitch": 35, "range": 45},
    "dora": {"voice": "en-gb-x-rp", "rate": 160, "pitch": 55, "range": 45},
}
SECONDS = 2.35  # of an average sentence


def sentences(seed: int) -> Iterator[str]:
    """Yields different sentences; the first ones use the whole vocabulary.

    The iterator never ends, so take only as many as are needed.

    Args:
        seed: seed of the choice of words.
    """
    draw, seen = keyed(seed, "demo sentences"), set()
    decks = {slot: cycle(draw.permutation(words)) for slot, words in WORDS.items()}
    for pattern in cycle(PATTERNS):
        words = {slot: str(next(deck)) for slot, deck in decks.items()}
        others = {f"{slot}2": str(next(decks[slot])) for slot in ("what", "where")}
        # Without random skips, decks of equal size would always pair the same words.
        for slot in WORDS:
            if draw.random() < 0.5:
                next(decks[slot])
        sentence = pattern.format(**words, **others)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Demo:
    """The demo corpus; no sentence occurs twice, so the held-out ones are not seen in training.

    Attributes:
        name: of the data set.
        minutes: approximate amount of speech, over all voices.
        held_out: share of the utterances for validation, the last ones.
        seed: seed of sentences and voices.
    """

    name: str
    minutes: float
    held_out: Fraction
    seed: Count

    def __len__(self) -> int:
        return max(round(self.minutes * 60 / SECONDS), 2 * len(VOICES))

    def recordings(self) -> Iterator[Recording]:
        """Synthesizes and yields the recordings."""
        draw = keyed(self.seed, "demo voices")
        voices = (name for _ in count() for name in draw.permutation(list(VOICES)).tolist())
        prompts = list(islice(zip(sentences(self.seed), voices, strict=False), len(self)))
        unseen = max(round(self.held_out * len(prompts)), 1)
        audios = speak({"text": text, **VOICES[name]} for text, name in prompts)
        for i, ((text, name), audio) in enumerate(zip(prompts, audios, strict=True)):
            utt = f"demo_{i:05d}_{name}"
            held_out = i >= len(prompts) - unseen
            yield Recording(
                utt=utt, text=text, speaker=name, path=f"{utt}.wav", held_out=held_out, audio=audio
            )


def speak(orders: Iterable[Mapping[str, object]]) -> Iterator[bytes]:
    """Synthesizes sentences in a child process and yields a WAV file for each.

    Args:
        orders: text, voice, rate, pitch and range of each sentence, see `espeak`.

    Raises:
        UserError: if espeak-ng is not installed, or its process ends early.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise UserError("the demo corpus needs espeak-ng: pip install espeakng-loader")
    command = [sys.executable, "-m", "cosyexp.data.corpora.espeak"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        for order in orders:
            child.stdin.write(json.dumps(order).encode() + b"\n")
            child.stdin.flush()
            header = child.stdout.read(4)
            if len(header) < 4:
                raise UserError(
                    f"espeak-ng ended early, with exit status {child.wait()}: repeat the command"
                )
            yield child.stdout.read(struct.unpack("<I", header)[0])
