"""The host's encoders give the embeddings of transformers', and the bench finds its pictures or names what is missing.

The weights are random. CLIP is a ViT-L/14, the smallest that the host knows, in a file of a few megabytes. The tests
run its first image layers, and a DINO of two layers.
"""

import gc
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import bootstrap, report
from bench.encoders import encoders as embedders
from bench.encoders import main as bench
from tests.host.tiny_checkpoints import Weights

IMAGE_LAYERS = 3
PROMPTS = ["a dog", "a dog in the jungle", "a (red) vase, seen from the (top:1.5)"]


def clip_config(image_layers: int):
    from transformers import CLIPConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
    vision |= {"num_hidden_layers": image_layers, "projection_dim": 768}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=768)


def clip_weights() -> dict[str, torch.Tensor]:
    from transformers import CLIPModel

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CLIPModel(clip_config(24)).state_dict().items()}
    weights = Weights()
    for name, shape in shapes.items():
        if len(shape) > 1:
            weights.matrix(name, *shape, std=0.02 if "embeddings.t" in name else math.prod(shape[1:]) ** -0.5)
        elif len(shape) == 1:
            is_gain = "norm" in name and name.endswith("weight")
            weights.vector(name, *shape, std=0.05, mean=float(is_gain))
        else:
            weights[name] = torch.tensor(2.7)  # logit_scale
    return dict(weights)


@pytest.fixture(scope="module")
def files(comfyui, tmp_path_factory) -> dict[str, Path]:
    """What a user would download: `clip` holds both halves, `dino` is a folder."""
    from transformers import ViTConfig, ViTModel

    base = tmp_path_factory.mktemp("encoders")
    torch.save(clip_weights(), base / "clip.bin")
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=2)
    config.initializer_range = 0.1
    ViTModel(config, add_pooling_layer=False).save_pretrained(base / "dino")
    return {"clip": base / "clip.bin", "dino": base / "dino"}


@pytest.fixture(scope="module")
def encoders(files):
    loaded = embedders.Encoders(files["clip"], files["clip"], files["dino"])
    del loaded.clip_vision.model.vision_model.encoder.layers[IMAGE_LAYERS:]
    yield loaded
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()


def save_picture(path: Path, seed: int, size: tuple[int, int] = (300, 240)) -> Path:
    """Soft spots of colour: noise would average out."""
    pixels = torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two methods on two subjects: "same" gives back the reference, "other" another picture."""
    generated, dataset = tmp_path / "generated", tmp_path / "dataset"
    for number, subject in enumerate(("dog", "vase")):
        reference = save_picture(dataset / subject / "00.png", seed=number)
        save_picture(generated / "other" / subject / "1.png", seed=10 + number)
        (generated / "same" / subject).mkdir(parents=True)
        shutil.copy(reference, generated / "same" / subject / "1.png")
        for method in ("other", "same"):
            (generated / method / subject / "prompts.json").write_text(json.dumps({"1.png": f"a {subject}"}))
    (dataset / "prompts_and_classes.txt").touch()
    return generated, dataset


def openai_pixels(pictures: list[Path], **options) -> torch.Tensor:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(**options)([Image.open(path) for path in pictures], return_tensors="pt")["pixel_values"]


@pytest.mark.comfy
def test_clip_embeddings_equal_those_of_transformers(comfyui, files, encoders, tmp_path):
    from transformers import CLIPModel, CLIPTokenizer

    theirs = CLIPModel.from_pretrained(None, config=clip_config(IMAGE_LAYERS), state_dict=torch.load(files["clip"]))
    theirs = theirs.eval().float()
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    pictures = [save_picture(tmp_path / f"{seed}.png", seed) for seed in range(2)]
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        run = theirs(pixel_values=openai_pixels(pictures), **tokens)

    for ours, expected in (
        (encoders.clip_image(pictures), run.image_embeds),
        (encoders.clip_text(PROMPTS), run.text_embeds),
    ):
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
        assert (expected[0] - expected[1]).abs().max() > 1e-2  # so that agreement means something


@pytest.mark.comfy
def test_dino_embeddings_equal_those_of_transformers(files, encoders, tmp_path):
    from transformers import ViTModel

    pictures = [save_picture(tmp_path / f"{seed}.png", seed, size=(240, 360)) for seed in range(2)]
    options = {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    with torch.inference_mode():
        theirs = ViTModel.from_pretrained(files["dino"])(openai_pixels(pictures, **options)).last_hidden_state[:, 0]
    theirs = torch.nn.functional.normalize(theirs, dim=1)

    torch.testing.assert_close(encoders.dino_image(pictures), theirs, atol=1e-3, rtol=0)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2


@pytest.mark.comfy
def test_the_bench_scores_every_method_over_subjects(files, encoders, folders, tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(bench, "Encoders", lambda *paths: given.append(paths) or encoders)
    monkeypatch.setattr(bench, "start_host", lambda **options: None)
    monkeypatch.setattr(bench, "environment", dict)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["encoders.py", *arguments(folders, files)])
    bench.main()

    assert given == [(files["clip"], files["clip"], files["dino"])]
    lines = capsys.readouterr().out.splitlines()
    (result,) = json.loads(lines[-1])["results"]
    other, same = result["rows"]
    assert (other["method"], same["method"], same["subjects"], same["pictures"]) == ("other", "same", 2, 2)
    assert same["DINO"] == pytest.approx(1, abs=1e-5) and same["CLIP-I"] == pytest.approx(1, abs=1e-5)
    assert same["DINO 95 %"] == "1.000 to 1.000"
    assert other["DINO"] < 0.99 and other["CLIP-I"] < 0.99
    picture = encoders.clip_image([folders[0] / "other" / "dog" / "1.png"])
    by_hand = (picture @ encoders.clip_text(["a dog"]).T).item()
    assert result["scores"]["other"]["dog"]["CLIP-T"] == pytest.approx(by_hand, abs=1e-6)
    assert any(line.startswith("| method") and "CLIP-T 95 %" in line for line in lines)


def arguments(folders: tuple[Path, Path], files: dict[str, Path]) -> list[str]:
    options = {"generated": folders[0], "dataset": folders[1], "clip-vision": files["clip"], **files}
    return [text for name, path in options.items() for text in (f"--{name}", str(path))]


def test_scores_are_means_over_all_pairs():
    generated, real = [Path("a"), Path("b")], [Path("c"), Path("d"), Path("e")]
    vectors = dict(zip([*generated, *real], torch.eye(3)[[0, 1, 0, 0, 2]], strict=True))

    class Known:
        dino_image = clip_image = staticmethod(lambda pictures: torch.stack([vectors[path] for path in pictures]))
        clip_text = staticmethod(lambda prompts: torch.eye(3)[[int(prompt) for prompt in prompts]])

    subject = embedders.Subject("m", "s", dict(zip(generated, ["0", "2"], strict=True)), real)
    assert embedders.score(Known(), subject) == pytest.approx({"DINO": 2 / 6, "CLIP-I": 2 / 6, "CLIP-T": 1 / 2})


def test_the_interval_holds_the_mean_and_is_the_same_every_time():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    interval = bootstrap.interval(values)
    assert interval == bootstrap.interval(values)
    low, high = interval
    error = torch.tensor(values).std().item() / 30**0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1) and low < sum(values) / 30 < high
    assert bootstrap.interval([0.5]) is None


MISSING = {
    "generated/other": r"holds no folders <method>/<subject>",
    "generated/other/dog/1.png": r"There are no pictures in '.*dog'",
    "generated/other/dog/prompts.json": r"There is no '.*prompts\.json', which gives every picture",
    "dataset/dog": r"The subject of '.*dog' has no references: there is no folder '.*dataset.dog'",
    "dataset/dog/00.png": r"There are no pictures in '.*dataset.dog'",
}


@pytest.mark.parametrize("gone", MISSING)
def test_an_error_names_what_is_missing(gone, folders, tmp_path):
    shutil.rmtree(folders[0] / "same")
    path = tmp_path / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ValueError, match=MISSING[gone]):
        embedders.find_subjects(*folders)


def test_every_picture_has_a_prompt_and_every_prompt_a_picture(folders):
    file = folders[0] / "other" / "dog" / "prompts.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"gives no prompt for '1\.png'"):
        embedders.find_subjects(*folders)
    file.write_text(json.dumps({"1.png": "a dog", "2.png": "a dog"}))
    with pytest.raises(ValueError, match=r"names a picture that is not there: '2\.png'"):
        embedders.find_subjects(*folders)


def test_a_missing_file_is_named_with_its_option(folders, tmp_path, monkeypatch, capsys):
    gone = {"clip": tmp_path / "gone.safetensors", "dino": tmp_path}
    monkeypatch.setattr(sys, "argv", ["encoders.py", *arguments(folders, gone)])
    with pytest.raises(SystemExit):
        bench.main()
    said = capsys.readouterr().err
    assert "--clip-vision: there is no file '" in said and "gone.safetensors" in said


@pytest.mark.comfy
def test_an_unfit_encoder_is_refused(comfyui, files, tmp_path):
    file, dino = tmp_path / "clip.bin", tmp_path / "dino"
    torch.save({"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(1), "other": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"clip\.bin' has no text_projection\.weight"):
        embedders.load_clip(file)
    with pytest.raises(ValueError, match=r"clip\.bin' has no visual_projection\.weight"):
        embedders.load_clip_vision(file)
    torch.save({"visual_projection.weight": torch.ones(1), "other": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="holds no CLIP image encoder that ComfyUI knows"):
        embedders.load_clip_vision(file)
    with pytest.raises(ValueError, match=r"There is no '.*config\.json'"):
        embedders.load_dino(dino)
    shutil.copytree(files["dino"], dino)
    config = json.loads((dino / "config.json").read_text())
    (dino / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks weights of its model: .*layer"):
        embedders.load_dino(dino)
    (dino / "config.json").write_text(json.dumps(config | {"model_type": "dinov2"}))
    with pytest.raises(ValueError, match="of type dinov2, and DINO's is vit"):
        embedders.load_dino(dino)
