"""Encodes a recording as a prompt, with the front ends that encoded the training data.

This is the only module of synthesis that reads data.

E speaker embedding, F mel bands, P tokens of the prompt, Q frames of the prompt.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosyexp.config import FamilyConfig
from cosyexp.data.corpora.base import Recording
from cosyexp.data.encoding import listen
from cosyexp.data.fields import Mel
from cosyexp.data.frontends.base import FrontEnd, Wanted
from cosyexp.data.utterance import Utterance
from cosyexp.errors import UserError
from cosyexp.registry import build
from cosyexp.run.directory import voice_files
from cosyexp.synthesis.backends import LoadedModel
from cosyexp.synthesis.pipeline import Voice

LONGEST = 30.0  # seconds
KEYS = ("speech_tokenizer", "speaker_encoder")


def read_prompt(
    path: str, text: str | None, models: Mapping[str, LoadedModel], nodes: Mapping[str, Any]
) -> Voice:
    """Encodes a recording as a voice to continue (zero-shot synthesis).

    Args:
        path: of an audio file.
        text: what is said in it; None: the llm does not continue it.
        models: llm and flow, whose runs or exports keep the fitted front ends.
        nodes: config nodes of the front ends, by the names of their config groups.

    Raises:
        UserError: the recording cannot be used, or a front end is missing.
    """
    family = models["llm"].config.family
    tokenizer, encoder = (front_end(key, nodes[key], models, family) for key in KEYS)
    recording = Recording(utt="prompt", text="", speaker="", path=path)
    try:
        longest = min(LONGEST, tokenizer.longest, encoder.longest)
        speech_S = listen(recording, longest).speech_S
        tokens = np.asarray(tokenizer.encode(speech_S)).astype(np.int64)
        speaker = np.asarray(encoder.encode(speech_S)).astype(np.float32)
        mel_TF = Mel(sample_rate=family.sample_rate, **asdict(family.mel))(
            Utterance({"audio_data": recording.read(longest)})
        ).reshape(-1, family.mel.bins)
    except ValueError as error:
        raise UserError(f"prompt={path} cannot be used: {error}") from None
    if family.frames_per_token is not None:  # as in training
        size = min(len(tokens), len(mel_TF) // family.frames_per_token)
        tokens, mel_TF = tokens[:size], mel_TF[: size * family.frames_per_token]
    return Voice(
        speaker_BE=torch.from_numpy(speaker).unsqueeze(0),
        token_BP=torch.from_numpy(tokens).unsqueeze(0),
        mel_BFQ=torch.tensor(mel_TF).T.unsqueeze(0),
        text=text,
    )


def front_end(
    key: str, node: Any, models: Mapping[str, LoadedModel], family: FamilyConfig
) -> FrontEnd:
    """Loads a front end: a fitted one from where the models keep it.

    Args:
        key: its config group.
        node: its config node.
        models: llm and flow.
        family: what it must fit.

    Raises:
        UserError: the models keep none, or different ones.
    """
    name = f"{key}.safetensors"
    files = [
        path
        for model in ("llm", "flow")
        if (speakers := models[model].speakers) and (path := voice_files(speakers).get(name))
    ]
    if len({path.read_bytes() for path in files}) > 1:
        raise UserError(
            f"{files[0]} and {files[1]} differ, so these models were trained on different data: "
            f"give models of the same data"
        )
    wanted = Wanted(
        token_rate=family.token_rate,
        codes=family.speech_vocabulary,
        speaker_dim=family.speaker_dim,
    )
    recipe = build(node, "front_end")
    try:
        loaded: FrontEnd = recipe.load(files[0] if files else Path(name), wanted)
    except FileNotFoundError:
        raise UserError(
            f"{models['llm'].name} keeps no {name}, so its data have a {key.replace('_', ' ')} "
            f"that was not fitted on them: name it, such as {key}=onnx {key}.path=<file>"
        ) from None
    return loaded
