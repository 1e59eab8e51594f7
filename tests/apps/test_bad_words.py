"""A wrong command line gets one sentence with what is wrong and what to do, and changes nothing."""

import pytest

from tests.support import RUNS, train_words

WORDS = {
    "misspelled option": (
        "train",
        ["trainer.stepz=1"],
        ["there is no key trainer.stepz", "did you mean steps?"],
    ),
    "misspelled section": (
        "train",
        ["trianer.steps=1"],
        ["there is no key trianer", "did you mean trainer?"],
    ),
    "misspelled option of a network": (
        "train",
        ["network.widht=1"],
        ["there is no key network.widht", "--cfg job"],
    ),
    "misspelled option of the optimizer": (
        "train",
        ["optimizer.lrr=1"],
        ["there is no key optimizer.lrr", "did you mean lr?"],
    ),
    "added option": ("train", ["+typo=1"], ["there is no key typo", "--cfg job"]),
    "added option of a network": (
        "train",
        ["+network.widht=1"],
        ["network.widht is not an argument of TransformerLM"],
    ),
    "misspelled option of an averaging method": (
        "average",
        ["run_dir=x", "method=weighted", "method.temprature=1"],
        ["there is no key method.temprature", "did you mean temperature?"],
    ),
    "misspelled group": (
        "train",
        ["modle=flow"],
        ["there is no key modle", "did you mean mode or model?"],
    ),
    "misspelled model": (
        "train",
        ["model=flwo"],
        ["model/flwo", "Available options", "flow hifigan llm"],
    ),
    "misspelled family": ("train", ["family=demmo"], ["family/demmo", "Available options", "demo"]),
    "misspelled format": (
        "export",
        ["format=onx"],
        ["format/onx", "Available options", "hf jit official onnx peft pt2"],
    ),
    "wrong type": ("train", ["trainer.steps=abc"], ["trainer.steps=abc", "Integer"]),
    "wrong choice": (
        "train",
        ["trainer.precision=fp8"],
        ["trainer.precision=fp8", "[fp32, bf16, fp16]"],
    ),
    "several values": ("train", ["model=llm,flow"], ["model=llm,flow", "--multirun"]),
    "no value": ("train", ["trainer.steps"], ["trainer.steps has no value", "trainer.steps=..."]),
    "sign in a value": ("train", ["run_dir=a=b"], ["run_dir=a=b cannot be read", 'run_dir="..."']),
    "data without a list": (
        "train",
        ["data=parquet"],
        ["data.train, data.valid must be given", "data.train=..."],
    ),
    "data without a folder": (
        "train",
        ["data=prepared"],
        ["data.dir must be given", "data.dir=..."],
    ),
    "average of nothing": ("average", [], ["run_dir must be given", "run_dir=..."]),
    "average by a misspelled rule": (
        "average",
        ["run_dir=x", "select=worst"],
        ["select=worst", "[best, last, window, ema]"],
    ),
    "export of nothing": ("export", [], ["there is no run under runs/", "run_dir="]),
    "export in another precision": ("export", ["precision=fp8"], ["fp8", "expected one of"]),
    "nothing to say": ("synthesize", RUNS, ["text must be given", "text=..."]),
    "nobody to say it": ("synthesize", ["text=hello"], ["llm", "flow", "hifigan", "must be given"]),
    "corpus without a root": ("prepare", ["corpus=ljspeech"], ["corpus.root must be given"]),
}


@pytest.mark.parametrize("case", WORDS)
def test_refused_overrides(case, refused):
    app, words, parts = WORDS[case]
    refused(app, words, *parts)


VALUES = {
    "trainer.accumulate=0": ["trainer.accumulate=0 must be >= 1"],
    "trainer.steps=-1": ["trainer.steps=-1 must be >= 0"],
    "optimizer.lr=-1": ["optimizer.lr=-1 must be a number >= 0"],
    "optimizer.lr=abc": ["optimizer.lr=abc must be a number >= 0"],
    "optimizer.lr=nan": ["optimizer.lr=nan must be a finite number"],
    "optimizer.betas=[0.9,1]": ["optimizer.betas=[0.9, 1] must be", "a number >= 0 and < 1"],
    "model.warmup=-3": ["model.warmup=-3 must be >= 0"],
    "network.llm.blocks=1.5": ["network.llm.blocks=1.5 must be a whole number >= 1"],
    "data.limit=-3": ["data.limit=-3 must be >= 1"],
    "engine.threads=1000000": ["engine.threads=1000000 must be >= 1 and <= 1024"],
    "data.max_frames=abc": ["data.max_frames=abc", "Integer"],
    "data.workers=-1": ["data.workers=-1 must be >= 0"],
    "engine.nproc_per_node=0": ["engine.nproc_per_node=0 must be >= 1"],
    "engine.nproc_per_node=many": ["engine.nproc_per_node=many must be"],
    "network.llm.heads=3": [
        "TransformerLM cannot be built",
        "width=16 must be a multiple of heads=3",
    ],
    "init_from=nothing.pt": ["there are no weights nothing.pt"],
    "scheduler=noam_hold": ["scheduler.steps is null", "give trainer.steps="],
}


@pytest.mark.parametrize("value", VALUES)
def test_values_out_of_range(value, refused, data):
    words = (
        [value, "trainer.steps=null", "trainer.epochs=1"]
        if value == "scheduler=noam_hold"
        else ["trainer.steps=1", value]
    )
    refused("train", train_words("llm", data, *words), *VALUES[value])
