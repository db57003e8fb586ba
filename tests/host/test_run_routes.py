"""The browser asks about a training and has two wishes, over HTTP on the real server."""

import io
import json
import time
import urllib.error
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

from sa_inject.trainer.time_left import MEASURED_STEPS
from tests.host.client import HostClient


@pytest.fixture(scope="module")
def graph(server, tmp_path_factory) -> dict:
    path: Path = tmp_path_factory.mktemp("pictures") / "seen.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)
    name = server.client.upload_image(path)
    inputs = {
        **{"placeholder_token": "sainj", "class_word": "toy", "resolution": 64, "steps": 3000, "rank": 2, "alpha": 2.0},
        **{"lora_learning_rate": 1e-4, "token_learning_rate": 1e-4, "token_vectors": 1, "batch_size": 1},
        **{"gradient_accumulation": 1, "reference_mode": "clean", "precision": "auto", "gradient_checkpointing": False},
        **{"seed": 4, "file_name": "toys/told", "previews": 0, "sample_every": 0},
    }
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.ckpt"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": name}},
        "3": {"class_type": "TrainSAInjectAdapter", "inputs": {**links, **inputs}},
    }


def address(run: str, rest: str = "") -> str:
    return f"/sa_inject/runs/{urllib.parse.quote(run, safe='')}{rest}"


def refused(client: HostClient, path: str, body: bytes | None = None) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as error:
        client.request(path, body)
    return error.value.code, json.loads(error.value.read())["error"]


def steps_of(events: list[dict]) -> list[dict]:
    return [event["data"] for event in events if event["type"] == "sa_inject.training"]


def test_a_training_is_told_sampled_and_finished_by_its_browser(server, graph):
    client, other = server.client, HostClient(server.client.address)
    with other.listen() as others, client.listen() as events:
        prompt_id = client.queue(graph)
        while not any(data["step"] > 1 + MEASURED_STEPS for data in steps_of(events)):
            assert server.why_dead() is None
            time.sleep(0.05)
        running = client.get(address("toys/told"))
        assert running["phase"] in ("training", "saving") and running["steps"] == 3000 and running["left"] > 0
        assert json.loads(client.request(address("toys/told", "/sample"), b"")) == {"ok": True}
        while not any(data["sample"] is not None for data in steps_of(events)):
            assert server.why_dead() is None
            time.sleep(0.05)
        assert json.loads(client.request(address("toys/told", "/finish"), b"")) == {"ok": True}
        outputs = client.wait(prompt_id, timeout=300)["outputs"]
        time.sleep(0.2)
    shown = steps_of(events)
    assert {data["run"] for data in shown} == {"toys/told"} and {data["node"] for data in shown} == {"3"}
    assert {data["prompt_id"] for data in shown} == {prompt_id}
    assert shown[-1]["phase"] == "done" and shown[-1]["step"] < 3000
    assert [data["phase"] for data in shown[:2]] == ["reading", "encoding"]
    assert {"training", "sampling", "saving"} <= {data["phase"] for data in shown}
    assert [data["updated_at"] for data in shown] == sorted(data["updated_at"] for data in shown)
    assert steps_of(others) == []

    run = client.get(address("toys/told"))
    (summary,) = outputs["3"]["sa_inject_training"]
    assert summary["samples"] == run["samples"] and len(summary["points"]) <= 200
    assert run["phase"] == "done" and run["step"] == shown[-1]["step"]
    assert running["updated_at"] < shown[-1]["updated_at"] < run["updated_at"]
    (sample,) = run["samples"]
    assert sample["prompts"] == ["a photo of sainj toy"] and sample["images"] == [0]
    for size, side in (("", 64), ("?size=32", 32), ("?size=100000", 64)):
        data = client.request(address("toys/told", f"/samples/{sample['step']}/0{size}"))
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, max(picture.size)) == ("WEBP", side)
    assert refused(client, address("toys/told", "/finish"), b"") == (409, "This training has ended.")
    assert (server.base / "models/sa_inject/toys/told.safetensors").exists()


@pytest.mark.parametrize(
    "run", ["missing", "../told", "toys/../toys/told", "/etc/passwd", "toys\\told", "toys", "told.training", "%2e%2e"]
)
def test_names_are_looked_up_and_never_paths(client, run):
    assert client.get(address(run)) is None
    assert refused(client, address(run, "/samples/0/0"))[0] == 404
    assert refused(client, address(run, "/finish"), b"")[0] == 404


@pytest.mark.parametrize("rest", ["/samples/x/0", "/samples/-1/0", "/samples/0/99", "/samples/999/0?size=x"])
def test_samples_that_do_not_exist_are_refused(client, rest):
    assert refused(client, address("toys/told", rest))[0] == 404
