"""Schedules, features, losses and sampling against the original's numbers."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from cosyexp.data.features import pitch
from cosyexp.models.layers.spectrogram import MelSpectrogram, mel_filters
from cosyexp.models.llm.sampling import ras
from cosyexp.objectives.losses import preference
from cosyexp.objectives.losses.adversarial import tpr_loss
from cosyexp.objectives.losses.cross_entropy import hits, token_loss
from cosyexp.training.schedules import constant, noam_hold, warmup

SCHEDULES: dict[str, Callable[[int, float], float]] = {
    "warmup25": partial(warmup, steps=25),
    "warmup2500": partial(warmup, steps=2500),
    "warmup0": partial(warmup, steps=0),
    "constant": constant,
    "noamhold": partial(noam_hold, steps=180, warmup=20, hold=60, decay=0.5, lowest=1e-5),
    "noamhold_ratio": partial(noam_hold, steps=200, warmup=0.1, hold=0.3, decay=1.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(fixture, name):
    schedule, traces = SCHEDULES[name], fixture("schedulers")["traces"]
    rates = [schedule(update, 1e-3) for update in range(200)]
    np.testing.assert_allclose(rates, traces[f"{name}_setNone"]["lrs"], rtol=1e-9)
    # the original's first step after a resume has the rate of step 0, which ours does not repeat
    resumed = [schedule(50 + update, 1e-3) for update in range(1, 200)]
    np.testing.assert_allclose(resumed, traces[f"{name}_set50"]["lrs"][1:], rtol=1e-9)


@pytest.mark.parametrize(("name", "fmax"), [("mel_v1_fmax8000", 8000.0), ("mel_v1_fmaxNone", None)])
def test_mel_of_22050_hz(fixture, close, name, fmax):
    numbers = fixture("features")
    mel = MelSpectrogram(sample_rate=22050, n_fft=1024, hop=256, win=1024, bins=80, fmax=fmax)
    close(name, mel(numbers["wave22050"]), numbers[name])


@pytest.mark.parametrize(("name", "fmax"), [("mel_v2_fmax8000", 8000.0), ("mel_v3_fmaxNone", None)])
def test_mel_of_24000_hz(fixture, close, name, fmax):
    numbers = fixture("features")
    mel = MelSpectrogram(sample_rate=24000, n_fft=1920, hop=480, win=1920, bins=80, fmax=fmax)
    close(name, mel(numbers["wave24000"]), numbers[name])


def test_mel_filters(fixture, close):
    numbers = fixture("features")
    close("22050 Hz", mel_filters(22050, 1024, 80, 0, 8000), numbers["mel_basis_v1_8000"])
    close("24000 Hz", mel_filters(24000, 1920, 80, 0, 8000), numbers["mel_basis_v2_8000"])


@pytest.mark.parametrize(
    ("chain", "rate", "hop"), [("chain_v1", 22050, 256), ("chain_v2", 24000, 480)]
)
def test_f0(fixture, close, chain, rate, hop):
    numbers = fixture("features")[chain]
    wave = numbers["speech"].flatten().numpy()
    close(chain, pitch(wave, rate, hop, "harvest"), numbers["pitch_feat"].flatten())


def test_token_loss(fixture, close):
    numbers = fixture("losses")["lsl"]
    valid = numbers["target"] != -1
    targets = numbers["target"].clamp(min=0)
    close("accuracy", hits(numbers["x"], targets, valid) / valid.sum(), numbers["acc"])
    for case in numbers["cases"]:
        share = valid.sum() if case["normalize_length"] else len(numbers["x"])
        close(
            str(case["smoothing"]),
            token_loss(numbers["x"], targets, valid, case["smoothing"]) / share,
            case["loss"],
        )


def test_preference_losses(fixture, close):
    numbers = fixture("losses")
    chosen, rejected = (
        numbers[f"policy_{side}"].clone().requires_grad_() for side in ("chosen", "rejected")
    )
    gains = chosen - numbers["ref_chosen"], rejected - numbers["ref_rejected"]
    for case in numbers["cases"]:
        beta, smoothing = case["beta"], case["label_smoothing"]
        h = gains[0] - gains[1]
        loss = (
            preference.ipo(h, beta) if case["ipo"] else preference.dpo(h, beta, smoothing)
        ).mean()
        name = f"beta {beta} smoothing {smoothing} ipo {case['ipo']}"
        close(name, loss, case["loss"])
        grads = torch.autograd.grad(loss, (chosen, rejected), retain_graph=True)
        for side, gain, grad in zip(("chosen", "rejected"), gains, grads, strict=True):
            close(f"{name} {side}", grad, case[f"grad_{side}"])
            close(f"{name} {side} reward", beta * gain, case[f"{side}_rewards"])


def test_tpr_loss_over_the_batch(fixture, close):
    numbers = fixture("losses")["tpr"]
    real, fake = ([[x] for x in numbers[name]] for name in ("dr", "dg"))
    for tau, wanted in numbers["cases"].items():
        close(f"tau {tau}", tpr_loss(real, fake, float(tau), over="batch").mean(), wanted)


def test_repetition_aware_sampling(fixture):
    numbers = fixture("sampling")
    options = numbers["config"]
    for case in numbers["cases"]:
        drawn = [int(value) for _, value in case["tape"]]
        token = ras(
            case["scores"],
            case["decoded"],
            lambda _, drawn=drawn: drawn.pop(0),  # type: ignore[misc]
            top_p=options["top_p"],
            top_k=options["top_k"],
            window=options["win_size"],
            repetition=options["tau_r"],
        )
        assert token == case["ras"] and not drawn
