"""The flow model: from tokens to frames, rows apart, and the way from noise to mel."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from cosyexp.models.flow.length_regulator import stretch
from cosyexp.models.flow.masked_diff import MaskedDiffWithXvec
from cosyexp.models.flow.matching import euler, guided, probability_path
from cosyexp.models.flow.unet import UNet
from cosyexp.models.layers.encoder import Encoder
from cosyexp.models.layers.norm import MaskedGroupNorm

TOKENS, SPEAKER, BINS = 20, 6, 8
FRAMES = torch.tensor([16, 9, 1, 13])


def mask_of(lengths, size=None):
    return (torch.arange(size or int(lengths.max())) < lengths[:, None]).unsqueeze(1)


# layers


@pytest.mark.parametrize(("tokens", "frames"), [(5, 8), (8, 5), (7, 7), (1, 4), (6, 1), (50, 173)])
def test_stretching_is_linear_interpolation(tokens, frames):
    x = torch.randn(2, 3, tokens)
    wanted = functional.interpolate(x, size=frames, mode="linear", align_corners=False)
    found = stretch(x, torch.tensor([tokens] * 2), frames, torch.tensor([frames] * 2))
    assert_close(found, wanted, rtol=0, atol=1e-5)


def test_each_row_is_stretched_by_its_own_lengths():
    tokens, frames = torch.tensor([5, 9, 2]), torch.tensor([12, 7, 4])
    x = torch.randn(3, 4, 9)
    found = stretch(x, tokens, 12, frames)
    for row, (n, t) in enumerate(zip(tokens.tolist(), frames.tolist(), strict=True)):
        wanted = functional.interpolate(x[row : row + 1, :, :n], size=t, mode="linear", align_corners=False)
        assert_close(found[row : row + 1, :, :t], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_masked_group_norm_without_padding_is_a_group_norm(groups):
    ours, theirs = MaskedGroupNorm(groups, 8).double(), nn.GroupNorm(groups, 8).double()
    with torch.no_grad():
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(other.copy_(torch.randn(8)))
    x = 3 * torch.randn(2, 8, 11, dtype=torch.float64) + 5
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours(x, torch.ones(2, 1, 11)), theirs(x), rtol=0, atol=1e-12)


def test_a_masked_group_norm_counts_a_row_s_own_frames():
    norm, x = MaskedGroupNorm(2, 8).double(), torch.randn(4, 8, 16, dtype=torch.float64)
    x = torch.where(mask_of(FRAMES), x, 1e3)
    found = norm(x, mask_of(FRAMES).double())
    for row, frames in enumerate(FRAMES.tolist()):
        assert_close(found[row : row + 1, :, :frames], functional.group_norm(x[row : row + 1, :, :frames], 2), rtol=0, atol=1e-9)


def test_channels_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="10 channels do not divide into 4 groups"):
        MaskedGroupNorm(4, 10)


# the network


def network(padding="own", blocks=1, channels=(8, 16)):
    torch.manual_seed(0)
    encoder = Encoder(16, width=16, heads=2, hidden=24, blocks=1, dropout=0.0)
    unet = UNet(mel_bins=BINS, channels=channels, blocks=blocks, mid_blocks=1, heads=2, head_width=4, padding=padding)
    net = MaskedDiffWithXvec(
        speech_vocabulary=TOKENS,
        speaker_dim=SPEAKER,
        mel_bins=BINS,
        encoder=encoder,
        estimator=unet,
        regulator_layers=2,
        padding=padding,
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # what would leak out of a masked frame
    return net.double().eval()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "token_BN": torch.randint(TOKENS, (4, 9), generator=draw),
        "token_lens_B": torch.tensor([9, 4, 1, 7]),
        "speaker_BE": normal(4, SPEAKER),
        "noisy_BFT": normal(4, BINS, 16),
        "mel_lens_B": FRAMES,
        "t_B": torch.rand(4, generator=draw, dtype=torch.float64),
        "prompt_BFT": normal(4, BINS, 16) * mask_of(torch.tensor([4, 0, 0, 3]), 16),
        "keep_B": torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64),
    }


def row_alone(batch, row):
    alone = {name: x[row : row + 1] for name, x in batch.items()}
    tokens, frames = int(alone["token_lens_B"]), int(alone["mel_lens_B"])
    sizes = {"token_BN": tokens, "noisy_BFT": frames, "prompt_BFT": frames}
    return {name: x[..., : sizes[name]] if name in sizes else x for name, x in alone.items()}


@pytest.mark.parametrize(("blocks", "channels"), [(1, (8, 16)), (0, (8, 8)), (2, (8, 8, 16))])
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(batch, blocks, channels):
    net = network(blocks=blocks, channels=channels)
    together = net(**batch)
    assert together.shape == batch["noisy_BFT"].shape
    for row, frames in enumerate(FRAMES.tolist()):
        assert_close(net(**row_alone(batch, row))[0], together[row, :, :frames], rtol=0, atol=1e-9)
        assert not together[row, :, frames:].any()


@torch.no_grad()
def test_what_is_padded_changes_nothing(batch):
    net = network()
    other = {name: x.clone() for name, x in batch.items()}
    other["noisy_BFT"][~mask_of(FRAMES).expand_as(other["noisy_BFT"])] = 7.0
    other["prompt_BFT"][~mask_of(FRAMES).expand_as(other["prompt_BFT"])] = 7.0
    other["token_BN"][~mask_of(batch["token_lens_B"]).squeeze(1)] = TOKENS - 1
    assert_close(net(**other), net(**batch), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_original_s_padding_mixes_rows(batch):
    net = network("original")
    alone, together = net(**row_alone(batch, 1))[0], net(**batch)[1, :, :9]
    assert (alone - together).abs().max() > 1e-3


def test_a_padding_of_another_name_is_refused():
    with pytest.raises(ValueError, match="padding='none' is neither"):
        network("none")


@torch.no_grad()
def test_guidance_drops_all_conditions(batch):
    net, before = network(), network()(**batch)
    other = {**batch, "token_BN": (batch["token_BN"] + 1) % TOKENS, "speaker_BE": batch["speaker_BE"].flip(0)}
    other["prompt_BFT"] = batch["prompt_BFT"] + mask_of(FRAMES)
    after = net(**other)
    assert torch.equal(after[3], before[3])
    assert all((after[row] != before[row]).any() for row in range(2))


@pytest.mark.parametrize("name", ["token_BN", "speaker_BE", "noisy_BFT", "prompt_BFT", "t_B"])
@torch.no_grad()
def test_the_velocity_depends_on_every_input(batch, name):
    net = network()
    other = (batch[name] + 1) % TOKENS if name == "token_BN" else batch[name] * 0.5 + torch.rand_like(batch[name])
    changed = (net(**{**batch, name: other}) != net(**batch)).flatten(1).any(1)
    assert changed[:2].all()  # of one frame, a group norm leaves nothing


# from noise to mel


def test_the_path_leads_from_noise_to_mel_at_the_speed_that_it_says():
    mel, noise = torch.randn(2, 3, BINS, 5, dtype=torch.float64)
    start, velocity = probability_path(mel, noise, torch.zeros(3, dtype=torch.float64))
    end, _ = probability_path(mel, noise, torch.ones(3, dtype=torch.float64))
    assert torch.equal(start, noise)
    assert_close(end, mel, rtol=0, atol=1e-5)
    time = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    later, earlier = (probability_path(mel, noise, time + step)[0] for step in (1e-4, -1e-4))
    assert_close((later - earlier) / 2e-4, velocity, rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_straight_way_is_followed_exactly(steps):
    mel, noise = torch.randn(2, 3, BINS, 5, dtype=torch.float64)
    found = euler(lambda y, t: probability_path(mel, noise, t)[1], noise, steps)
    assert_close(found, mel, rtol=0, atol=1e-5)


def test_a_linear_field_is_integrated_with_an_error_of_first_order():
    noise = torch.randn(2, BINS, 5, dtype=torch.float64)
    wanted = noise * math.exp(-1) + (1 - math.exp(-1)) * 3
    errors = [float((euler(lambda y, t: 3 - y, noise, steps) - wanted).abs().max()) for steps in (50, 100, 200)]
    assert errors[2] < 1e-2 and all(1.9 < large / small < 2.1 for large, small in pairwise(errors))


def test_times_run_from_0_and_are_dense_near_the_noise():
    times = []

    def velocity(y, t):
        assert t.shape == (2,) and t.dtype == y.dtype
        times.append(t[0].item())
        return torch.zeros_like(y)

    euler(velocity, torch.zeros(2, BINS, 5), 10)
    steps = [b - a for a, b in pairwise(times)]
    assert len(times) == 10 and times[0] == 0 and times[-1] < 1 and steps == sorted(steps)


def test_guidance_goes_from_the_unconditional_beyond_the_conditional():
    conditional, unconditional = torch.randn(2, 3, BINS, 5)
    assert torch.equal(guided(conditional, unconditional, 0.0), conditional)
    assert_close(guided(conditional, unconditional, 0.7), conditional + 0.7 * (conditional - unconditional))
