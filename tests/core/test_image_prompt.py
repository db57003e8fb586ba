"""Image prompts add up, and texts of different lengths become rows of one batch."""

import pytest
import torch

from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning


def test_pictures_add_up_in_order():
    first, second, third = (ReferenceImage(torch.full((1, 4, 4, 4), float(i))) for i in range(3))
    both = ImagePrompt((first, second)) + ImagePrompt((third,))
    assert [id(p) for p in both.pictures] == [id(first), id(second), id(third)]


def text(tokens: int, has_length: bool = True) -> TextConditioning:
    return TextConditioning(torch.rand(1, tokens, 3), torch.rand(1, 5), (tokens,) if has_length else None)


def test_texts_are_repeated_only_where_no_network_notices_their_length():
    short, long = text(2, has_length=False), text(4, has_length=False)
    stacked = TextConditioning.stack([short, long])
    assert stacked.lengths is None and stacked.by_length() == [[0, 1]]
    assert torch.equal(stacked.cross_attn[0], short.cross_attn[0].repeat(2, 1))


def test_texts_whose_length_is_noticed_come_out_as_they_went_in():
    texts = [text(2), text(4), text(2), text(1, has_length=False)]
    stacked = TextConditioning.stack(texts)
    assert stacked.lengths == (2, 4, 2, 1) and stacked.by_length() == [[0, 2], [1], [3]]
    assert torch.equal(TextConditioning.stack([stacked, texts[0]]).take([0, 1, 2, 3]).cross_attn, stacked.cross_attn)
    for row, alone in enumerate(texts):
        found = stacked.take([row])
        assert torch.equal(found.cross_attn, alone.cross_attn) and torch.equal(found.pooled, alone.pooled)


def test_texts_become_rows_of_a_length_that_they_have_in_common():
    short, long = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    found = TextConditioning.stack(
        [TextConditioning(short, torch.zeros(1, 5)), TextConditioning(long, torch.ones(1, 5))]
    )
    assert torch.equal(found.cross_attn, torch.cat([short.repeat(1, 3, 1), long.repeat(1, 2, 1)]))
    assert found.pooled is not None and found.pooled[:, 0].tolist() == [0, 1]


def test_rows_have_no_pooled_vectors_unless_every_text_has_one():
    """With one vector fewer than rows, a row would read that of another."""
    with_one, without = text(2), text(2)._replace(pooled=None)
    assert TextConditioning.stack([with_one, without, with_one]).pooled is None


@pytest.mark.parametrize("has_length", [False, True])
def test_a_text_expands_to_rows_that_are_all_the_same(has_length):
    one = text(7, has_length)
    expanded, stacked = one.expand(3), TextConditioning.stack([one] * 3)
    assert torch.equal(expanded.cross_attn, stacked.cross_attn) and torch.equal(expanded.pooled, stacked.pooled)
    assert expanded.lengths == stacked.lengths
    assert expanded.cross_attn.data_ptr() == one.cross_attn.data_ptr()


def test_a_moved_text_keeps_what_it_is():
    given = TextConditioning(torch.rand(2, 3, 4), None, (3, 1))
    moved = given.to(torch.device("cpu"), torch.float16)
    assert moved.cross_attn.dtype == torch.float16 and moved.pooled is None and moved.lengths == (3, 1)
    assert given.to(torch.device("cpu")).cross_attn is given.cross_attn
