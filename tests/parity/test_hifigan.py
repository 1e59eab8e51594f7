"""The vocoders and their discriminators give the numbers of the original."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosyexp.data.collators.hifigan import VocoderBatch
from cosyexp.models.hifigan.discriminators import Discriminators
from cosyexp.models.hifigan.generator import F0Predictor, HiFTGenerator
from cosyexp.models.hifigan.source import HarmonicSource
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.objectives.adversarial import Adversarial
from cosyexp.run.headers import our_name
from tests.parity.conftest import LIMIT

Numbers = dict[str, Any]  # a recording of the original


def folders(kind: str) -> list[str]:
    """Returns the recordings of a kind, such as hift_v1."""
    root = os.environ.get("COSYEXP_PARITY")
    return (
        sorted(path.parent.name for path in Path(root).glob(f"{kind}_*/fixture.pt")) if root else []
    )


VOCODERS, GANS = folders("hift"), folders("hifigan")
F0_LOOK_AHEAD = 3  # frames, of the original's causal predictor
LIMITS = {  # on the difference of the gradients, where the recording's own rounding is larger:
    ("hifigan_v3", "hifigan"): 5e-4,  # in double precision ours differ from it by up to 3.1e-4
}


def generator(numbers: Numbers, weights: Mapping[str, Tensor]) -> HiFTGenerator:
    """Builds the vocoder with the weights of the original."""
    given, mel_bins = numbers["config"]["hift"], numbers["config"]["hift"]["in_channels"]
    look_ahead = given.get("conv_pre_look_right")
    causal = look_ahead is not None
    net = HiFTGenerator(
        mel_bins=mel_bins,
        channels=given["base_channels"],
        rates=given["upsample_rates"],
        kernels=given["upsample_kernel_sizes"],
        resblock_kernels=given["resblock_kernel_sizes"],
        source_kernels=given["source_resblock_kernel_sizes"],
        dilations=given["resblock_dilation_sizes"],
        source_dilations=given["source_resblock_dilation_sizes"],
        n_fft=given["istft_params"]["n_fft"],
        n_hop=given["istft_params"]["hop_len"],
        look_ahead=look_ahead,
        leak=given["lrelu_slope"],
        loudest=given["audio_limit"],
        f0=F0Predictor(
            mel_bins=numbers["config"]["f0"]["in_channels"],
            channels=numbers["config"]["f0"]["cond_channels"],
            look_ahead=F0_LOOK_AHEAD if causal else None,
        ),
        source=HarmonicSource(
            sample_rate=given["sampling_rate"],
            hop=numbers["config"]["hop"],
            harmonics=given["nb_harmonics"] + 1,
            amplitude=given["nsf_alpha"],
            noise_std=given["nsf_sigma"],
            voiced_above=given["nsf_voiced_threshold"],
            glide="running"
            if given["sampling_rate"] == 22050
            else "nearest"
            if causal
            else "linear",
        ),
    )
    assert list(net.state_dict()) == list(weights)
    net.load_state_dict(weights)
    return net


def draws(
    numbers: Numbers, tape: Sequence[tuple[str, Tensor]] | None, rows: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Returns the starting phases and the noise that the original drew, or else its fixed ones."""
    uniform, noise = (
        (tape[0][1], tape[1][1])
        if tape
        else (numbers["causal_buffers"][name] for name in ("rand_ini", "sine_waves"))
    )
    phase = math.pi * (2 * uniform.flatten(1) - 1)
    phase[:, 0] = 0
    noise = noise if noise.size(1) == phase.size(1) else noise.transpose(1, 2)
    return phase.expand(rows, -1), noise[:, :, :samples].expand(rows, -1, -1)


def inputs(numbers: Numbers, recorded: Numbers, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mel spectrograms, starting phases and noise of the first rows."""
    mel = numbers["mel"][:rows]
    return mel, *draws(
        numbers, recorded.get("tape"), len(mel), mel.size(2) * numbers["config"]["hop"]
    )


@pytest.mark.parametrize("name", VOCODERS)
def test_decoder(fixture, close, name):
    numbers = fixture(name)
    net = generator(numbers, numbers["state_dict"])
    close("wave", net.decode(numbers["mel"], numbers["decode"]["s"]), numbers["decode"]["wav"])


@pytest.mark.parametrize("name", VOCODERS)
def test_forward(fixture, close, name):
    numbers = fixture(name)
    net = generator(numbers, numbers["state_dict"])
    modes = [key for key in numbers if key.startswith("forward")]
    assert modes
    for mode in modes:
        mel, *drawn = inputs(numbers, numbers[mode], len(numbers["mel"]))
        wave, f0 = net(mel, *drawn)
        close(f"{mode} wave", wave, numbers[mode]["wav"])
        close(f"{mode} F0", f0, numbers[mode]["f0"])
        close(
            f"{mode} source", net.m_source(f0, *drawn).transpose(1, 2), numbers[mode]["m_source"][0]
        )
        voiced = (f0 > net.m_source.voiced_above).repeat_interleave(net.m_source.hop, dim=1)
        close(f"{mode} voiced", voiced.unsqueeze(2), numbers[mode]["m_source"][2])


@pytest.mark.parametrize("name", VOCODERS)
def test_inference_of_pieces(fixture, close, name):
    """Our source ends with the wave; the original's goes on while F0 is final."""
    numbers = fixture(name)
    net = generator(numbers, numbers["state_dict"])
    modes = [key for key in numbers if key.startswith("inference")]
    assert modes
    for mode in modes:
        recorded = numbers[mode]
        mel, *drawn = inputs(numbers, recorded, len(recorded["wav"]))
        wave, _ = net.speak(mel, *drawn, final=not mode.endswith("finalizeFalse"))
        source = net.m_source(net.f0_predictor(mel), *drawn)
        if (heard := recorded.get("cache_source")) is not None:
            # its source goes on with a phase that begins anew
            source = torch.cat([heard, source[:, :, heard.size(2) :]], dim=2)
            wave = net.decode(mel, source)
        close(f"{mode} wave", wave, recorded["wav"])
        size = wave.size(1)
        close(f"{mode} source", source[:, :, :size], recorded["source"][:, :, :size])


@pytest.mark.parametrize("name", VOCODERS)
def test_f0_in_double_precision(fixture, close, name):
    """The original computes F0 of some families in single precision only."""
    numbers = fixture(name)
    wanted = numbers.get("f0_float64", numbers["forward_trainFalse"]["f0"])
    predictor = copy.deepcopy(generator(numbers, numbers["state_dict"]).f0_predictor)
    close("single", predictor(numbers["mel"][: len(wanted)]), wanted)
    close("double", predictor.double()(numbers["mel"][: len(wanted)].double()), wanted)


def objective_of(numbers: Numbers, over: str) -> Adversarial:
    """Builds the objective with the weights of the original."""
    given = numbers["config"]
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "discriminator": {}}
    for name, tensor in numbers["state_dict"].items():
        network, ours = our_name(name)
        parts[network][ours] = tensor
    discriminator = Discriminators(channels=given["mpd_channels"][1:])
    assert list(discriminator.state_dict()) == list(parts["discriminator"])
    discriminator.load_state_dict(parts["discriminator"])
    spec = given["mel"]
    mel = MelSpectrogram(
        sample_rate=spec["sampling_rate"],
        n_fft=spec["n_fft"],
        hop=spec["hop_size"],
        win=spec["win_size"],
        bins=spec["num_mels"],
        fmin=spec["fmin"],
        fmax=spec["fmax"],
    )
    weights = given["weights"]
    return Adversarial(
        generator(numbers, parts["model"]),
        discriminator=discriminator,
        mel=mel,
        sample_rate=spec["sampling_rate"],
        optimizer=None,
        scheduler=None,
        discriminator_optimizer=None,
        discriminator_scheduler=None,
        mel_weight=weights["mel"],
        feature_weight=weights["fm"],
        tpr_weight=weights["tpr"],
        tau=weights["tau"],
        tpr_over=over,
    )


def batch_of(numbers: Numbers, step: str) -> VocoderBatch:
    given = numbers["batch"]
    rows, samples = given["speech"].shape
    phase, noise = draws(numbers, numbers[step]["tape"], rows, samples)
    return VocoderBatch(
        utts=tuple(str(row) for row in range(rows)),
        wave_BS=given["speech"],
        mel_BFT=given["speech_feat"].transpose(1, 2),
        f0_BT=given["pitch_feat"],
        phase_BH=phase,
        noise_BHS=noise,
    )


TERMS = {
    "D_step": {"loss_disc": "d_adversarial", "loss_tpr": "d_tpr"},
    "G_step": {
        "loss_gen": "adversarial",
        "loss_fm": "feature",
        "loss_mel": "mel",
        "loss_tpr": "tpr",
        "loss_f0": "f0",
    },
}


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize(
    ("step", "turn", "trainable"), [("D_step", 0, "discriminator"), ("G_step", 1, "hifigan")]
)
@pytest.mark.parametrize("name", GANS)
def test_losses_and_gradients(fixture, close, name, step, turn, trainable):
    numbers = fixture(name)
    objective, batch = objective_of(numbers, over="batch"), batch_of(numbers, step)
    recorded = numbers[step]
    # oneDNN's rounding depends on the number of rows, and our discriminators take real and fake
    # waves in one batch
    with torch.backends.mkldnn.flags(enabled=trainable != "discriminator"):
        loss = list(objective.losses(batch))[turn]
        total = loss.scaled({"segments": len(batch)})
        total.backward()
    assert recorded["out"].keys() == {"loss", *TERMS[step]}
    close("loss", total, recorded["out"]["loss"])
    for theirs, ours in TERMS[step].items():
        close(theirs, loss[ours].sum / len(batch), recorded["out"][theirs])
    prefix = {"discriminator": "discriminator", "hifigan": "model"}[trainable]
    norms = {our_name(key): norm for key, norm in recorded["grad_norm"].items()}
    limit = LIMITS.get((name, trainable), LIMIT)
    for key, parameter in objective.trainables[trainable].module.named_parameters():
        assert parameter.grad is not None, key
        close(key, parameter.grad.norm(), norms.pop((prefix, key)), limit)
    assert not any(network == prefix for network, _ in norms)
    for key, other in objective.trainables.items():
        assert key == trainable or all(
            parameter.grad is None for parameter in other.module.parameters()
        )


@pytest.mark.parametrize("name", GANS)
def test_scores_and_feature_maps(fixture, close, name):
    numbers = fixture(name)
    given, discriminator = numbers["disc"], objective_of(numbers, over="row").discriminator
    real, fake = discriminator(given["y"]), discriminator(given["y"] * given["y_hat_scale"])
    for kind, found in (("scores_r", real), ("scores_g", fake)):
        for i, (maps, wanted) in enumerate(zip(found, given[kind], strict=True)):
            close(f"{kind} {i}", maps[-1].flatten(1), wanted)
    for i, (maps, shapes, means) in enumerate(
        zip(real, given["fmap_shapes"], given["fmap_means"], strict=True)
    ):
        assert [tuple(x.shape) for x in maps] == [tuple(shape) for shape in shapes]
        close(f"maps {i}", torch.stack([x.mean() for x in maps]), means)
