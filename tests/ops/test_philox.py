"""The dropout contract: the published Philox vectors, and what makes a mask independent."""

import pytest
import torch

from glmkern.ops.philox import check_dropout, keep_mask, philox4x32


@pytest.mark.parametrize(
    ("key", "counter", "lanes"),
    [
        # Known answers of Random123 for philox4x32-10.
        (0, (0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (-1, -1, -1), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x0370734413198A2E),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key, counter, lanes):
    first, second, offset = counter
    result = philox4x32(torch.tensor([key, offset]), torch.tensor(first), torch.tensor(second))
    assert tuple(result.tolist()) == lanes


def test_a_sequence_keeps_its_mask_wherever_it_stands():
    seed = torch.tensor([5, 9])
    alone = keep_mask(seed, torch.tensor([7]), 50, 0.3)
    among = keep_mask(seed, torch.tensor([3, 7, 1]), 50, 0.3)
    assert torch.equal(alone[0], among[1])
    assert torch.equal(keep_mask(seed, torch.tensor([7]), 21, 0.3)[0], alone[0, :21])


def test_masks_differ_between_sequences_offsets_and_seeds():
    masks = [
        keep_mask(torch.tensor([seed, offset]), torch.tensor([sequence]), 256, 0.5)
        for seed, offset, sequence in [
            (1, 0, 0),
            (1, 0, 1),
            (1, 1, 0),
            (1, 1 << 48, 0),
            (2, 0, 0),
            (1 << 33, 0, 0),
        ]
    ]
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            assert 64 < (a ^ b).sum() < 192


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_kept_elements(p):
    count = 200_000
    kept = keep_mask(torch.tensor([int(p * 100), 3]), torch.tensor([0]), count, p).sum().item()
    sigma = (count * p * (1 - p)) ** 0.5
    assert abs(kept - count * (1 - p)) < 4 * sigma


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_probability_out_of_range(p):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), not"):
        check_dropout("op", torch.zeros(1), p, torch.tensor([0, 0]))


@pytest.mark.parametrize("seed", [None, torch.tensor([1]), torch.tensor([1.0, 2.0])])
def test_seed_must_fit(seed):
    with pytest.raises(ValueError, match=r"dropout needs seed, an int64 tensor \[2\]"):
        check_dropout("op", torch.zeros(1), 0.5, seed)


def test_seed_must_be_on_the_device_of_the_input():
    with pytest.raises(ValueError, match="seed is on meta but the input is on cpu"):
        check_dropout("op", torch.zeros(1), 0.5, torch.zeros(2, dtype=torch.int64, device="meta"))
