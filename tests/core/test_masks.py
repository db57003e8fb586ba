"""Masks, brought to the tokens of a layer."""

import torch

from sa_inject.core.masks import kept_tokens, token_weights


def test_token_weight_is_the_covered_share_of_its_area():
    mask = torch.zeros(8, 4)
    mask[:4, :2] = 1  # token (0, 0) whole
    mask[4:6, 2:] = 1  # token (1, 1) half
    torch.testing.assert_close(token_weights(mask, 2, 2), torch.tensor([1.0, 0.0, 0.0, 0.5]))


def test_weights_run_row_by_row():
    mask = torch.zeros(6, 9)
    mask[2:4, 6:] = 1
    assert token_weights(mask, 3, 3).nonzero().flatten().tolist() == [5]


def test_mask_coarser_than_the_tokens_is_spread():
    mask = torch.tensor([[1.0, 0.0], [0.25, 0.0]])
    weights = token_weights(mask, 4, 4).view(4, 4)
    assert torch.equal(weights, mask.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_half_precision_and_whole_number_masks_are_averaged_alike():
    mask = (torch.arange(30).view(5, 6) % 3 == 0).int()
    torch.testing.assert_close(token_weights(mask, 2, 3), token_weights(mask.half(), 2, 3))
    assert token_weights(mask, 2, 3).dtype == torch.float32


def test_token_is_kept_from_half_of_its_area_on():
    mask = torch.zeros(4, 6)
    mask[:2, :2] = 1  # whole
    mask[:2, 2] = 1  # half
    mask[0, 4] = 1  # a quarter
    assert kept_tokens(mask, 2, 3).tolist() == [True, True, False, False, False, False]


def test_small_subject_keeps_the_one_token_that_it_covers_best():
    mask = torch.zeros(16, 16)
    mask[13, 3:6] = 1  # one cell in token (3, 0), two in token (3, 1)
    assert kept_tokens(mask, 4, 4).nonzero().flatten().tolist() == [13]


def test_empty_mask_keeps_one_token():
    assert kept_tokens(torch.zeros(8, 8), 2, 2).sum() == 1


def test_full_mask_keeps_all():
    assert bool(kept_tokens(torch.ones(5, 7), 3, 2).all())
