"""The attentions of diffusion transformers as sites: which tokens are the picture's, what they were computed from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.adapters import load, naive_attention, random, relative_error
from tests.host.tiny_transformers import POOLED_WIDTH, TEXT_WIDTH, TRANSFORMERS, tiny_transformer

SIZE = (12, 10)  # of the latent: 30 tokens of 2x2, which Z-Image fills up to 32


@pytest.fixture(scope="module", params=TRANSFORMERS)
def model(request, comfy_host):
    return tiny_transformer(request.param)


def call(model: Any, options: dict[str, Any], tokens: int = 11, size: tuple[int, int] = SIZE, batch: int = 2, **more):
    """One call of the network as a sampler makes it. -> denoised (b, c, h, w)"""
    base = load(model).model
    x = random(batch, base.latent_format.latent_channels, *size, seed=1)
    pooled = random(1, POOLED_WIDTH, seed=3) if base.model_config.unet_config.get("vec_in_dim") else None
    with torch.inference_mode():
        conds = base.extra_conds(
            noise=x, device=x.device, cross_attn=random(1, tokens, TEXT_WIDTH, seed=2), pooled_output=pooled, **more
        )
        conds = {name: cond.process_cond(batch_size=batch, area=None).cond for name, cond in conds.items()}
        return base.apply_model(x, torch.full((batch,), 0.6), transformer_options=options, **conds)


def sites_of(model: Any, tokens: int = 11, size: tuple[int, int] = SIZE, options: dict[str, Any] | None = None, **more):
    """Every site of one call, and what the call gave."""
    from sa_inject.nodes.host.networks.registry import attending, describe

    found = []

    def at(site):
        found.append(site)
        return site.self_attention()

    network, blocks = model.model.diffusion_model, [layer.key for layer in describe(model).layers]
    with attending(network, options or {}, at, blocks, size=size, keeps_hidden=True) as options:
        out = call(model, options, tokens, size, **more)
    return found, out


def test_sites_are_met_in_the_order_of_the_layers_and_change_nothing(model):
    from sa_inject.nodes.host.networks.registry import describe

    options: dict[str, Any] = {"patches": {}}
    sites, out = sites_of(model, options=options)
    assert torch.equal(out, call(model, {}))
    assert [site.key for site in sites] == [layer.key for layer in describe(model).layers]
    assert options == {"patches": {}}
    assert all(not module._forward_pre_hooks for module in model.model.diffusion_model.modules())


@pytest.mark.parametrize("tokens", [11, 40])
@pytest.mark.parametrize("size", [(12, 10), (7, 9), (16, 16)])
def test_hidden_states_keys_and_positions_belong_together(model, tokens, size):
    """The frozen projection of what a site says it has read gives its keys, once their positions are undone."""
    patch_size = model.model.diffusion_model.patch_size
    for site in sites_of(model, tokens, size)[0]:
        assert (site.height, site.width) == tuple(-(-side // patch_size) for side in size)
        assert site.has_whole_grid and site.hidden.shape[:2] == (2, site.height * site.width)
        with torch.inference_mode():
            assert relative_error(site.picture_keys, keys_of(model, site)) < 1e-5
            own = naive_attention(site.q, kv(site), [], site.heads)
        assert relative_error(site.self_attention(), own) < 1e-5


def kv(site: Any) -> Any:
    from sa_inject.core.kv import KV

    return KV(site.k, site.v)


def keys_of(model: Any, site: Any) -> Tensor:
    """W_k z after the key norm, written out for every kind of layer."""
    network = model.model.diffusion_model
    block = getattr(network, site.key.stage)[site.key.index]
    if hasattr(block, "attention"):
        qkv, norm = block.attention.qkv(site.hidden), block.attention.k_norm
    elif hasattr(block, "img_attn"):
        qkv, norm = block.img_attn.qkv(site.hidden), block.img_attn.norm.key_norm
    else:
        qkv, norm = block.linear1(site.hidden), block.norm.key_norm
    width = site.q.shape[-1]
    keys = qkv[..., width : 2 * width].unflatten(-1, (site.heads, -1))
    return norm(keys).flatten(2)


@pytest.mark.parametrize("rule", ["none", "same", "index"])
def test_reference_terms_do_not_depend_on_the_length_of_the_text(model, rule):
    """A reference that was read beside a short text is met in one way, whatever text the drawing has."""
    short, long = (sites_of(model, tokens)[0] for tokens in (5, 70))
    for one, other in zip(short, long, strict=True):
        same = random(*one.picture_keys.shape, seed=9)
        assert relative_error(one.placed(same, rule), other.placed(same, rule)) < 1e-5
        # Queries, put back where they came from, without what depends on the text.
        q = one.rotation.undone(one.q[:, one.tokens], one.heads)
        for site in (one, other):
            moved = dataclass_with_queries(site, q)
            expected = moved.placed(q, "none" if rule == "none" else "same")
            assert relative_error(moved.picture_queries(rule), expected) < 1e-5


def dataclass_with_queries(site: Any, q: Tensor) -> Any:
    """The site as if the picture's queries were these without their positions."""
    import dataclasses

    rotated = torch.zeros_like(site.q)
    matrices = site.rotation.matrices[:, :, None]
    rotated[:, site.tokens] = (matrices * q.unflatten(-1, (site.heads, -1, 1, 2))).sum(-1).flatten(2)
    return dataclasses.replace(site, q=rotated)


def test_an_index_turns_keys_by_the_networks_own_rotation(model):
    """Index positions are those that the network itself would give a second picture on the same grid."""
    network = model.model.diffusion_model
    embedder = network.rope_embedder if hasattr(network, "rope_embedder") else network.pe_embedder
    step = 1.0 if not hasattr(network, "params") else getattr(network.params, "ref_index_scale", 1.0)
    for site in sites_of(model)[0]:
        keys = random(*site.picture_keys.shape, seed=4)
        ids = torch.zeros(1, site.height * site.width, len(embedder.axes_dim))
        ids[..., 0] = step
        ids[..., 1] = torch.arange(site.height).repeat_interleave(site.width)
        ids[..., 2] = torch.arange(site.width).repeat(site.height)
        expected = embedder(ids)[:, 0][:, :, None] * keys.unflatten(-1, (site.heads, -1, 1, 2))
        assert relative_error(site.placed(keys, "index"), expected.sum(-1).flatten(2)) < 1e-5


def test_override_of_another_pack_is_asked_for_every_attention_as_before(model):
    calls: list[bool] = []

    def override(original, *args, **kwargs):
        calls.append("optimized_attention_override" in kwargs["transformer_options"])
        return original(*args, **kwargs) * 1.5

    expected = call(model, {"optimized_attention_override": override})
    before, found = len(calls), []

    def at(site):
        found.append(site.attend(site.q[:, site.tokens], site.k, site.v, site.heads))  # asks it once more
        return site.self_attention()

    from sa_inject.nodes.host.networks.registry import attending, describe

    blocks = [layer.key for layer in describe(model).layers]
    options = {"optimized_attention_override": override}
    with attending(model.model.diffusion_model, options, at, blocks, size=SIZE) as options:
        out = call(model, options)
    assert torch.equal(out, expected)
    assert len(calls) == 2 * before + len(blocks) and all(calls[:before])


def test_hooks_are_gone_after_an_error(model):
    from sa_inject.nodes.host.networks.registry import attending, describe

    def at(site):
        raise KeyboardInterrupt

    blocks = [layer.key for layer in describe(model).layers]
    network = model.model.diffusion_model
    with pytest.raises(KeyboardInterrupt), attending(network, {}, at, blocks, size=SIZE) as options:
        call(model, options)
    assert all(not module._forward_pre_hooks for module in network.modules())
    assert call(model, {}).isfinite().all()
