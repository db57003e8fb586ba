"""The harness itself: the tiny checkpoints are what they claim, the host runs them, and the server answers."""

import time

import pytest
import torch

from tests.host.client import PromptFailed, PromptInterrupted
from tests.host.workflow_to_prompt import workflow_to_prompt
from tests.tiny_unet import CONTEXT_DIM, TinyUNet

EXPECTED = {
    "sd15": ("SD15", "BaseModel", "EPS", 4),
    "sd15_inpaint": ("SD15", "BaseModel", "EPS", 9),
    "sd2": ("SD20", "BaseModel", "EPS", 4),
    "sd2_v": ("SD20", "BaseModel", "V_PREDICTION", 4),
    "sdxl": ("Segmind_Vega", "SDXL", "EPS", 4),
}


@pytest.mark.parametrize("kind", EXPECTED)
@torch.inference_mode()
def test_tiny_checkpoint_is_detected_and_samples(comfy_host, load_checkpoint, kind):
    model, clip, vae = load_checkpoint(kind)
    base = model.model
    found = (type(base.model_config).__name__, type(base).__name__, base.model_type.name)
    assert (*found, base.diffusion_model.input_blocks[0][0].in_channels) == EXPECTED[kind]
    weights = [*base.named_parameters(), *clip.cond_stage_model.named_parameters()]
    assert [name for name, weight in weights if not torch.isfinite(weight).all()] == []
    assert next(base.diffusion_model.parameters()).is_inference()

    (cat,) = comfy_host.execute("CLIPTextEncode", clip=clip, text="a photo of a cat")
    (dog,) = comfy_host.execute("CLIPTextEncode", clip=clip, text="a photo of a dog")
    assert (cat[0][0] - dog[0][0]).norm() > 0.1 * cat[0][0].norm()

    (latent,) = comfy_host.execute("EmptyLatentImage", width=64, height=64)
    settings = {"model": model, "negative": dog, "latent_image": latent, "steps": 2}
    of_cat, of_dog = (comfy_host.execute("KSampler", positive=c, **settings)[0]["samples"] for c in (cat, dog))
    assert of_cat.isfinite().all() and of_dog.isfinite().all()
    assert not torch.equal(of_cat, of_dog)
    image = vae.decode(of_cat)
    assert 0.1 < image.mean() < 0.9 and image.std() > 0.05
    assert 0.3 < base.process_latent_in(vae.encode(image)).std() < 3


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_tiny_unet_calls_patches_as_the_host_does(load_checkpoint, kind):
    host = load_checkpoint("sd15")[0].model.diffusion_model
    tiny = TinyUNet()
    calls_of_host = patch_calls(host, kind, context=torch.randn(2, 5, 768))
    calls_of_tiny = patch_calls(tiny, kind, context=torch.randn(2, 5, CONTEXT_DIM))
    assert calls_of_tiny[("input", 1)] == calls_of_host[("input", 1)]
    assert calls_of_tiny[("middle", 0)] == calls_of_host[("middle", 0)]


@torch.inference_mode()
def patch_calls(unet: torch.nn.Module, kind: str, context: torch.Tensor) -> dict[tuple, list]:
    """What the patches of each block see: without a replacement, with one under the block's key, under the depth's."""
    calls: dict[tuple, list] = {}

    def note(name, options, *tensors, **flags):
        counted = {key: options.get(key) for key in ("block_index", "transformer_index", "original_shape")}
        shapes = [tuple(tensor.shape[:2]) for tensor in tensors]
        calls.setdefault(options["block"], []).append((name, shapes, flags, counted, sorted(options)))

    def input_patch(n, ctx, value, options):
        note("patch", options, n, ctx, value, ctx_is_n=ctx is n, value_is_ctx=value is ctx)
        return n, ctx, value

    def output_patch(n, options):
        note("output", options, n)
        return n

    def replacement(name):
        def attend(q, k, v, options):
            note(name, options, q, k, v)
            return q

        return attend

    def override(func, *args, **kwargs):
        note("override", kwargs["transformer_options"], *args[:3])
        return func(*args, **kwargs)

    per_block = {("input", 1): replacement("2-tuple"), ("middle", 0): replacement("2-tuple")}
    per_depth = {("input", 1, 0): replacement("3-tuple")}
    for replacements in ({}, per_block, per_block | per_depth):
        options = {
            "patches": {f"{kind}_patch": [input_patch], f"{kind}_output_patch": [output_patch]},
            "patches_replace": {kind: replacements},
            "optimized_attention_override": override,
        }
        unet(torch.randn(2, 4, 8, 8), torch.tensor([3.0, 5.0]), context, transformer_options=options)
        assert options["original_shape"] == [2, 4, 8, 8] and options["block"][0] == "output"
    return calls


def text_to_image(checkpoint: str = "sd15.ckpt", loader: str = "CheckpointLoaderSimple", **sampler) -> dict:
    model, clip, vae = (["1", i] for i in range(3))
    settings = {"seed": 1, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    graph = {
        "1": (loader, {"ckpt_name": checkpoint}),
        "2": ("CLIPTextEncode", {"clip": clip, "text": "a red guitar"}),
        "3": ("CLIPTextEncode", {"clip": clip, "text": ""}),
        "4": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "5": ("KSampler", {"model": model, "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}),
        "6": ("VAEDecode", {"samples": ["5", 0], "vae": vae}),
        "7": ("SaveImage", {"images": ["6", 0], "filename_prefix": "harness"}),
    }
    graph["5"][1].update(settings | sampler)
    return {node_id: {"class_type": kind, "inputs": inputs} for node_id, (kind, inputs) in graph.items()}


def test_our_nodes_are_the_same_in_both_hosts(pack_nodes, client):
    served = {name for name, info in client.object_info().items() if info["python_module"] == "custom_nodes.sa-inject"}
    assert served == set(pack_nodes)


def test_server_draws(client, server):
    with client.listen() as events:
        outputs = client.run(text_to_image())
    (image,) = client.images(outputs)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert list((server.base / "output").glob("harness_*.png"))
    assert [e["data"]["value"] for e in events if e["type"] == "progress"][-1] == 2


def test_server_draws_with_sdxl(client):
    graph = text_to_image("sdxl.ckpt", "ProbeLoadCheckpoint")
    graph["1"]["inputs"]["text_layers"] = 3
    (image,) = client.images(client.run(graph))
    assert image.size == (64, 64)


def test_refused_graph_names_the_node(client):
    graph = text_to_image("none.ckpt")
    with pytest.raises(PromptFailed, match="none.ckpt") as failure:
        client.run(graph)
    assert (failure.value.node_id, failure.value.node_type) == ("1", "CheckpointLoaderSimple")


def test_failing_node_is_named(client):
    graph = text_to_image()
    graph["7"]["inputs"]["images"] = ["8", 0]
    graph["8"] = {"class_type": "ProbeFail", "inputs": {"images": ["6", 0], "message": "no such luck"}}
    with pytest.raises(PromptFailed, match="no such luck") as failure:
        client.run(graph)
    assert (failure.value.node_id, failure.value.node_type) == ("8", "ProbeFail")
    assert failure.value.exception_type == "ValueError"


def test_interrupt_ends_a_run(client):
    with client.listen() as events:
        prompt_id = client.queue(text_to_image(steps=5000, seed=2))
        while not any(e["type"] == "progress" for e in events):
            assert client.why_dead() is None
            time.sleep(0.02)
        client.interrupt()
        with pytest.raises(PromptInterrupted):
            client.wait(prompt_id)


def test_upload_reaches_the_input_folder(client, server, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red dot.png")
    assert client.upload_image(tmp_path / "red dot.png", "subject") == "subject/red dot.png"
    assert (server.base / "input" / "subject" / "red dot.png").is_file()


def test_workflow_becomes_the_prompt_that_the_frontend_would_queue(client):
    """Seed control, a converted widget, a primitive, a reroute, a bypassed and a muted node, a note."""
    slot = dict
    workflow = {
        "nodes": [
            {"id": 1, "type": "CheckpointLoaderSimple", "widgets_values": ["sd15.ckpt"]},
            {
                "id": 2,
                "type": "CLIPTextEncode",
                "inputs": [slot(name="clip", type="CLIP", link=20), slot(name="text", type="STRING", link=21)],
                "widgets_values": ["overridden"],
            },
            {"id": 3, "type": "CLIPTextEncode", "inputs": [slot(name="clip", link=22)], "widgets_values": [""]},
            {"id": 4, "type": "EmptyLatentImage", "widgets_values": [64, 64, 1]},
            {
                "id": 5,
                "type": "KSampler",
                "inputs": [
                    slot(name="model", link=23),
                    slot(name="positive", link=24),
                    slot(name="negative", link=25),
                    slot(name="latent_image", link=26),
                ],
                "widgets_values": [1, "randomize", 2, 5.0, "euler", "normal", 1.0],
            },
            {
                "id": 6,
                "type": "VAEDecode",
                "inputs": [slot(name="samples", link=27), slot(name="vae", link=28)],
                "widgets_values": None,
            },
            {"id": 7, "type": "SaveImage", "inputs": [slot(name="images", link=29)], "widgets_values": ["harness"]},
            {"id": 10, "type": "PrimitiveNode", "widgets_values": ["a red guitar", "fixed"]},
            {"id": 11, "type": "Reroute", "inputs": [slot(name="", type="*", link=30)]},
            {
                "id": 12,
                "type": "LoraLoader",
                "mode": 4,
                "inputs": [slot(name="model", type="MODEL", link=31), slot(name="clip", type="CLIP", link=32)],
                "outputs": [slot(name="MODEL", type="MODEL"), slot(name="CLIP", type="CLIP")],
                "widgets_values": ["none.safetensors", 1.0, 1.0],
            },
            {"id": 13, "type": "PreviewImage", "mode": 2, "inputs": [slot(name="images", link=29)]},
            {"id": 14, "type": "MarkdownNote", "widgets_values": ["hello"]},
        ],
        "links": [
            [20, 12, 1, 2, 0, "CLIP"],
            [21, 10, 0, 2, 1, "STRING"],
            [22, 1, 1, 3, 0, "CLIP"],
            [23, 12, 0, 5, 0, "MODEL"],
            [24, 2, 0, 5, 1, "CONDITIONING"],
            [25, 3, 0, 5, 2, "CONDITIONING"],
            [26, 11, 0, 5, 3, "LATENT"],
            [27, 5, 0, 6, 0, "LATENT"],
            [28, 1, 2, 6, 1, "VAE"],
            [29, 6, 0, 7, 0, "IMAGE"],
            [30, 4, 0, 11, 0, "LATENT"],
            [31, 1, 0, 12, 0, "MODEL"],
            [32, 1, 1, 12, 1, "CLIP"],
        ],
    }
    assert workflow_to_prompt(workflow, client.object_info()) == text_to_image()
    workflow["nodes"][3]["widgets_values"].append(1)
    with pytest.raises(ValueError, match="left over"):
        workflow_to_prompt(workflow, client.object_info())
