"""What a site says of a self-attention, against the UNet that ComfyUI runs."""

import functools

import pytest
import torch

from tests.host.adapters import base_model, call_unet, load, make_adapter, make_prompt, random, reference_text

KINDS = ["sd15", "sd2_v", "sdxl"]


@pytest.fixture(scope="module")
def unet_sites(comfy_host, pack_nodes):
    from sa_inject.nodes.host.networks import unet_sites

    return unet_sites


def call(model, options):
    text = reference_text(model, seed=5)
    conditions = {} if text.pooled is None else {"y": random(2, 2816, seed=6)}
    context = text.cross_attn.expand(2, -1, -1)
    return call_unet(model, random(2, 4, 8, 16, seed=8), 3.0, context, [0, 1], conditions, **options)


def watch(model, layers, name, seen):
    """What one projection of every layer reads and gives."""

    def keep(key, module, inputs, output):
        seen[key] = (inputs[0], output)

    unet = model.model.diffusion_model
    return [
        unet.get_submodule(f"{layer.path}.{name}").register_forward_hook(functools.partial(keep, layer.key))
        for layer in layers
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_the_self_attentions_of_the_network(comfy_host, unet_sites, kind):
    model = load(base_model(comfy_host, kind))
    layers = make_adapter(model).info.layers
    sites, seen = {}, {name: {} for name in ("to_q", "to_k", "to_v", "to_out")}

    def at(site):
        sites[site.key] = site
        return site.self_attention()

    plain = call(model, {})
    hooks = [hook for name in seen for hook in watch(model, layers, name, seen[name])]
    network = model.model.diffusion_model
    blocks = [layer.key for layer in layers]
    try:
        with unet_sites.attending(network, {}, at, blocks, keeps_hidden=True) as options:
            out = call(model, options)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(out, plain)
    assert list(sites) == blocks
    for layer in layers:
        site, read = sites[layer.key], seen["to_k"][layer.key][0]
        assert torch.equal(site.hidden, read) and read.shape[-1] == layer.query_dim
        for name, tensor in (("to_q", site.q), ("to_k", site.k), ("to_v", site.v)):
            assert torch.equal(tensor, seen[name][layer.key][1])
        assert torch.equal(site.self_attention(), seen["to_out"][layer.key][0])
        assert site.rows == 2 and site.has_whole_grid and site.width == 2 * site.height
        assert site.picture_queries() is site.q and site.picture_keys is site.k


def test_options_are_copied_and_nothing_is_kept_that_is_not_asked_for(comfy_host, unet_sites):
    model = load(base_model(comfy_host, "sd15"))
    keys = make_adapter(model).blocks()
    theirs = {"patches": {"attn2_patch": []}, "patches_replace": {"attn1": {("output", 3): len}, "attn2": {}}, "n": 1}
    hidden = []

    def at(site):
        hidden.append(site.hidden)
        return site.self_attention()

    network = model.model.diffusion_model
    with unet_sites.attending(network, theirs, at, keys[:2]) as options:
        assert options["patches"] == theirs["patches"] and options["n"] == 1
        assert set(options["patches_replace"]["attn1"]) == {("output", 3), *map(tuple, keys[:2])}
    assert theirs["patches_replace"] == {"attn1": {("output", 3): len}, "attn2": {}}
    with unet_sites.attending(network, {}, at, keys[:2]) as options:
        call(model, options)
    assert hidden == [None, None]


def test_blocks_that_another_replaces_are_known_by_either_kind_of_address(comfy_host, unet_sites):
    keys = make_adapter(base_model(comfy_host, "sd15")).blocks()
    replaced = {tuple(keys[0]): len, keys[1][:2]: len, ("middle", 7): len}
    assert unet_sites.replaced_blocks({"patches_replace": {"attn1": replaced}}, keys) == set(keys[:2])
    assert unet_sites.replaced_blocks({}, keys) == set()


def test_tiles_that_are_folded_into_the_rows_attend_to_their_own(comfy_host, unet_sites):
    """As HyperTile does it: q in tiles, k and v whole."""
    model = load(base_model(comfy_host, "sd15"))
    (key, *_) = make_adapter(model).blocks()
    sites = []

    def at(site):
        sites.append(site)
        return site.self_attention()

    def fold(q, k, v, options):
        return q.reshape(2 * len(q), -1, q.shape[-1]), k, v

    def unfold(out, options):
        return out.reshape(2, -1, out.shape[-1]) if options["block"] == key[:2] else out

    def only_there(q, k, v, options):
        return fold(q, k, v, options) if options["block"] == key[:2] else (q, k, v)

    patches = {"patches": {"attn1_patch": [only_there], "attn1_output_patch": [unfold]}}
    with unet_sites.attending(model.model.diffusion_model, patches, at, [key]) as options:
        call(model, options)
    (site,) = sites
    assert site.q.shape == site.k.shape == site.v.shape and len(site.q) == 4
    assert site.rows == 2 and not site.has_whole_grid


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_is_read_in_the_precision_of_each_layer(comfy_host, kind):
    """SD2.x wants its attention in float32 whatever the weights are; so it does when it reads."""
    from tests.host.test_reference_pass import call_once

    model = load(base_model(comfy_host, kind))
    adapter = make_adapter(model)
    from tests.host.adapters import apply

    patched = apply(comfy_host, model, adapter, make_prompt())
    asked = {}

    def override(attend, q, k, v, heads, *args, **kwargs):
        options = kwargs["transformer_options"]
        where = (*options["block"], options["block_index"], q.shape == k.shape)
        asked.setdefault(where, set()).add(kwargs.get("attn_precision"))
        return attend(q, k, v, heads, *args, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    call_once(load(patched))
    wanted = {torch.float32} if kind == "sd2_v" else {None}
    own = {where: found for where, found in asked.items() if where[-1]}
    assert {where[:3] for where in own} == set(map(tuple, adapter.blocks()))
    assert all(found == wanted for found in own.values()), own
