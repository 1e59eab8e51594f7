"""The flow models give the numbers of the original, and have the keys of its weights.

`padding="original"` switches on the original's leaks between the rows of a batch.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cosyexp.data.collators.flow import FlowBatch
from cosyexp.models.flow.dit import DiT
from cosyexp.models.flow.generate import FlowStream, generate
from cosyexp.models.flow.masked_diff import (
    CausalMaskedDiffWithDiT,
    CausalMaskedDiffWithXvec,
    MaskedDiffWithXvec,
)
from cosyexp.models.flow.unet import UNet
from cosyexp.models.flow.upsampling import UpsamplingEncoder
from cosyexp.objectives.flow import FlowMatchingLoss
from tests.parity.conftest import encoder
from tests.support import flow_runners

Numbers = dict[str, Any]  # a recording of the original
FIXTURES = pytest.mark.parametrize("name", ["flow_v1", "flow_v2", "flow_v3"])
UP_BLOCKS = 4  # the original has no argument for it


def unet(given: Numbers, causal: bool) -> UNet:
    return UNet(
        mel_bins=given["out_channels"],
        channels=given["channels"],
        blocks=given["n_blocks"],
        mid_blocks=given["num_mid_blocks"],
        heads=given["num_heads"],
        head_width=given["attention_head_dim"],
        dropout=given["dropout"],
        causal=causal,
        chunk=given.get("static_chunk_size", 0),
        padding="original",
    )


def v1(given: Numbers, shared: Numbers) -> nn.Module:
    tokens = 20
    return MaskedDiffWithXvec(
        **shared,
        encoder=encoder(given["encoder"], "conformer"),
        estimator=unet(given["estimator"], causal=False),
        regulator_layers=len(given["length_regulator"]["sampling_ratios"]),
        edge_tokens=tokens,
        edge_frames=int(tokens / given["flow"]["input_frame_rate"] * 22050 / 256),
        padding="original",
    )


def v2(given: Numbers, shared: Numbers) -> nn.Module:
    arguments = given["encoder"]
    upsampling = UpsamplingEncoder(
        width=arguments["output_size"],
        heads=arguments["attention_heads"],
        hidden=arguments["linear_units"],
        blocks=arguments["num_blocks"],
        up_blocks=UP_BLOCKS,
        factor=given["flow"]["token_mel_ratio"],
        look_ahead=given["flow"]["pre_lookahead_len"],
        chunk=arguments["static_chunk_size"],
        dropout=arguments["dropout_rate"],
        attention_dropout=arguments["attention_dropout_rate"],
        padding="original",
    )
    return CausalMaskedDiffWithXvec(
        **shared, encoder=upsampling, estimator=unet(given["estimator"], causal=True)
    )


def v3(given: Numbers, shared: Numbers) -> nn.Module:
    arguments = given["estimator"]
    dit = DiT(
        mel_bins=arguments["mel_dim"],
        width=arguments["dim"],
        blocks=arguments["depth"],
        heads=arguments["heads"],
        head_width=arguments["dim_head"],
        hidden=arguments["dim"] * arguments["ff_mult"],
        chunk=arguments["static_chunk_size"],
        dropout=arguments["dropout"],
    )
    return CausalMaskedDiffWithDiT(
        **shared,
        frames_per_token=given["flow"]["token_mel_ratio"],
        look_ahead=given["pre_lookahead_layer"]["pre_lookahead_len"],
        hidden=given["pre_lookahead_layer"]["channels"],
        estimator=dit,
    )


def network(name: str, numbers: Numbers) -> Any:
    """Builds the network with the weights of the original."""
    given = numbers["config"]
    shared = {
        "speech_vocabulary": given["flow"]["vocab_size"],
        "speaker_dim": given["flow"]["spk_embed_dim"],
        "mel_bins": given["flow"]["output_size"],
    }
    net = {"flow_v1": v1, "flow_v2": v2, "flow_v3": v3}[name](given, shared)
    assert list(net.state_dict()) == list(numbers["state_dict"])
    net.load_state_dict(numbers["state_dict"])
    return net


def batch_of(given: Numbers, recorded: Iterable[tuple[str, Any]], drop: float) -> FlowBatch:
    """Makes the batch with the random numbers that the original drew.

    They are: whether all rows stream (in families that can), the prompt of each row, the times, the
    noise, and which rows keep their conditions.
    """
    tape, rows = list(recorded), len(given["speech_token"])
    coins = sum(kind == "random.random" for kind, _ in tape)
    streaming = coins > rows and tape.pop(0)[1] < 0.5
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
        keep_B=(keep > drop).float(),
        streaming_B=torch.full((rows,), streaming),
    )


def capture(net: Any) -> dict[str, Any]:
    """Records the inputs of the estimator and the outputs of other parts in the forward pass.

    Their names are those of the fixtures.
    """
    seen: dict[str, Any] = {}

    def record(name: str, change: Callable[[Any], Any] = lambda x: x) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({name: change(output)})

    parts = {
        "encoder": "encoder_out",
        "pre_lookahead_layer": "pre_lookahead_out",
        "decoder.estimator": "estimator_out",
    }
    for part, module in net.named_modules():
        if part in parts:
            module.register_forward_hook(record(parts[part]))
        if part == "length_regulator":
            module.register_forward_hook(
                record("length_regulator_out", lambda x: x.transpose(1, 2))
            )
    net.decoder.estimator.register_forward_pre_hook(
        lambda module, inputs: seen.update(estimator_in=inputs)
    )
    return seen


def recordings(numbers: Numbers, kind: str) -> Numbers:
    return {key: value for key, value in numbers.items() if key.startswith(f"{kind}_seed")}


@FIXTURES
def test_losses_gradients_and_intermediates(fixture, close, name):
    numbers = fixture(name)
    steps = {**recordings(numbers, "train"), **recordings(numbers, "eval")}
    assert steps
    for key, recorded in steps.items():
        net = network(name, numbers).train(recorded["train"])
        batch = batch_of(
            numbers["batch"], recorded["tape"], numbers["config"]["cfm"]["training_cfg_rate"]
        )
        seen = capture(net)
        objective = FlowMatchingLoss(net, optimizer=None, scheduler=None, guidance=0.7)
        # the original divides by frames times bands
        loss = next(objective.losses(batch)).scaled(
            {"frames": objective.count_units(batch)["frames"]}
        )
        close(f"{key} loss", loss, recorded["out"]["loss"])
        for part, wanted in recorded.get("captured", {}).items():
            if part == "estimator_kw":
                assert batch.streaming_B.tolist() == [wanted["streaming"]] * len(batch)
            elif part == "estimator_in":
                for i, (found, given) in enumerate(zip(seen[part], wanted, strict=False)):
                    close(f"{key} {part} {i}", found, given)
            else:
                close(
                    f"{key} {part}", seen[part], wanted[0] if isinstance(wanted, tuple) else wanted
                )
        if "grad_norm" not in recorded:
            continue
        loss.backward()
        gradients = {parameter: x.grad for parameter, x in net.named_parameters()}
        assert gradients.keys() == recorded["grad_norm"].keys()
        for parameter, gradient in gradients.items():
            close(f"{key} norm of {parameter}", gradient.norm(), recorded["grad_norm"][parameter])
            if "grads" in recorded:
                close(f"{key} gradient of {parameter}", gradient, recorded["grads"][parameter])
        close(
            f"{key} norm",
            torch.stack([x.norm() for x in gradients.values()]).norm(),
            recorded["total_grad_norm"],
        )


@FIXTURES
@torch.no_grad()
def test_estimator(fixture, close, name):
    numbers = fixture(name)
    given, net = numbers["estimator"], network(name, numbers).eval()
    wanted = {
        key.removeprefix("out_streaming") == "True": value
        for key, value in given.items()
        if key.startswith("out_streaming")
    }
    assert wanted
    for streaming, velocity in wanted.items():
        found = net.decoder(
            *(given[x] for x in ("x", "mask", "mu", "t", "spks", "cond")),
            torch.full((len(velocity),), streaming),
        )
        close(f"streaming {streaming}", found, velocity)
        if not streaming:
            close(
                "plain",
                net.decoder(*(given[x] for x in ("x", "mask", "mu", "t", "spks", "cond"))),
                velocity,
            )


def synthesize(
    name: str, numbers: Numbers, noise: Tensor, *, streaming: bool = False, final: bool = True
) -> Tensor:
    """Generates the mel spectrogram of the recorded input."""
    given, net = numbers["inference_input"], network(name, numbers).eval()
    options: dict[str, Any] = {
        "prompt_token_BP": given["prompt_token"],
        "prompt_mel_BFQ": given["prompt_feat"].transpose(1, 2),
        "guidance": numbers["config"]["cfm"]["inference_cfg_rate"],
    }
    if streaming:
        stream = FlowStream(net, given["embedding"], lambda frames: noise[:, :, :frames], **options)
        return stream(given["token"], final)
    return generate(*flow_runners(net), given["token"], given["embedding"], noise, **options)


def test_synthesis_of_v1_with_a_prompt(fixture, close):
    numbers = fixture("flow_v1")
    ((_, noise),) = numbers["inference"]["tape"]
    close("mel", synthesize("flow_v1", numbers, noise), numbers["inference"]["mel"])


@pytest.mark.parametrize("name", ["flow_v2", "flow_v3"])
def test_synthesis_with_a_prompt_in_chunks_and_unfinished(fixture, close, name):
    numbers = fixture(name)
    (noise,) = (value for key, value in numbers.items() if key.startswith("rand_noise"))
    prompt = numbers["inference_input"]["prompt_feat"].size(1)
    wanted = {key: value for key, value in numbers.items() if key.startswith("inference_streaming")}
    assert wanted
    for key, mel in wanted.items():  # unfinished, the last tokens have no frames
        found = synthesize(
            name,
            numbers,
            noise[:, :, : prompt + mel.size(2)],
            streaming="streamingTrue" in key,
            final="finalizeTrue" in key,
        )
        close(key, found, mel)
