"""The text encoder is the same on every machine, and training sees the host's encoding."""

import pytest
import torch

pytestmark = pytest.mark.comfy

CAPTIONS = [
    "a large guitar on the left, striped red background",
    "on a plain cyan background, a small tennis ball on the right",
    "",
]


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("embeddings.token_embedding.weight", (0, 0), -0.0087738),
        ("embeddings.token_embedding.weight", (49407, 767), -0.0070953),
        ("encoder.layers.0.mlp.fc2.weight", (767, 3069), -6.3121e-05),
        ("encoder.layers.11.mlp.fc1.weight", (3071, 766), 0.0252685),
    ],
)
def test_the_drawn_numbers_are_those_that_the_weights_were_trained_with(text_encoder_weights, name, index, expected):
    """First, middle and last of the stream: one number more or less, or another order, would change the last."""
    assert text_encoder_weights[name][index].item() == pytest.approx(expected, rel=3e-3)


@torch.inference_mode()
def test_training_encodes_captions_as_the_hosts_clip_does(caption_encoder, loaded):
    """With all of its twelve layers: eleven of them add nothing."""
    ours = caption_encoder(CAPTIONS).float()
    for caption, encoded in zip(CAPTIONS, ours, strict=True):
        ((by_host, _),) = loaded.clip.encode_from_tokens_scheduled(loaded.clip.tokenize(caption))  # CLIPTextEncode
        assert by_host.shape == (1, 77, 768)
        worst = ((encoded - by_host[0]).norm(dim=1) / by_host[0].norm(dim=1)).max()
        assert worst < 0.02, caption


def test_captions_come_back_in_the_order_asked_for_whether_remembered_or_not(caption_encoder):
    first, second, *_ = CAPTIONS
    caption_encoder.forget()
    alone = caption_encoder([second])
    together = caption_encoder([second, first, second])
    assert torch.equal(together[0], alone[0]) and torch.equal(together[2], alone[0])
    caption_encoder.forget()
    assert torch.allclose(caption_encoder([first])[0].float(), together[1].float(), rtol=0.02, atol=0.02)


def test_one_word_changes_its_own_position_most_and_nothing_before_it(caption_encoder):
    red, blue = caption_encoder(["a guitar on a red background", "a guitar on a blue background"]).float()
    change = (red - blue).norm(dim=1) / blue.norm(dim=1)  # start, a, guitar, on, a, red, background, end, ...
    assert not change[:5].any()
    assert change.argmax() == 5 and change[5] > 0.5
    assert 0 < change[6:].max() < 0.5 * change[5]
