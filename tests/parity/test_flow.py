"""The v1 flow model against the original's numbers, with the original's leaks between rows switched on."""

import pytest
import torch

from cosyexp.data.views.flow import FlowBatch
from cosyexp.models.flow.masked_diff import MaskedDiffWithXvec
from cosyexp.models.flow.unet import UNet
from cosyexp.objectives.flow import FlowMatchingLoss
from tests.parity.conftest import encoder


def network(numbers):
    given = numbers["config"]
    unet = given["estimator"]
    net = MaskedDiffWithXvec(
        speech_vocabulary=given["flow"]["vocab_size"],
        speaker_dim=given["flow"]["spk_embed_dim"],
        mel_bins=given["flow"]["output_size"],
        encoder=encoder(given["encoder"], "conformer"),
        regulator_layers=len(given["length_regulator"]["sampling_ratios"]),
        padding="original",
        estimator=UNet(
            mel_bins=given["flow"]["output_size"],
            channels=unet["channels"],
            blocks=unet["n_blocks"],
            mid_blocks=unet["num_mid_blocks"],
            heads=unet["num_heads"],
            head_width=unet["attention_head_dim"],
            dropout=unet["dropout"],
            padding="original",
        ),
    )
    assert list(net.state_dict()) == list(numbers["state_dict"])
    net.load_state_dict(numbers["state_dict"])
    return net


def batch_of(given, tape):
    """The batch with the draws that the original made: prompts row by row, then time, noise, and who keeps the conditions."""
    tape, rows = list(tape), len(given["speech_token"])
    prompts = []
    for _ in range(rows):
        _, coin = tape.pop(0)
        prompts.append(0 if coin < 0.5 else tape.pop(0)[1][2])
    (_, time), (_, noise), (_, keep) = tape
    return FlowBatch(
        utts=tuple(map(str, range(rows))),
        token_BN=given["speech_token"],
        token_lens_B=given["speech_token_len"].long(),
        speaker_BE=given["embedding"],
        mel_BFT=given["speech_feat"].transpose(1, 2),
        mel_lens_B=given["speech_feat_len"].long(),
        time_B=time.flatten(),
        noise_BFT=noise,
        prompt_lens_B=torch.tensor(prompts),
        keep_B=(keep > 0.2).float(),
    )


@pytest.mark.parametrize("seed", [100, 101, 103])
def test_loss_and_gradients(fixture, close, seed):
    numbers = fixture("flow_v1")
    recorded = numbers[f"train_seed{seed}"]
    net, batch = network(numbers), batch_of(numbers["batch"], recorded["tape"])
    objective = FlowMatchingLoss(net, optimizer=None, scheduler=None, guidance=0.7)
    # the original divides by frames times bands
    loss = next(objective.turns(batch)).scaled({"frames": objective.weights(batch)["frames"]})
    loss.backward()
    close("loss", loss, recorded["out"]["loss"])
    for name, parameter in net.named_parameters():
        close(name, parameter.grad.norm(), recorded["grad_norm"][name])
        if "grads" in recorded:
            torch.testing.assert_close(parameter.grad, recorded["grads"][name], rtol=1e-3, atol=1e-4)


def test_encoder_and_length_regulator(fixture, close):
    numbers = fixture("flow_v1")
    captured, given = numbers["train_seed100"]["captured"], numbers["batch"]
    net, lens = network(numbers), given["speech_feat_len"].long()
    mu, speaker = net.encode(
        given["speech_token"], given["speech_token_len"].long(), given["embedding"], given["speech_feat"].size(1), lens
    )
    close("length regulator", mu.transpose(1, 2), captured["length_regulator_out"][0])
    assert speaker.shape == (len(lens), 80)


@torch.no_grad()
def test_estimator(fixture, close):
    numbers = fixture("flow_v1")
    given = numbers["estimator"]
    found = network(numbers).eval().decoder(*(given[name] for name in ("x", "mask", "mu", "t", "spks", "cond")))
    valid = given["mask"].bool().expand_as(found)
    close("velocity", found[valid], given["out_streamingFalse"][valid])
