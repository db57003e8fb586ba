"""The layers that are found in a UNet are those of a forward pass."""

import torch
from torch import nn

from sa_inject.core.kv import BlockKey
from sa_inject.core.layers import self_attention_layers
from tests.tiny_unet import CONTEXT_DIM, TinyUNet


def test_layers_come_in_the_order_of_a_forward_pass():
    unet = TinyUNet()
    names = {module: name for name, module in unet.named_modules()}
    paths, keys = [], []
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_hook(lambda module, *_: paths.append(names[module]))

    def note(n, context, value, extra_options):
        keys.append(BlockKey(*extra_options["block"], extra_options["block_index"]))
        return n, context, value

    options = {"patches": {"attn1_patch": [note]}}
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), torch.tensor([1.0]), torch.randn(1, 3, CONTEXT_DIM), transformer_options=options)
    layers = self_attention_layers(unet)
    assert [layer.path for layer in layers] == paths
    assert [layer.key for layer in layers] == keys
    assert len(layers) == 7


def test_sizes_are_those_of_the_projections():
    unet = TinyUNet()
    unet.middle_block[1].transformer_blocks[0].attn1.to_q = nn.Linear(12, 20)  # in real ones both are the same
    for layer in self_attention_layers(unet):
        assert unet.get_submodule(layer.path).to_q.weight.shape == (layer.inner_dim, layer.query_dim)
    assert {layer.query_dim for layer in self_attention_layers(unet)} == {8, 12}


def test_weights_need_not_be_there():
    assert self_attention_layers(TinyUNet().to("meta")) == self_attention_layers(TinyUNet())


def test_block_without_self_attention_is_passed_over():
    unet = TinyUNet()
    everything = self_attention_layers(unet)
    unet.input_blocks[3][1].transformer_blocks[0].disable_self_attn = True
    gone = BlockKey("input", 3, 0)
    assert self_attention_layers(unet) == tuple(layer for layer in everything if layer.key != gone)
    assert gone in [layer.key for layer in everything]


def test_module_of_another_layout_has_none():
    assert self_attention_layers(nn.Sequential(nn.Linear(2, 2))) == ()


def test_block_key_reads_as_an_address():
    assert str(BlockKey("input", 3, 1)) == "input 3.1"
