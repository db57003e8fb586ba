"""Every shipped workflow runs on the real server, from the file that people open to pictures on disk."""

import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.host.client import PromptInterrupted
from tests.host.workflow_to_prompt import workflow_to_prompt

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
OURS = {
    "LoadSAInjectDataset",
    "TrainSAInjectAdapter",
    "LoadSAInjectAdapter",
    "EncodeImagePrompt",
    "ApplySelfAttnInjection",
}
TRANSFORMERS = ("flux1", "z_image")
SIDE = 64
TITLE_BAR = 30
SMALL = {
    "CheckpointLoaderSimple": {"ckpt_name": "sd15.ckpt"},
    "TrainSAInjectAdapter": {"resolution": SIDE, "steps": 3, "rank": 4, "previews": 1},
    "EncodeImagePrompt": {"resolution": SIDE},
    "EmptyLatentImage": {"width": SIDE, "height": SIDE},
    "KSampler": {"steps": 2},
}


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def prompt_of(path: Path, client, **changes) -> dict:
    graph = workflow_to_prompt(load(path), client.object_info())
    for node in graph.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        node["inputs"].update(changes.get(node["class_type"], {}))
    return graph


@pytest.fixture(scope="module")
def subject_folder(server) -> str:
    """Pictures of different sizes with captions, in the host's input folder."""
    folder = server.base / "input" / "sa-inject-demo"
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate([(64, 64), (96, 64), (64, 64)]):
        Image.new("RGB", size, (70 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a photo of sainj toy")
    Image.new("RGB", (80, 72), (200, 40, 40)).save(server.base / "input" / "example.png")
    return folder.name


@pytest.fixture(scope="module")
def trained(server, subject_folder) -> tuple[str, dict]:
    """(file name, outputs) of the training workflow."""
    graph = prompt_of(
        ROOT / "workflows" / "train.json", server.client, TrainSAInjectAdapter={"file_name": "from-train"}
    )
    extra = {"extra_pnginfo": {"workflow": load(ROOT / "workflows" / "train.json")}}
    return "from-train.safetensors", server.client.run(graph, timeout=600, **extra)


def test_every_workflow_has_a_thumbnail_that_the_frontend_shows():
    assert {path.stem for path in WORKFLOWS} == {
        "apply",
        "flux1",
        "sdxl",
        "train",
        "train_further",
        "train_then_apply",
        "two_subjects",
        "z_image",
    }
    for path in WORKFLOWS:
        with Image.open(path.with_suffix(".jpg")) as picture:
            assert picture.format == "JPEG"


def boxes_of(workflow: dict) -> list[tuple[str, float, float, float, float]]:
    """Title, left, top (with the title bar), right, bottom of every node."""
    return [
        (node.get("title", node["type"]), x, y - TITLE_BAR, x + wide, y + tall)
        for node in workflow["nodes"]
        for (x, y), (wide, tall) in [(node["pos"], node["size"])]
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_node_of_a_workflow_covers_another(path):
    boxes = boxes_of(load(path))
    for number, (name, left, top, right, bottom) in enumerate(boxes):
        for other, left2, top2, right2, bottom2 in boxes[number + 1 :]:
            beside = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert beside, f"'{name}' and '{other}' overlap"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_groups_hold_every_node_in_the_order_of_work(path):
    workflow = load(path)
    groups = [(group["title"], *group["bounding"]) for group in workflow["groups"]]
    assert [title.split(".")[0] for title, *_ in groups] == [str(number + 1) for number in range(len(groups))]
    assert [x for _, x, *_ in groups] == sorted(x for _, x, *_ in groups)
    for name, left, top, right, bottom in boxes_of(workflow):
        homes = [
            title
            for title, x, y, wide, tall in groups
            if x <= left and right <= x + wide and y <= top and bottom <= y + tall
        ]
        assert len(homes) == 1, f"'{name}' lies in {homes}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_workflow_names_a_model_that_is_missing(path):
    chosen = {
        name: value
        for node in load(path)["nodes"]
        for name, value in zip(widget_names(node), node.get("widgets_values") or [], strict=False)
        if name in ("ckpt_name", "adapter_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name")
    }
    assert chosen and set(chosen.values()) == {""}


def widget_names(node: dict) -> list[str]:
    return [slot["name"] for slot in node.get("inputs", []) if "widget" in slot]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_app_mode_offers_inputs_and_results_that_exist(path):
    workflow = load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    app = workflow["extra"]["linearData"]
    for number, name in app["inputs"]:
        assert name in widget_names(nodes[number])
    assert app["outputs"] and {nodes[number]["type"] for number in app["outputs"]} <= {"SaveImage", "PreviewImage"}


def test_transformer_workflows_have_the_tables_settings(comfy_host):
    from sa_inject.nodes.host.networks.architectures import ARCHITECTURES

    for stem, name in (("z_image", "Z-Image"), ("flux1", "Flux.1")):
        usual = ARCHITECTURES[name]
        nodes = {node["type"]: node for node in load(ROOT / "workflows" / f"{stem}.json")["nodes"]}
        trained = dict(
            zip(
                widget_names(nodes["TrainSAInjectAdapter"]),
                nodes["TrainSAInjectAdapter"]["widgets_values"],
                strict=False,
            )
        )
        assert trained["resolution"] == usual.resolution
        assert trained["lora_learning_rate"] == usual.lora_learning_rate
        assert trained["token_learning_rate"] == usual.token_learning_rate
        assert nodes["EncodeImagePrompt"]["widgets_values"][0] == usual.reference_resolution


def test_sdxl_workflow_has_sizes_of_its_own():
    sizes = [
        node["widgets_values"]
        for node in load(ROOT / "workflows" / "sdxl.json")["nodes"]
        if node["type"] in ("EmptyLatentImage", "EncodeImagePrompt", "TrainSAInjectAdapter")
    ]
    assert all(1024 in values and 512 not in values for values in sizes) and len(sizes) == 3


def test_training_workflows_hand_captions_and_masks_of_a_folder_to_the_training(client):
    for name in ("train", "train_further", "train_then_apply", "sdxl"):
        graph = workflow_to_prompt(load(ROOT / "workflows" / f"{name}.json"), client.object_info())
        (dataset,) = (number for number, node in graph.items() if node["class_type"] == "LoadSAInjectDataset")
        (train,) = (node["inputs"] for node in graph.values() if node["class_type"] == "TrainSAInjectAdapter")
        assert [train[name] for name in ("images", "captions", "masks")] == [[dataset, slot] for slot in range(3)]
        assert graph[dataset]["inputs"]["placeholder_token"] == train["placeholder_token"]


def test_the_host_lists_and_serves_the_workflows(client):
    assert set(client.get("/workflow_templates")["sa-inject"]) == {path.stem for path in WORKFLOWS}
    served = client.get("/api/workflow_templates/sa-inject/apply.json")
    assert served == load(ROOT / "workflows" / "apply.json")


def test_every_workflow_uses_our_nodes_and_only_nodes_that_exist(client):
    known = set(client.object_info()) | {"MarkdownNote"}
    for path in WORKFLOWS:
        used = {node["type"] for node in load(path)["nodes"]}
        assert used <= known
        assert used & OURS


def test_previews_are_sampled_as_the_workflows_sample(comfy_host, pack_nodes, client):
    from sa_inject.nodes.host.drawing import preview

    samplers = [
        node["inputs"]
        for path in WORKFLOWS
        if path.stem not in TRANSFORMERS  # they are sampled in ways of their own
        for node in workflow_to_prompt(load(path), client.object_info()).values()
        if node["class_type"] == "KSampler"
    ]
    assert len(samplers) == 6
    for name, usual in (
        ("steps", preview.STEPS),
        ("cfg", preview.GUIDANCE),
        ("sampler_name", preview.SAMPLER),
        ("scheduler", preview.SCHEDULER),
    ):
        assert {inputs[name] for inputs in samplers} == {usual}


def test_train_workflow_saves_an_adapter_and_shows_what_it_learned(server, trained):
    name, outputs = trained
    assert (server.base / "models" / "sa_inject" / name).exists()
    shown = server.client.images(outputs)
    assert len(shown) == 2  # the loss graph and the preview


def test_dropping_the_adapter_file_on_the_canvas_opens_the_training_graph(server, trained):
    from safetensors import safe_open

    with safe_open(server.base / "models" / "sa_inject" / trained[0], framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["workflow"]) == load(ROOT / "workflows" / "train.json")
    assert "TrainSAInjectAdapter" in {node["class_type"] for node in json.loads(metadata["prompt"]).values()}


def test_apply_workflow_draws_with_a_saved_adapter(server, trained):
    graph = prompt_of(
        ROOT / "workflows" / "apply.json", server.client, LoadSAInjectAdapter={"adapter_name": trained[0]}
    )
    (picture,) = server.client.images(server.client.run(graph, timeout=300))
    assert picture.size == (SIDE, SIDE)


def applies_of(graph: dict) -> list[dict]:
    return [node for node in graph.values() if node["class_type"] == "ApplySelfAttnInjection"]


def test_two_subjects_workflow_draws_with_two_words_and_two_halves(server, trained):
    path = ROOT / "workflows" / "two_subjects.json"
    graph = prompt_of(path, server.client, LoadSAInjectAdapter={"adapter_name": trained[0]})
    masks = [node["inputs"] for node in graph.values() if node["class_type"] == "SolidMask"]
    assert sorted((mask["width"], mask["height"], mask["value"]) for mask in masks) == [
        (256, 512, 1.0),
        (512, 512, 0.0),
    ]
    for mask in masks:
        mask.update(width=mask["width"] * SIDE // 512, height=SIDE)
    words = [node["inputs"]["placeholder_token"] for node in graph.values() if "adapter_name" in node["inputs"]]
    prompts = [node["inputs"]["text"] for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    assert words == ["", "sainjtwo"] and "sainj toy" in prompts[0] and "sainjtwo toy" in prompts[0]
    (picture,) = server.client.images(server.client.run(graph, timeout=300))
    assert picture.size == (SIDE, SIDE)
    halves = [node["inputs"]["attn_mask"] for node in applies_of(graph)]
    assert {graph[source]["class_type"] for source, _ in halves} == {"MaskComposite", "InvertMask"}

    for off in applies_of(graph):  # each of the two draws something
        strength = off["inputs"]["strength"]
        off["inputs"]["strength"] = 0.0
        (without,) = server.client.images(server.client.run(graph, timeout=300))
        assert without.tobytes() != picture.tobytes()
        off["inputs"]["strength"] = strength


def test_train_then_apply_workflow_draws_base_and_adapter_differently(server, subject_folder):
    graph = prompt_of(
        ROOT / "workflows" / "train_then_apply.json",
        server.client,
        TrainSAInjectAdapter={"file_name": "from-both", "lora_learning_rate": 1e-2},
    )
    outputs = server.client.run(graph, timeout=600)
    saved = {
        node["inputs"]["filename_prefix"]: server.client.images({"": outputs[number]})[0]
        for number, node in graph.items()
        if node["class_type"] == "SaveImage"
    }
    assert set(saved) == {"sa_inject/base", "sa_inject/adapter"}
    assert saved["sa_inject/base"].tobytes() != saved["sa_inject/adapter"].tobytes()


def test_a_changed_prompt_does_not_train_again(server, subject_folder):
    graph = prompt_of(
        ROOT / "workflows" / "train_then_apply.json", server.client, TrainSAInjectAdapter={"file_name": "once"}
    )
    server.client.run(graph, timeout=600)
    for node in graph.values():
        if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]:
            node["inputs"]["text"] += ", at night"
    server.client.run(graph, timeout=300)
    folder = server.base / "models" / "sa_inject"
    assert [path.name for path in folder.glob("once*.safetensors")] == ["once.safetensors"]


def test_cancelled_training_goes_on_after_a_restart_of_the_host(server, subject_folder):
    graph = prompt_of(
        ROOT / "workflows" / "train.json",
        server.client,
        TrainSAInjectAdapter={"file_name": "stopped", "steps": 2000, "previews": 0},
    )
    with server.client.listen() as events:
        prompt_id = server.client.queue(graph)
        while steps_told(events) < 3:
            assert server.why_dead() is None
            time.sleep(0.02)
        server.client.interrupt()
        with pytest.raises(PromptInterrupted):
            server.client.wait(prompt_id)
    done = steps_told(events)
    folder = server.base / "models" / "sa_inject"
    assert not list(folder.glob("stopped*.safetensors"))

    server.stop()
    server.start()
    for node in graph.values():
        if node["class_type"] == "TrainSAInjectAdapter":
            node["inputs"]["steps"] = done + 3
    with server.client.listen() as events:
        server.client.run(graph, timeout=300)
    # The step in which it was cancelled may have been done, and not told.
    assert done < steps_of(events)[0] <= done + 2
    assert (folder / "stopped.safetensors").exists()
    kept = [path.name.split("-", 1)[1] for path in (folder / "training_states").iterdir()]
    assert f"{done + 3:06}-finished.pt" in kept and not [name for name in kept if "stopped" in name]


def test_training_whose_previews_are_cancelled_is_not_done_again(server, subject_folder):
    graph = prompt_of(
        ROOT / "workflows" / "train.json",
        server.client,
        TrainSAInjectAdapter={"file_name": "previews-cancelled", "seed": 77, "previews": 8},
    )
    with server.client.listen() as events:
        prompt_id = server.client.queue(graph)
        while not [e for e in events if e["type"] == "progress_text" and e["data"]["text"].startswith("saved")]:
            assert server.why_dead() is None
            time.sleep(0.02)
        server.client.interrupt()
        with pytest.raises(PromptInterrupted):
            server.client.wait(prompt_id)
    assert steps_told(events) == 3

    for node in graph.values():
        if node["class_type"] == "TrainSAInjectAdapter":
            node["inputs"]["previews"] = 0
    with server.client.listen() as events:
        server.client.run(graph, timeout=300)
    texts = [event["data"]["text"] for event in events if event["type"] == "progress_text"]
    assert texts[1:] == ["previews-cancelled.safetensors holds this adapter already"]
    folder = server.base / "models" / "sa_inject"
    assert [path.name for path in folder.glob("previews-cancelled*.safetensors")] == ["previews-cancelled.safetensors"]


def steps_told(events: list[dict]) -> int:
    """The last step that the node has shown."""
    return max(steps_of(events), default=0)


def steps_of(events: list[dict]) -> list[int]:
    """The steps that the node has shown, among other texts."""
    matches = [re.match(r"step (\d+)/", e["data"]["text"]) for e in events if e["type"] == "progress_text"]
    return [int(match[1]) for match in matches if match]
