"""Masks at the token resolution of a layer."""

import pytest
import torch

from sa_inject.core.masks import downsample_mask, token_mask


def test_token_weight_is_the_covered_share_of_its_area():
    mask = torch.zeros(8, 4)
    mask[:4, :2] = 1  # token (0, 0) whole
    mask[4:6, 2:] = 1  # token (1, 1) half
    torch.testing.assert_close(downsample_mask(mask, 2, 2), torch.tensor([1.0, 0.0, 0.0, 0.5]))


def test_weights_run_row_by_row():
    mask = torch.zeros(6, 9)
    mask[2:4, 6:] = 1
    assert downsample_mask(mask, 3, 3).nonzero().flatten().tolist() == [5]


def test_mask_coarser_than_the_tokens_is_spread():
    mask = torch.tensor([[1.0, 0.0], [0.25, 0.0]])
    weights = downsample_mask(mask, 4, 4).view(4, 4)
    assert torch.equal(weights, mask.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_half_precision_and_whole_number_masks_are_averaged_alike():
    mask = (torch.arange(30).view(5, 6) % 3 == 0).int()
    torch.testing.assert_close(downsample_mask(mask, 2, 3), downsample_mask(mask.half(), 2, 3))
    assert downsample_mask(mask, 2, 3).dtype == torch.float32


def test_token_is_kept_from_half_of_its_area_on():
    mask = torch.zeros(4, 6)
    mask[:2, :2] = 1  # whole
    mask[:2, 2] = 1  # half
    mask[0, 4] = 1  # a quarter
    assert token_mask(mask, 2, 3).tolist() == [True, True, False, False, False, False]


def test_small_subject_keeps_the_one_token_that_it_covers_best():
    mask = torch.zeros(16, 16)
    mask[13, 3:6] = 1  # one cell in token (3, 0), two in token (3, 1)
    assert token_mask(mask, 4, 4).nonzero().flatten().tolist() == [13]


def test_empty_mask_keeps_one_token():
    assert token_mask(torch.zeros(8, 8), 2, 2).sum() == 1


def test_full_mask_keeps_all():
    assert bool(token_mask(torch.ones(5, 7), 3, 2).all())


@pytest.mark.parametrize("grey", [0.1, 0.3, 0.49])
@pytest.mark.parametrize("size", [(8, 8), (13, 7), (64, 48), (5, 300)])
def test_all_tokens_that_a_faint_mask_covers_best_are_kept(grey, size):
    """A mask of one grey says of no token more than of another, whatever size it has."""
    assert bool(token_mask(torch.full(size, grey), 4, 6).all())


def test_two_equal_spots_that_reach_no_half_are_both_kept():
    mask = torch.zeros(16, 16)
    mask[1, 1:4] = mask[13, 9:12] = 1
    assert token_mask(mask, 4, 4).nonzero().flatten().tolist() == [0, 14]


def test_masks_of_a_batch_are_read_each_by_itself():
    masks = torch.stack([torch.ones(8, 8), torch.zeros(8, 8), torch.full((8, 8), 0.4), torch.zeros(8, 8)])
    masks[3, 6, 1] = 0.2
    together = token_mask(masks, 4, 4)
    assert together.shape == (4, 16)
    assert together.sum(-1).tolist() == [16, 1, 16, 1]
    for mask, kept in zip(masks, together, strict=True):
        assert torch.equal(token_mask(mask, 4, 4), kept)
    assert torch.equal(token_mask(masks[:, None], 4, 4), together[:, None])
