"""The v1 vocoder and its discriminators against the original's numbers."""

import math

import pytest

from cosyexp.data.views.hifigan import VocoderBatch
from cosyexp.models.hifigan.discriminators import Discriminators
from cosyexp.models.hifigan.generator import F0Predictor, HiFTGenerator
from cosyexp.models.hifigan.source import HarmonicSource
from cosyexp.models.layers.spectrogram import MelSpectrogram
from cosyexp.objectives.adversarial import Adversarial


def generator(numbers, weights):
    given, hop = numbers["config"]["hift"], numbers["config"]["hop"]
    mel_bins = given["in_channels"]
    net = HiFTGenerator(
        mel_bins=mel_bins,
        channels=given["base_channels"],
        rates=given["upsample_rates"],
        kernels=given["upsample_kernel_sizes"],
        resblock_kernels=given["resblock_kernel_sizes"],
        source_kernels=given["source_resblock_kernel_sizes"],
        dilations=given["resblock_dilation_sizes"][0],
        n_fft=given["istft_params"]["n_fft"],
        n_hop=given["istft_params"]["hop_len"],
        f0=F0Predictor(mel_bins=mel_bins, channels=numbers["config"]["f0"]["cond_channels"]),
        source=HarmonicSource(
            sample_rate=given["sampling_rate"],
            hop=hop,
            harmonics=given["nb_harmonics"] + 1,
            amplitude=given["nsf_alpha"],
            noise_std=given["nsf_sigma"],
            voiced_above=given["nsf_voiced_threshold"],
        ),
    )
    assert list(net.state_dict()) == list(weights)
    net.load_state_dict(weights)
    return net


def draws(tape):
    """Starting phases and noise, from the original's uniform and normal draws."""
    phase = math.pi * (2 * tape[0][1].squeeze(2) - 1)
    phase[:, 0] = 0
    return phase, tape[1][1]


def test_decoder_and_forward(fixture, close):
    numbers = fixture("hift_v1")
    net = generator(numbers, numbers["state_dict"])
    close("decode", net.decode(numbers["mel"], numbers["decode"]["s"]), numbers["decode"]["wav"])
    for mode in ("forward_trainTrue", "forward_trainFalse"):
        wave, f0 = net(numbers["mel"], *draws(numbers[mode]["tape"]))
        close(f"{mode} wave", wave, numbers[mode]["wav"])
        close(f"{mode} F0", f0, numbers[mode]["f0"])
        source = net.m_source(f0, *draws(numbers[mode]["tape"]))
        close(f"{mode} source", source.transpose(1, 2), numbers[mode]["m_source"][0])


def test_inference_of_one_row(fixture, close):
    numbers = fixture("hift_v1")
    net = generator(numbers, numbers["state_dict"])
    wave, _ = net(numbers["mel"][:1], *draws(numbers["inference"]["tape"]))
    close("wave", wave, numbers["inference"]["wav"])


def game(numbers, over):
    """The objective on the original's batch, with the original's draws for the given turn."""
    given, parts = numbers["config"], {"generator.": {}, "discriminator.": {}}
    for name, tensor in numbers["state_dict"].items():
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        parts[prefix][modern(name.removeprefix(prefix))] = tensor
    judges = Discriminators(channels=given["mpd_channels"][1:])
    assert set(judges.state_dict()) == set(parts["discriminator."])
    judges.load_state_dict(parts["discriminator."])
    spec = given["mel"]
    mel = MelSpectrogram(
        sample_rate=spec["sampling_rate"], n_fft=spec["n_fft"], hop=spec["hop_size"], win=spec["win_size"], bins=spec["num_mels"]
    )
    rules = given["weights"]
    return Adversarial(
        generator(numbers, parts["generator."]),
        discriminator=judges,
        mel=mel,
        sample_rate=spec["sampling_rate"],
        **dict.fromkeys(("optimizer", "scheduler", "discriminator_optimizer", "discriminator_scheduler")),
        mel_weight=rules["mel"],
        feature_weight=rules["fm"],
        tpr_weight=rules["tpr"],
        tau=rules["tau"],
        tpr_over=over,
    )


def modern(name):
    """The period discriminators have weight norm under its old names in official files."""
    return name.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1")


def batch_of(numbers, step):
    given = numbers["batch"]
    phase, noise = draws(numbers[step]["tape"])
    return VocoderBatch(
        utts=("a", "b"),
        wave_BS=given["speech"],
        mel_BFT=given["speech_feat"].transpose(1, 2),
        f0_BT=given["pitch_feat"],
        phase_BH=phase,
        noise_BHS=noise,
    )


@pytest.mark.parametrize(("step", "turn", "player"), [("D_step", 0, "discriminator"), ("G_step", 1, "hifigan")])
def test_losses_and_gradients(fixture, close, step, turn, player):
    numbers = fixture("hifigan_v1")
    objective, recorded = game(numbers, over="batch"), numbers[step]
    loss = list(objective.turns(batch_of(numbers, step)))[turn]
    total = loss.scaled({"segments": 2})
    total.backward()
    names = {"loss_disc": "d_adversarial", "loss_gen": "adversarial", "loss_fm": "feature", "loss_mel": "mel", "loss_f0": "f0"}
    names["loss_tpr"] = "tpr" if turn else "d_tpr"
    for name, wanted in recorded["out"].items():
        close(name, total if name == "loss" else loss[names[name]].sum / 2, wanted)
    prefix = {"discriminator": "discriminator.", "hifigan": "generator."}[player]
    recorded_norms = {modern(name): norm for name, norm in recorded["grad_norm"].items()}
    for name, parameter in objective.players[player].module.named_parameters():
        close(name, parameter.grad.norm(), recorded_norms[prefix + name])
    for name, other in objective.players.items():
        assert name == player or all(parameter.grad is None for parameter in other.module.parameters())


def test_scores(fixture, close):
    numbers = fixture("hifigan_v1")
    given, judges = numbers["disc"], game(numbers, over="row").discriminator
    for wave, scores in ((given["y"], "scores_r"), (given["y"] * given["y_hat_scale"], "scores_g")):
        for i, (maps, wanted) in enumerate(zip(judges(wave), given[scores], strict=True)):
            close(f"{scores} {i}", maps[-1].flatten(1), wanted)
