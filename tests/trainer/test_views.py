"""Views of a single picture: other pictures of the same subject, as far as geometry goes."""

import torch
from torch import Tensor

from sa_inject.trainer.views import GREY, augmented_views

HEIGHT, WIDTH = 24, 32


def subject() -> tuple[Tensor, Tensor]:
    """A white subject, left of the middle, on black."""
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[8:18, 6:16] = 1
    return mask.expand(1, 3, -1, -1).clone(), mask


def views(picture: Tensor, mask: Tensor | None, count: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor | None]]:
    return augmented_views(picture, mask, count, torch.Generator().manual_seed(seed))


def test_views_have_the_size_and_range_of_a_picture():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator).round()
    for mask in (None, subject()[1]):
        found = views(picture, mask)
        assert len(found) == 16
        for view, view_mask in found:
            assert view.shape == picture.shape and view.dtype == picture.dtype
            assert 0 <= view.min() and view.max() <= 1
            assert (view_mask is None) == (mask is None)
            if view_mask is not None:
                assert view_mask.shape == (HEIGHT, WIDTH)
                assert 0 <= view_mask.min() and view_mask.max() <= 1


def test_same_seed_gives_the_same_views_and_another_seed_others():
    picture, mask = subject()
    first, again, other = (views(picture, mask, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) and torch.equal(m, n) for (a, m), (b, n) in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_global_random_state_has_no_part():
    before = torch.get_rng_state()
    views(*subject())
    assert torch.equal(torch.get_rng_state(), before)


def test_no_view_is_the_picture_itself_nor_another_view():
    picture, _ = subject()
    found = [view for view, _ in views(picture, None)]
    assert all((view - picture).abs().max() > 0.1 for view in found)
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_mask_follows_the_subject():
    for view, mask in views(*subject(), count=32):
        inside = mask > 0.999
        assert inside.sum() > 20  # the subject is never lost
        assert view[0, :, inside].min() > 0.99  # all of the mask is on the white subject
        assert ((view[0] > 0.99).all(dim=0) & (mask < 0.01)).sum() == 0  # and no white is outside of it


def test_subject_is_moved_flipped_and_scaled():
    found = [mask for _, mask in views(*subject(), count=32)]
    columns = torch.arange(WIDTH).float()
    centres = [float((mask.sum(dim=0) * columns).sum() / mask.sum()) for mask in found]
    areas = [float(mask.sum()) for mask in found]
    assert min(centres) < 0.4 * WIDTH and max(centres) > 0.6 * WIDTH  # on the other side: flipped
    assert min(areas) < 70 and max(areas) > 140  # of 100


def test_background_changes_only_where_a_mask_tells_it_from_the_subject():
    picture, mask = subject()
    plain = []
    for view, view_mask in views(picture, mask, count=32):
        background = view[0][:, view_mask < 0.001]
        plain.append(bool(background.std(dim=1).max() < 1e-3 and background.mean() > 0.01))
    assert 8 <= sum(plain) <= 24  # about half
    for view, _ in views(picture, None, count=32):
        assert view[0].std(dim=0).max() < 1e-3  # no colour came into a black and white picture


def test_outside_of_the_picture_is_grey():
    white = torch.ones(1, 3, HEIGHT, WIDTH)
    found = [view for view, _ in views(white, None, count=16)]
    outside = [view for view in found if view.min() < 0.99]
    assert 0 < len(outside) < 16  # some views zoom out, some in
    assert abs(min(float(view.min()) for view in outside) - GREY) < 1e-6


def test_picture_and_mask_are_left_as_they_were():
    picture, mask = subject()
    before = picture.clone(), mask.clone()
    views(picture, mask)
    assert torch.equal(picture, before[0]) and torch.equal(mask, before[1])
