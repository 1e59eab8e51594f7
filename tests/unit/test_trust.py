"""A run or an export of someone else names no code, and few places run what a file says."""

import ast
import json
from collections.abc import Callable, Iterator
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from cosyexp.config import PreferConfig, TrainConfig, parse, to_dict
from cosyexp.data.features import pitch
from cosyexp.data.tokenizers import qwen_tokenizer, read_special_tokens
from cosyexp.errors import UserError
from cosyexp.exporting.components import component_class
from cosyexp.exporting.export import write_excerpt
from cosyexp.exporting.source import ExportSource, load_network
from cosyexp.models.llm.qwen_lm import QwenLM
from cosyexp.prefer import take_family
from cosyexp.preferences.answers import AnswerGenerator
from cosyexp.run.directory import RunDirectory
from cosyexp.synthesis.backends import LoadedModel, read_format
from cosyexp.synthesis.pipeline import Pipeline
from cosyexp.training.evaluate import evaluator
from tests.support import ROOT, config
from tests.unit.runs import make_run

# the configs that come from others ---------------------------------------------------------------

BAD = ("shutil.copy", "cosyexp.training.loggers.tensorboard.TensorBoard", "torch.hub.load")


@cache
def composed(model: str) -> TrainConfig:
    """The config of a tiny network, which tests do not change."""
    return config(model, Path("data"))


def pipeline(run: RunDirectory) -> Pipeline:
    """Returns the pipeline of a run of an llm, with another of a vocoder."""
    vocoder = LoadedModel("hifigan", composed("hifigan"), None, {})
    return Pipeline({"llm": LoadedModel("llm", run.config(), None, {}), "hifigan": vocoder})


def answers(run: RunDirectory) -> AnswerGenerator:
    """Returns the generator of preference pairs of a run."""
    return AnswerGenerator(
        run.config(), run.path, times=1, batch_size=1, seed=0, device=torch.device("cpu")
    )


# Each node of a run that becomes an object, and who makes it.
READERS: dict[str, list[Callable[[RunDirectory], Any]]] = {
    "network": [
        lambda run: load_network(ExportSource("run", run.config(), run.path)),
        lambda run: evaluator(run.path),
    ],
    "network.llm": [lambda run: load_network(ExportSource("run", run.config(), run.path))],
    "objective": [lambda run: evaluator(run.path)],
    "objective.optimizer": [lambda run: evaluator(run.path)],
    "components.part": [lambda run: component_class(run.config().components["part"])],
    "family.tokenizer": [pipeline],
    "family.sampler": [pipeline, answers],
    "model.collator": [answers],
}


@pytest.mark.parametrize("target", BAD)
@pytest.mark.parametrize("place", READERS)
def test_a_run_can_name_nothing_else(place, target, tmp_path):
    values = to_dict(composed("llm"))
    *parents, last = place.split(".")
    reduce(lambda node, key: node[key], parents, values)[last] = {"_target_": target}
    for i, reader in enumerate(READERS[place]):
        run = make_run(tmp_path / str(i), parse(TrainConfig, values))
        with pytest.raises(UserError, match=f"_target_={target} is not a registered"):
            reader(run)


@pytest.mark.parametrize("target", BAD)
def test_an_export_can_name_nothing_else(target, tmp_path):
    source = ExportSource("run", composed("llm"), tmp_path)
    write_excerpt(source, tmp_path, {"_target_": target})
    with pytest.raises(UserError, match=f"_target_={target} is not a registered format"):
        read_format(tmp_path / "llm.yaml", "")


def test_measuring_weights_prepares_no_data(tmp_path):
    """A run may name any folder, and any corpus to fill it with."""
    values = to_dict(composed("llm"))
    folder = tmp_path / "home"
    corpus = {"_target_": "cosyexp.data.corpora.demo.Demo", "name": "demo", "minutes": 1.5}
    values["data"] |= {"dir": str(folder), "corpus": corpus, "train": f"{folder}/train.list"}
    run = make_run(tmp_path / "run", parse(TrainConfig, values))
    with pytest.raises(UserError, match="home"):
        evaluator(run.path)
    assert not folder.exists()


def test_the_family_of_a_run_brings_no_interpolation_in(tmp_path):
    values = to_dict(composed("llm"))
    values["family"] |= {"instruct": "${oc.env:HOME}", "sampler": {"_target_": "${oc.env:HOME}"}}
    run = make_run(tmp_path / "run", parse(TrainConfig, values))
    cfg = OmegaConf.structured(PreferConfig(run_dir=str(run), out="out"))
    take_family(cfg)
    family: Any = OmegaConf.to_container(cfg.family, resolve=True)
    assert family["instruct"] == family["sampler"]["_target_"] == "${oc.env:HOME}"


@pytest.mark.parametrize("method", ["load", "__loader__", "synthesize", "harvest()"])
def test_a_method_of_f0_is_one_of_two(method):
    with pytest.raises(UserError, match=r"family\.pitch=.* give harvest, fast or dio"):
        pitch(np.ones(16000), 16000, 256, method)


@pytest.mark.parametrize("name", ["../special_tokens/whisper", "/etc/passwd", "", "whisper.txt"])
def test_special_tokens_are_those_of_a_family(name):
    with pytest.raises(UserError, match="is not one of cosyvoice2, cosyvoice3, whisper"):
        read_special_tokens(name)


# folders of a tokenizer or of pretrained weights ------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files name code next to them, and a user who would agree to run it."""
    folder, code = tmp_path / "qwen", "from pathlib import Path\n"
    folder.mkdir()
    code += f"Path({str(tmp_path / 'executed')!r}).touch()\n"
    code += "class Mine: from_pretrained = classmethod(lambda *a, **k: None)\nMine.__name__ = 'x'\n"
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    auto_map: dict[str, Any] = dict.fromkeys(names, "mine.Mine")
    model = {"model_type": "mine", "auto_map": auto_map, "architectures": ["Mine"]}
    tokenizer = {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
    }
    (folder / "mine.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(f"{code}generate = print\n")
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "generation_config.json").write_text("{}")
    answers = ["y"] * 9
    monkeypatch.setattr("builtins.input", lambda prompt="": answers.pop())
    yield folder
    assert len(answers) == 9 and not (tmp_path / "executed").exists()


def test_the_folder_of_a_tokenizer_runs_no_code_and_nobody_is_asked(folder):
    with pytest.raises(UserError, match=r"qwen .*family\.tokenizer\.folder="):
        qwen_tokenizer(str(folder), "cosyvoice2")


def test_a_folder_of_pretrained_weights_runs_no_code_and_nobody_is_asked(folder):
    sizes = {"width": 16, "layers": 1, "heads": 2, "key_heads": 1, "hidden": 24}
    vocabularies = {"text_vocabulary": 9, "speech_vocabulary": 9, "special_tokens": 3}
    network = QwenLM(**vocabularies, **sizes, sos_task_ids=None, bias=True)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no file"):
        network.load_pretrained(folder)
    save_file(network.llm.model.model.state_dict(prefix="model."), folder / "model.safetensors")
    network.load_pretrained(folder)


# what runs code ----------------------------------------------------------------------------------

BUILTINS = ("eval", "exec", "__import__")
BUILTINS = ("eval", "exec", "__import__")
# Calls that run what a name or a file says, and the only files that make them.
CODE = {
    "eval": (),
    "exec": (),
    "__import__": (),
    "import_module": ("cosyexp/registry.py", "cosyexp/evaluation/judges/mos.py"),
    "instantiate": ("cosyexp/registry.py",),
    "locate": (),
    "AutoTokenizer.from_pretrained": (),
    "AutoConfig.from_pretrained": (),
    "get_method": (),
    "run_path": (),
    "run_module": (),
    "InferenceSession": ("cosyexp/exporting/onnx.py", "cosyexp/data/frontends/onnx.py"),
    "jit.load": ("cosyexp/exporting/jit.py",),
    "export.load": ("cosyexp/exporting/pt2.py",),
    "aoti_load_package": ("cosyexp/exporting/pt2.py",),
    "pickle.load": (),
    "pickle.loads": (),
    "Unpickler": (),
    "np.load": (),
    "yaml.load": ("cosyexp/run/documents.py",),  # with a safe loader
    "unsafe_load": (),
    "full_load": (),
}


def test_code_is_run_in_these_places_only():
    """Each file that reads what others wrote would otherwise need a proof of its own."""
    found: dict[str, set[str]] = {name: set() for name in CODE}
    offline = {"trust_remote_code": "False", "local_files_only": "True"}
    safe = {"torch.load": {"weights_only": "True"}, "from_pretrained": offline}
    for path in [*(ROOT / "cosyexp").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            for wanted in CODE:
                if name == wanted or (wanted not in BUILTINS and name.endswith(f".{wanted}")):
                    found[wanted].add(str(path.relative_to(ROOT)))
            for wanted, arguments in safe.items():
                if name.endswith(wanted):
                    assert arguments.items() <= words.items(), f"{path}:{call.lineno}"
    assert {name: set(files) for name, files in CODE.items()} == found
