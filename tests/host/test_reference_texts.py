"""What is read beside an image prompt: texts of any length together, one for each picture, and what is no such text."""

import dataclasses
import logging

import pytest
import torch

from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning  # pyright: ignore[reportMissingImports]
from tests.host.adapters import (
    apply,
    base_model,
    conditioning,
    load,
    make_adapter,
    random,
    reference_text,
    relative_error,
    sample,
)
from tests.host.test_reference_pass import call_once, worst_error


def prompt_with_texts(model, *lengths: int | None) -> ImagePrompt:
    """Pictures of one size; None reads the class word of the adapter, which is 7 tokens long."""
    return ImagePrompt(
        tuple(
            ReferenceImage(
                random(1, 4, 8, 8, seed=place),
                text=None if length is None else reference_text(model, seed=20 + place, tokens=length),
            )
            for place, length in enumerate(lengths)
        )
    )


PAIRS = [(7, 14), (14, 7), (14, 21), (None, 14), (21, None), (7, 10), (77, 10), (None, 11, 14), (6, 4, 9, None)]


@pytest.mark.parametrize("mode, drawn", [("clean", 7), ("noised", 7), ("noised", 42)])
@pytest.mark.parametrize("lengths", PAIRS, ids=str)
def test_texts_of_every_pair_of_lengths_are_read_together_as_apart(comfy_host, model, mode, lengths, drawn):
    """One call for all, one for each length, or rows of the drawing's own call: it is the same."""
    prompt = prompt_with_texts(model, *lengths)
    adapter = make_adapter(model, mode)
    texts = {"positive": conditioning(model, 11, drawn), "negative": conditioning(model, 22, drawn)}
    found = sample(comfy_host, apply(comfy_host, model, adapter, prompt), **texts)
    patched = model.clone()
    patched.set_model_attn2_output_patch(lambda out, options: out)  # keeps the pictures out of the call that draws
    apart = sample(comfy_host, apply(comfy_host, patched, adapter, prompt), **texts)
    assert found.isfinite().all()
    assert relative_error(found, apart) < 1e-4


@pytest.mark.parametrize("lengths", [(14, 21), (7, 10)], ids=str)
def test_each_picture_is_read_with_its_own_text(comfy_host, model, lengths):
    """In the order of the prompt, whatever was read with what."""
    adapter, prompt = make_adapter(model), prompt_with_texts(model, *lengths, None, lengths[0])
    together = call_once(load(apply(comfy_host, model, adapter, prompt)))
    alone = [call_once(load(apply(comfy_host, model, adapter, ImagePrompt((p,))))) for p in prompt.pictures]
    in_order = {
        key: type(together[key])(
            *(torch.cat(tensors, 1) for tensors in zip(*(bank[key] for bank in alone), strict=True))
        )
        for key in together
    }
    assert worst_error(together, in_order) < 1e-5


def test_text_of_a_picture_is_read_in_the_place_of_the_adapters(comfy_host, model):
    adapter, other = make_adapter(model), reference_text(model, seed=33)
    (plain,) = prompt_with_texts(model, None).pictures

    def read(adapter, text):
        prompt = ImagePrompt((dataclasses.replace(plain, text=text),))
        return call_once(load(apply(comfy_host, model, adapter, prompt)))

    found = read(adapter, other)
    assert worst_error(found, read(dataclasses.replace(adapter, class_conditioning=other), None)) == 0
    assert worst_error(found, read(adapter, None)) > 1e-3


def encode(host, vae, count: int = 2, **inputs) -> ImagePrompt:
    return host.execute(
        "EncodeImagePrompt", images=random(count, 64, 64, 3).sigmoid(), vae=vae, resolution=64, **inputs
    )[0]


@pytest.fixture(scope="module")
def vae(comfy_host):
    comfy_host.pack_nodes()
    return comfy_host.load_checkpoint("sd15")[2]


def test_a_list_of_conditionings_gives_each_picture_its_own(comfy_host, model, vae):
    conds = [conditioning(model, 11), conditioning(model, 22)]
    prompt = encode(comfy_host, vae, conditioning=conds)
    assert [torch.equal(p.text.cross_attn, c[0][0]) for p, c in zip(prompt.pictures, conds, strict=True)] == [True] * 2
    both = encode(comfy_host, vae, conditioning=conds[:1])
    assert all(torch.equal(picture.text.cross_attn, conds[0][0][0]) for picture in both.pictures)
    with pytest.raises(ValueError, match="there are 2 conditionings for 3 pictures. Connect one for all, or one for"):
        encode(comfy_host, vae, count=3, conditioning=conds)


def test_a_conditioning_brings_its_pooled_vector(comfy_host, model, vae):
    pooled = random(1, 1280, seed=9)
    (picture,) = encode(
        comfy_host, vae, count=1, conditioning=[[[random(1, 7, 2048), {"pooled_output": pooled}]]]
    ).pictures
    assert torch.equal(picture.text.pooled, pooled)


def test_a_combined_conditioning_is_refused(comfy_host, model, vae):
    (both,) = comfy_host.execute(
        "ConditioningCombine", conditioning_1=conditioning(model, 11), conditioning_2=conditioning(model, 22)
    )
    with pytest.raises(ValueError, match="has 2 entries, as after Conditioning .Combine."):
        encode(comfy_host, vae, conditioning=[both])


def test_a_batch_of_texts_is_refused_unless_they_are_the_same(comfy_host, model, vae):
    first, second = (conditioning(model, seed)[0][0] for seed in (11, 22))
    with pytest.raises(ValueError, match="a batch of 2 texts"):
        encode(comfy_host, vae, conditioning=[[[torch.cat([first, second]), {}]]])
    prompt = encode(comfy_host, vae, conditioning=[[[torch.cat([first, first]), {}]]])
    assert torch.equal(prompt.pictures[0].text.cross_attn, first)


def test_what_a_conditioning_says_beside_its_text_is_named_in_the_log(comfy_host, model, vae, caplog):
    (cond,) = comfy_host.execute(
        "ConditioningSetArea", conditioning=conditioning(model, 11), width=64, height=64, x=0, y=0, strength=1.0
    )
    (cond,) = comfy_host.execute("ConditioningSetTimestepRange", conditioning=cond, start=0.0, end=0.5)
    with caplog.at_level(logging.WARNING):
        encode(comfy_host, vae, conditioning=[cond])
        encode(comfy_host, vae, conditioning=[conditioning(model, 11)])
    (line,) = [record.getMessage() for record in caplog.records if "SA-Inject" in record.getMessage()]
    assert line.endswith("not its area, timestep range.")


@pytest.mark.parametrize("pooled, has", [(None, "no pooled vector"), (768, "a pooled vector of 768")])
def test_sdxl_wants_a_pooled_vector_of_its_own(comfy_host, pooled, has):
    model = base_model(comfy_host, "sdxl")
    text = TextConditioning(random(1, 7, 2048), None if pooled is None else random(1, pooled))
    prompt = ImagePrompt((ReferenceImage(random(1, 4, 8, 8)), ReferenceImage(random(1, 4, 8, 8), text=text)))
    with pytest.raises(ValueError, match=f"conditioning of picture 2 of the image prompt has {has}, .* one of 1280"):
        apply(comfy_host, model, prompt=prompt)


def test_other_models_want_no_pooled_vector(comfy_host, model):
    text = TextConditioning(random(1, 7, 768), random(1, 768))
    prompt = ImagePrompt((ReferenceImage(random(1, 4, 8, 8), text=text), ReferenceImage(random(1, 4, 8, 8))))
    assert sample(comfy_host, apply(comfy_host, model, make_adapter(model, "noised"), prompt)).isfinite().all()


@pytest.mark.parametrize("count, is_refused", [(1, False), (3, True)])
def test_a_batch_of_area_masks_is_refused_unless_they_are_the_same(comfy_host, model, count, is_refused):
    same = random(1, 8, 8).sigmoid().expand(3, -1, -1)
    assert apply(comfy_host, model, attn_mask=same) is not model
    masks = random(count, 8, 8).sigmoid()
    if not is_refused:
        assert apply(comfy_host, model, attn_mask=masks) is not model
        return
    with pytest.raises(ValueError, match="attn_mask is a batch of 3 masks, but one mask is wanted"):
        apply(comfy_host, model, attn_mask=masks)


def test_an_empty_area_is_refused(comfy_host, model):
    for shape in ((0, 8, 8), (1, 0, 8)):
        with pytest.raises(ValueError, match="attn_mask is empty"):
            apply(comfy_host, model, attn_mask=torch.zeros(shape))
