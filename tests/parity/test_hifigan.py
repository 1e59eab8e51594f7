"""The vocoders and their discriminators against the original's numbers, for whatever folders there are."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch

from cosyexp.data.collators.hifigan import VocoderBatch
from cosyexp.models.hifigan.discriminators import Discriminators
from cosyexp.models.hifigan.generator import F0Predictor, HiFTGenerator
from cosyexp.models.hifigan.source import HarmonicSource
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.objectives.adversarial import Adversarial
from cosyexp.run.weights import our_name


def folders(kind):
    root = os.environ.get("COSYEXP_PARITY")
    return (
        sorted(path.parent.name for path in Path(root).glob(f"{kind}_*/fixture.pt")) if root else []
    )


VOCODERS, GAMES = folders("hift"), folders("hifigan")
F0_LOOK_AHEAD = 3  # of the original's causal predictor


def generator(numbers, weights):
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


def draws(numbers, tape, rows, samples):
    """Starting phases and noise: the original's uniform and normal draws, or where it made none, its fixed ones."""
    uniform, noise = (
        (tape[0][1], tape[1][1])
        if tape
        else (numbers["causal_buffers"][name] for name in ("rand_ini", "sine_waves"))
    )
    phase = math.pi * (2 * uniform.flatten(1) - 1)
    phase[:, 0] = 0
    noise = noise if noise.size(1) == phase.size(1) else noise.transpose(1, 2)
    return phase.expand(rows, -1), noise[:, :, :samples].expand(rows, -1, -1)


def of(numbers, recorded, rows):
    """The inputs of the first rows of a vocoder's mel."""
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
    for mode in [key for key in numbers if key.startswith("forward")]:
        mel, *drawn = of(numbers, numbers[mode], len(numbers["mel"]))
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
    """The original returns the excitation of all frames whose F0 is sure, ours of those whose wave is."""
    numbers = fixture(name)
    net = generator(numbers, numbers["state_dict"])
    for mode in [key for key in numbers if key.startswith("inference")]:
        recorded = numbers[mode]
        wave, source = net.speak(
            *of(numbers, recorded, len(recorded["wav"])),
            heard_B1S=recorded.get("cache_source"),
            final=not mode.endswith("finalizeFalse"),
        )
        close(f"{mode} wave", wave, recorded["wav"])
        close(f"{mode} source", source, recorded["source"][:, :, : wave.size(1)])


@pytest.mark.parametrize("name", VOCODERS)
def test_f0_in_double_precision(fixture, close, name):
    """Of some families the original's stays in single precision."""
    numbers = fixture(name)
    wanted = numbers.get("f0_float64", numbers["forward_trainFalse"]["f0"])
    predictor = copy.deepcopy(generator(numbers, numbers["state_dict"]).f0_predictor)
    close("single", predictor(numbers["mel"][: len(wanted)]), wanted)
    close("double", predictor.double()(numbers["mel"][: len(wanted)].double()), wanted)


def iterator(numbers, over):
    """The objective with the original's weights."""
    given, parts = numbers["config"], {"model": {}, "discriminator": {}}
    for name, tensor in numbers["state_dict"].items():
        network, ours = our_name(name)
        parts[network][ours] = tensor
    judges = Discriminators(channels=given["mpd_channels"][1:])
    assert list(judges.state_dict()) == list(parts["discriminator"])
    judges.load_state_dict(parts["discriminator"])
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
    rules = given["weights"]
    return Adversarial(
        generator(numbers, parts["model"]),
        discriminator=judges,
        mel=mel,
        sample_rate=spec["sampling_rate"],
        **dict.fromkeys(
            ("optimizer", "scheduler", "discriminator_optimizer", "discriminator_scheduler")
        ),
        mel_weight=rules["mel"],
        feature_weight=rules["fm"],
        tpr_weight=rules["tpr"],
        tau=rules["tau"],
        tpr_over=over,
    )


def batch_of(numbers, step):
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
@pytest.mark.parametrize("name", GAMES)
def test_losses_and_gradients(fixture, close, name, step, turn, trainable):
    numbers = fixture(name)
    objective, recorded, batch = (
        iterator(numbers, over="batch"),
        numbers[step],
        batch_of(numbers, step),
    )
    # oneDNN's rounding depends on the number of rows, and our discriminators judge real and fake ones at once
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
    for key, parameter in objective.trainables[trainable].module.named_parameters():
        close(key, parameter.grad.norm(), norms.pop((prefix, key)))
    assert not any(network == prefix for network, _ in norms)
    for key, other in objective.trainables.items():
        assert key == trainable or all(
            parameter.grad is None for parameter in other.module.parameters()
        )


@pytest.mark.parametrize("name", GAMES)
def test_scores_and_feature_maps(fixture, close, name):
    numbers = fixture(name)
    given, judges = numbers["disc"], iterator(numbers, over="row").discriminator.module
    real, fake = judges(given["y"]), judges(given["y"] * given["y_hat_scale"])
    for kind, found in (("scores_r", real), ("scores_g", fake)):
        for i, (maps, wanted) in enumerate(zip(found, given[kind], strict=True)):
            close(f"{kind} {i}", maps[-1].flatten(1), wanted)
    for i, (maps, shapes, means) in enumerate(
        zip(real, given["fmap_shapes"], given["fmap_means"], strict=True)
    ):
        assert [tuple(x.shape) for x in maps] == [tuple(shape) for shape in shapes]
        close(f"maps {i}", torch.stack([x.mean() for x in maps]), means)
