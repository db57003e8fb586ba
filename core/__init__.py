"""The method on one page: a frozen diffusion network attends to pictures of a subject. Torch only, no ComfyUI.

In every self-attention layer, where q, K and V are the network's own queries, keys and values:

    out = softmax(q K^T / sqrt(d)) V  +  weight * softmax(q k_r^T / sqrt(d)) v_r

    k_r = W_k z_r + dW_k z_r        v_r = dW_v z_r

z_r is the layer's input when the same network is called on a picture of the subject. W_k is the network's own key
projection. dW_k and dW_v are LoRA. Only they and one token embedding are trained. A fresh LoRA has dW_v = 0, so it
adds nothing.

Six terms:

    image prompt     pictures of the subject as VAE latents, with masks (image_prompt.py)
    reference pass   a call of the frozen network on the image prompt, for its keys and values (reference.py)
    bank             the keys and values of all layers, a KV for each BlockKey (kv.py)
    site             one call of one attention layer, of any kind of network (site.py)
    injection        the second term of the formula, added at a site (injection.py)
    adapter          the LoRA, and the embedding of the placeholder token (adapter.py, lora.py)

The whole method on random tensors:

    >>> import torch
    >>> from sa_inject.core.attention import differentiable_attention
    >>> from sa_inject.core.injection import Reference, inject
    >>> from sa_inject.core.kv import BlockKey
    >>> from sa_inject.core.layers import SelfAttentionLayer
    >>> from sa_inject.core.lora import SelfAttentionLoRA
    >>> from sa_inject.core.reference import KVRecorder
    >>> from sa_inject.core.site import Site

    >>> layer = SelfAttentionLayer(BlockKey("middle", 0), path="attn1", query_dim=32, inner_dim=32)
    >>> frozen, lora = torch.randn(3, 32, 32) / 6, SelfAttentionLoRA([layer], rank=4, alpha=4.0)
    >>> def site(z):  # (1, 16, 32), a picture of 4 x 4 tokens
    ...     q, k, v = (z @ weight for weight in frozen)
    ...     return Site(layer.key, q, k, v, heads=2, height=4, width=4, attend=differentiable_attention, hidden=z)
    >>> def draw(picture, reference):
    ...     recorder = KVRecorder([layer.key], lora.deltas(reference.device, reference.dtype))
    ...     recorder.at(site(reference))  # the reference pass, of a network of one layer
    ...     return inject(site(picture), [Reference(recorder.bank[layer.key].kv, weight=0.7)])

    >>> picture, reference = torch.randn(2, 1, 16, 32)
    >>> torch.equal(draw(picture, reference), site(picture).self_attention())  # a fresh adapter adds nothing
    True
    >>> (draw(picture, reference) ** 2).mean().backward()
    >>> [name for name, parameter in lora.named_parameters() if parameter.grad.any()]  # lora_A follows one step later
    ['base_model.model.attn1.to_v.lora_B.weight']

Ten minutes of reading, in this order:

    core/attention.py, core/kv.py           the basic types                                1 min
    core/site.py                            one call of one attention layer                1 min
    core/injection.py                       the formula                                    1 min
    core/reference.py                       how k_r and v_r are computed                   2 min
    core/lora.py                            LoRADelta; skip the rest at first              1 min
    core/schedule.py                        when, how strong, and why                      1 min
    core/image_prompt.py, core/adapter.py   what goes in, what is saved                    1 min
    trainer/losses.py, trainer/objective.py one step of training                           2 min
"""
