"""Synthesis with tiny networks: prompts, batches, long texts, streams, and the files they make."""

from dataclasses import asdict, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from torch.testing import assert_close

from cosyexp.cli.compose import compose_train
from cosyexp.config import SynthesizeConfig, parse
from cosyexp.data.fields import Mel
from cosyexp.data.utterance import Utterance
from cosyexp.errors import UserError
from cosyexp.exporting.components import fold_parametrizations
from cosyexp.exporting.verify import eager
from cosyexp.registry import build
from cosyexp.run.tensors import save_tensors
from cosyexp.synthesis import streaming
from cosyexp.synthesis.backends import COMPONENTS, LoadedModel, Runner
from cosyexp.synthesis.noise import FrameNoise, drawer
from cosyexp.synthesis.pipeline import Pipeline, Voice
from cosyexp.synthesis.prompt import read_prompt
from cosyexp.synthesis.sentences import LONG, split_text
from cosyexp.synthesis.streaming import Stream
from cosyexp.synthesis.waves import join, write_growing_wav
from tests.support import FAMILIES, MODELS, TINY, family_words

CHUNKED = ("cosyvoice2", "cosyvoice3")
FAMILY = pytest.mark.parametrize("family", ["demo", *FAMILIES])
CPU = torch.device("cpu")
FRONT_ENDS = {
    "speech_tokenizer": {"_target_": "cosyexp.data.frontends.kmeans.KMeans"},
    "speaker_encoder": {"_target_": "cosyexp.data.frontends.mel_speaker.MelStatistics"},
}


@cache
def loaded(family: str, model: str) -> LoadedModel:
    words = [f"model={model}", *TINY[model]] if family == "demo" else family_words(family, model)
    shared = ["tokenizer@family.tokenizer=characters", "family.speech_per_text=[1,3]"]
    config = compose_train([*words, *shared])
    torch.manual_seed(0)
    network = build(config.network, "network").eval().requires_grad_(False)
    fold_parametrizations(network)
    runners = {}
    for name in COMPONENTS[model]:
        component = build(config.components[name], "component", network).eval()
        runners[name] = Runner(component.inputs, partial(eager, component), CPU)
    return LoadedModel(model, config, None, runners, network)


def pipeline(family: str) -> Pipeline:
    return Pipeline({model: loaded(family, model) for model in MODELS})


def voice(family: str, tokens: int = 0, text: str | None = None) -> Voice:
    """Returns a random voice, with a prompt of so many speech tokens."""
    config, draw = loaded(family, "llm").config.family, torch.Generator().manual_seed(1)
    speaker = torch.randn(1, config.speaker_dim, generator=draw)
    if not tokens:
        return Voice(speaker)
    frames = tokens * config.sample_rate // (config.token_rate * config.mel.hop)
    token = torch.randint(config.speech_vocabulary, (1, tokens), generator=draw)
    mel = torch.randn(1, config.mel.bins, frames, generator=draw)
    return Voice(speaker, token, mel, text)


# batches and prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prompt"), [("demo", 0), ("cosyvoice", 5), ("cosyvoice2", 5), ("cosyvoice3", 0)]
)
def test_a_batch_of_eight_is_eight_singles(family, prompt):
    speech, who = pipeline(family), voice(family, prompt, "ah")
    texts = ["hello", "a", "no one", "yes.", "he", "two", "oh my", "so"]
    draws = [drawer(0, 0, "llm") for _ in texts]
    together = speech.tokens(texts, who, draws, [])
    for text, tokens in zip(texts, together, strict=True):
        assert torch.equal(speech.tokens([text], who, [drawer(0, 0, "llm")], [])[0], tokens)
    assert len({len(tokens[0]) for tokens in together}) > 1
    waves = list(speech.synthesize_all(texts[:3], who))
    for text, wave in zip(texts, waves, strict=False):
        assert_close(wave, speech.synthesize(text, voice=who), rtol=0, atol=1e-4)


@FAMILY
def test_a_prompt_is_continued_by_llm_and_flow(family):
    speech, who = pipeline(family), voice(family, 6, "ah")
    assert who.token_BP is not None and who.mel_BFQ is not None

    def tokens(who, text="hello"):
        return speech.tokens([text], who, [drawer(0, 0, "llm")], [])[0]

    other = replace(who, token_BP=who.token_BP + 1)
    heard, alone = tokens(who), tokens(replace(who, text=None))
    assert not torch.equal(heard, tokens(other)) and not torch.equal(heard, alone)
    assert torch.equal(alone, tokens(replace(other, text=None)))  # only the flow hears it then
    assert torch.equal(alone, tokens(Voice(who.speaker_BE)))

    def mel(who):
        return speech.mel(alone, who.speaker_BE, drawer(0, 0, "flow"), who)

    plain = mel(Voice(who.speaker_BE))
    assert mel(who).shape == plain.shape and (mel(who) != plain).any()
    for changed in (other, replace(who, mel_BFQ=who.mel_BFQ + 1)):
        assert (mel(changed) != mel(who)).any()


@pytest.mark.parametrize("family", CHUNKED)
def test_an_instruction_leads_the_text(family, monkeypatch):
    speech, who = pipeline(family), voice(family)
    lead = speech.instruction("be slow")
    assert lead == speech.tokenizer.encode("be slow")
    prefill, given = speech.runners["llm.prefill"], dict[str, torch.Tensor]()

    def recorded(**inputs):
        given.update(inputs)
        return prefill(**inputs)

    monkeypatch.setitem(speech.runners, "llm.prefill", recorded)
    (tokens,) = speech.tokens(["hello"], who, [drawer(0, 0, "llm")], lead)
    assert given["text"][0].tolist() == speech.tokenizer.encode("be slowhello")
    assert tokens.size(1) <= 3 * len("hello")  # the limits are those of the text


def test_a_recording_is_encoded_as_the_training_data_were(data: Path, tmp_path: Path):
    row = pq.read_table(next(data.glob("train/*.parquet"))).slice(3, 1).to_pylist()[0]
    (tmp_path / "voice.flac").write_bytes(row["audio_data"])
    models = {
        name: replace(loaded("demo", name), speakers=data / "speakers.safetensors")
        for name in MODELS
    }
    found = read_prompt(str(tmp_path / "voice.flac"), row["text"], models, FRONT_ENDS)
    assert found.token_BP is not None and found.mel_BFQ is not None
    assert found.token_BP[0].tolist() == row["speech_token"]
    assert_close(found.speaker_BE[0], torch.tensor(row["utt_embedding"]))
    family = models["llm"].config.family
    wanted = Mel(sample_rate=family.sample_rate, **asdict(family.mel))(Utterance(row))
    assert torch.equal(found.mel_BFQ[0].T.flatten(), torch.from_numpy(wanted))
    wave = Pipeline(models).synthesize("hello", voice=found)
    assert len(wave) and np.isfinite(wave).all()
    # of other data, which have other tokens
    other = tmp_path / "other"
    other.mkdir()
    for name in ("speakers", "speech_tokenizer"):
        save_tensors(other / f"{name}.safetensors", {"codes": torch.zeros(1)})
    models["flow"] = replace(models["flow"], speakers=other / "speakers.safetensors")
    with pytest.raises(UserError, match="trained on different data"):
        read_prompt(str(tmp_path / "voice.flac"), None, models, FRONT_ENDS)


def test_what_a_prompt_needs(data: Path, tmp_path: Path):
    soundfile.write(tmp_path / "short.wav", np.ones(800) / 2, 16000)
    models = {name: loaded("demo", name) for name in MODELS}
    with pytest.raises(UserError, match=r"keeps no speech_tokenizer.*speech_tokenizer=onnx"):
        read_prompt(str(tmp_path / "short.wav"), None, models, FRONT_ENDS)
    models = {n: replace(m, speakers=data / "speakers.safetensors") for n, m in models.items()}
    for name, reason in (("short.wav", "shorter than"), ("none.wav", "cannot be read")):
        with pytest.raises(UserError, match=rf"prompt=.*{name} cannot be used: .*{reason}"):
            read_prompt(str(tmp_path / name), None, models, FRONT_ENDS)


# long texts ---------------------------------------------------------------------------------------

ENGLISH = (
    'Mr. Smith paid 3.14 dollars, e.g. for "tea." He left! Why? '
    "Nobody, as far as anybody in the whole village could tell, had ever seen him there before, "
    "or after, or at any time in between; "
)
CHINESE = "今天天气很好。我们去公园散步吧！你觉得怎么样？" + "很长的句子，" * 30 + "完了。"


@pytest.mark.parametrize("text", [ENGLISH * 45, CHINESE * 20, "x" * 1000, " \n hm \n\n"])
def test_nothing_of_a_long_text_is_lost(text):
    pieces = split_text(text, len)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= LONG for piece in pieces)
    assert len(text.split()) != 45 * 44 or len(text.split()) > 1900


def test_pieces_end_with_sentences_and_short_ones_are_spoken_together():
    def words(text):
        return 4 * len(text.split())

    assert split_text("Mr. Smith paid 3.14 dollars, e.g. today. Then he left for ever!", words) == [
        "Mr. Smith paid 3.14 dollars, e.g. today.",
        "Then he left for ever!",
    ]
    assert split_text("No. Yes. Perhaps not.", words) == ["No. Yes. Perhaps not."]
    assert split_text(CHINESE, len)[0] == "今天天气很好。我们去公园散步吧！你觉得怎么样？"


def test_a_long_text_is_the_speech_of_its_pieces(monkeypatch):
    speech, who = pipeline("demo"), voice("demo")
    monkeypatch.setattr(speech, "pieces", lambda text: text.split("|"))
    rate, whole = speech.sample_rate, speech.synthesize("hello|no|yes", voice=who)
    parts = list(speech.synthesize_all(["hello"], who))
    assert_close(whole[: len(parts[0]) - rate // 100], parts[0][: -rate // 100], rtol=0, atol=1e-4)


def test_joins_have_no_clicks():
    waves = [np.full(1600, 0.5, np.float32), np.full(800, -0.5, np.float32)]
    joined = join(waves, 16000)
    assert len(joined) == 2400 and joined[0] == 0.5 and joined[-1] == -0.5
    assert np.abs(np.diff(joined)).max() < 0.01


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_changes_the_length(speed):
    speech, who = pipeline("demo"), voice("demo")
    plain, fast = (speech.synthesize("hello", voice=who, speed=s) for s in (1.0, speed))
    assert len(fast) == int(len(plain) / 256 / speed) * 256


# streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CHUNKED)
@pytest.mark.parametrize("prompt", [0, 30])
@torch.no_grad()
def test_a_stream_is_the_speech_of_the_whole_utterance(family, prompt):
    """Of the same tokens, with the same chunks; each chunk costs what the one before it did."""
    speech, who, text = (
        pipeline(family),
        voice(family, prompt, "ah"),
        "hello, you there, who are you, and where is he",
    )
    speech.family = replace(speech.family, speech_per_text=[3.0, 3.0])
    stream, networks = Stream(speech, who, 3), {m: loaded(family, m).network for m in MODELS}
    seen: dict[str, list[int]] = {"estimator": [], "conv_pre": []}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0].size(2))
        )
        for name, module in (
            ("estimator", networks["flow"].decoder.estimator),
            ("conv_pre", networks["hifigan"].conv_pre),
        )
    ]
    waves = list(stream(text))
    for hook in hooks:
        hook.remove()
    assert len(waves) >= 4
    chunk = networks["flow"].decoder.estimator.chunk
    assert set(seen["estimator"][10:-10]) == {chunk}
    vocoder = networks["hifigan"]
    assert max(seen["conv_pre"]) <= vocoder.reach + vocoder.context + chunk

    (tokens,) = speech.tokens([text], who, [drawer(3, 0, "llm")], stream.lead)
    mel = stream._flow(0)(tokens, True)
    whole = speech.wave(mel, drawer(3, 0, "hifigan"))
    assert_close(np.concatenate(waves), whole, rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", CHUNKED)
def test_speech_leaves_while_the_text_arrives(family, monkeypatch):
    monkeypatch.setattr(streaming, "LONGEST", 4)
    speech, arrived = pipeline(family), list[str]()

    def text():
        for word in ["hello there ", "you and ", "you and ", "so on ", "and on ", "and on."]:
            arrived.append(word)
            yield word

    waves = Stream(speech, voice(family)).while_arriving(text())
    first = next(waves)
    assert len(first) and len(arrived) < 6
    assert sum(map(len, waves)) > len(first) and len(arrived) == 6
    with pytest.raises(UserError, match="no text arrived"):
        next(Stream(speech, voice(family)).while_arriving(["", " "[:0]]))


def test_what_cannot_stream():
    with pytest.raises(UserError, match=r"has no chunks, .*cosyvoice2 or cosyvoice3"):
        Stream(pipeline("cosyvoice"), voice("cosyvoice"))
    exported = {n: replace(loaded("cosyvoice2", n), network=None) for n in MODELS}
    with pytest.raises(UserError, match="stream=true needs backend=torch"):
        Stream(Pipeline(exported), voice("cosyvoice2"))


@pytest.mark.parametrize("sizes", [(200,), (1, 63, 64, 72), (0, 130, 70)])
def test_noise_does_not_depend_on_how_it_is_asked_for(sizes):
    whole, pieces = (FrameNoise(drawer(0, "x"), 3, 5) for _ in range(2))
    assert torch.equal(torch.cat([pieces(size) for size in sizes]), whole(200))
    assert not torch.equal(FrameNoise(drawer(1, "x"), 3, 5)(8), FrameNoise(drawer(0, "x"), 3, 5)(8))


# files --------------------------------------------------------------------------------------------


def test_a_growing_file_is_whole_after_each_piece(tmp_path):
    path, pieces = tmp_path / "new/a.wav", [np.full(100, 0.5), np.full(50, -2.0), np.zeros(7)]
    lengths: list[int] = []

    def waves():
        for piece in pieces:
            if path.exists():
                lengths.append(soundfile.info(path).frames)
            yield piece

    assert write_growing_wav(path, waves(), 22050) == 157
    wave, rate = soundfile.read(path)
    assert lengths == [100, 150] and rate == 22050 and len(wave) == 157
    assert_close(wave[:100], pieces[0], rtol=0, atol=1e-4)
    assert wave[100] == -32767 / 32768


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "text must be given"),
        ({"text": "a", "texts": "b"}, "text= and texts= exclude each other"),
        ({"text": "a", "speaker": "x", "prompt": "b"}, "speaker= and prompt= exclude each other"),
        ({"texts": "a", "stream": True}, "texts= and stream= exclude each other"),
        ({"text": "a", "prompt_text": "b"}, "give prompt="),
        ({"text": "a", "stream": True, "speed": 2.0}, "leave out stream=true, or speed="),
    ],
)
def test_settings_that_exclude_each_other(given: dict[str, Any], message):
    with pytest.raises(UserError, match=message):
        parse(SynthesizeConfig, given)


def test_an_llm_without_instructions_takes_none():
    with pytest.raises(UserError, match="takes no instructions"):
        pipeline("demo").instruction("be slow")
    assert pipeline("demo").instruction(None) == []
    assert all(a != b for a, b in pairwise([drawer(0, i, "llm").initial_seed() for i in range(3)]))
