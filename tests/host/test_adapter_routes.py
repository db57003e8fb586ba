"""What the server tells a browser of adapter files, most of all of those that mean harm."""

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from tests.host.strange_adapters import SCRIPT, data_url, enormous_png, picture, write_adapter, write_shapes_alone


@pytest.fixture(scope="module")
def folder(server):
    found = server.base / "models" / "sa_inject"
    found.mkdir(exist_ok=True)
    before = set(found.rglob("*.safetensors"))
    yield found
    for path in set(found.rglob("*.safetensors")) - before:
        path.unlink()


def quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def fetch(server, path: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(f"http://{server.client.address}{path}", timeout=30) as reply:
            return reply.status, dict(reply.headers), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def card(server, name: str) -> dict:
    status, headers, body = fetch(server, f"/sa_inject/adapters/{quoted(name)}")
    assert headers["Content-Type"].startswith("application/json")
    return {"status": status, **json.loads(body)}


def thumbnail(server, name: str) -> Image.Image | None:
    status, headers, body = fetch(server, f"/sa_inject/adapters/{quoted(name)}/thumbnail")
    if status == 404:
        return None
    assert status == 200 and headers["Content-Type"] == "image/webp" and headers["X-Content-Type-Options"] == "nosniff"
    found = Image.open(io.BytesIO(body))
    assert found.format == "WEBP" and max(found.size) <= 256
    return found


def test_card_tells_what_the_adapter_is(server, folder):
    write_adapter(folder / "cards/robot.safetensors")
    write_adapter(folder / "cards/robot.training/step-000020.safetensors")
    write_adapter(folder / "cards/robot.training/step-000100.safetensors")
    shown = card(server, "cards/robot.safetensors")
    assert shown["status"] == 200
    wanted = {
        "name": "cards/robot.safetensors",
        "placeholder_token": "sainj",
        "class_word": "toy",
        "architecture": "SD1.x",
        "steps": 40,
        "resolution": 128,
        "reference_mode": "clean",
        "date": "2026-11-29",
        "kept": [
            {"step": 20, "name": "cards/robot.training/step-000020.safetensors"},
            {"step": 100, "name": "cards/robot.training/step-000100.safetensors"},
        ],
    }
    assert {key: shown[key] for key in wanted} == wanted
    found = thumbnail(server, "cards/robot.safetensors")
    assert found is not None
    red, green, blue = found.convert("RGB").getpixel((100, 100))
    assert abs(red - 200) < 12 and abs(green - 40) < 12 and abs(blue - 40) < 12


def test_a_changed_file_has_another_card_and_a_deleted_one_none(server, folder):
    path = folder / "changed.safetensors"
    write_adapter(path, class_word="dog")
    before = card(server, path.name)
    write_adapter(path, class_word="elephant")
    after = card(server, path.name)
    assert (before["class_word"], after["class_word"]) == ("dog", "elephant")
    assert before["version"] != after["version"]
    path.unlink()
    assert card(server, path.name)["status"] == 404


@pytest.mark.parametrize(
    "name",
    [
        "../../main.py",
        "../checkpoints/sd15.ckpt",
        "/etc/passwd",
        "..\\..\\main.py",
        "C:/Windows/win.ini",
        "nothing.safetensors",
        "",
        ".",
        "robot.safetensors\x00",
        "x" * 5000,
    ],
)
def test_a_name_that_the_host_does_not_list_is_no_path(server, folder, name):
    for path in (f"/sa_inject/adapters/{quoted(name)}/thumbnail", f"/sa_inject/adapters/{quoted(name)}"):
        status, _, body = fetch(server, path)
        if name not in ("", "."):  # those end at another address
            assert status in (400, 404), body[:200]
        assert b"root:" not in body and b"import" not in body


@pytest.mark.parametrize("name", ["../../main.py", "/etc/passwd", "missing.safetensors"])
def test_architecture_is_told_of_listed_checkpoints_only(server, name):
    for folder in ("checkpoints", "custom_nodes", "..", ""):
        asked = urllib.parse.urlencode({"folder": folder, "name": name})
        assert json.loads(fetch(server, f"/sa_inject/architecture?{asked}")[2]) == {"architecture": None}


def test_script_and_paths_in_the_metadata_come_out_as_text(server, folder):
    word = SCRIPT.replace(" ", "")
    write_adapter(
        folder / "hostile.safetensors",
        placeholder=word,
        class_word=SCRIPT + "\u202e\x07",
        architecture="../../../../etc/passwd",
        date="<b>" * 1000,
        training=json.dumps({"steps": "<b>", "resolution": 10**30}),
    )
    shown = card(server, "hostile.safetensors")
    assert shown["placeholder_token"] == word and shown["class_word"] == SCRIPT
    assert shown["architecture"] == "../../../../etc/passwd"
    assert len(shown["date"]) <= 10 and shown["steps"] is None and shown["resolution"] is None


@pytest.mark.parametrize(
    "entry",
    {
        "markup": data_url(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image/svg+xml"),
        "html": data_url(b"<html><script>alert(1)</script>", "text/html"),
        "enormous": data_url(enormous_png(), "image/png"),
        "truncated": data_url(picture((1, 2, 3))[:200]),
        "text": SCRIPT,
        "address": "http://127.0.0.1/secret",
        "path": "../../../etc/passwd",
        "long": "data:image/jpeg;base64," + "A" * 5_000_000,
        "none": "",
    }.items(),
    ids=lambda entry: entry[0],
)
def test_a_thumbnail_that_is_no_small_picture_is_not_shown(server, folder, entry):
    name, text = entry
    write_adapter(folder / f"face-{name}.safetensors", **{"modelspec.thumbnail": text})
    started = time.monotonic()
    assert thumbnail(server, f"face-{name}.safetensors") is None
    assert time.monotonic() - started < 5
    assert server.why_dead() is None


def test_what_is_sent_is_never_what_the_file_holds(server, folder):
    data = picture((10, 200, 10), side=1000) + b"<script>alert(1)</script>"
    write_adapter(folder / "trailing.safetensors", **{"modelspec.thumbnail": data_url(data)})
    found = thumbnail(server, "trailing.safetensors")
    assert found is not None and found.size == (256, 256)
    assert b"script" not in fetch(server, "/sa_inject/adapters/trailing.safetensors/thumbnail")[2]


def test_a_header_that_claims_two_gigabytes_is_not_believed(server, folder):
    (folder / "claims.safetensors").write_bytes((2 * 2**30).to_bytes(8, "little") + b'{"x":')
    shown = card(server, "claims.safetensors")
    assert shown["status"] == 200 and "header" in shown["error"]
    assert thumbnail(server, "claims.safetensors") is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "pt"}, "not an SA-Inject adapter"),
        ({"format_version": "99"}, "99"),
        ({"rank": "-1"}, "rank"),
        ({"placeholder": "two words"}, "placeholder"),
        ({"training": "["}, "training"),
    ],
)
def test_a_file_that_cannot_be_loaded_says_so_on_its_card(server, folder, changes, why):
    write_adapter(folder / "useless.safetensors", **changes)
    assert why in card(server, "useless.safetensors")["error"]


def test_a_thousand_adapters_are_listed_within_a_second(server, folder):
    many = folder / "many"
    face = data_url(picture((90, 90, 200)))
    for number in range(1000):
        write_adapter(many / f"{number:04}.safetensors", workflow="x" * 30_000, **{"modelspec.thumbnail": face})
    try:
        times = []
        for _ in range(3):
            started = time.monotonic()
            listed = json.loads(fetch(server, "/sa_inject/adapters")[2])["adapters"]
            times.append(time.monotonic() - started)
        assert sum(one["name"].startswith("many") for one in listed) == 1000
        assert min(times) < 0.5  # known files; the first call reads a thousand headers
        assert times[0] < 2.0
    finally:
        for path in many.iterdir():
            path.unlink()
        many.rmdir()


@pytest.mark.parametrize(("file", "wanted"), [("sd15.safetensors", "SD1.x"), ("sdxl.safetensors", "SDXL")])
def test_architecture_of_a_checkpoint_is_known_from_its_header(server, file, wanted):
    asked = urllib.parse.urlencode({"folder": "checkpoints", "name": file})
    if not (server.base / "models" / "checkpoints" / file).exists():
        write_shapes_alone(server.base / "models" / "checkpoints" / file)
    assert json.loads(fetch(server, f"/sa_inject/architecture?{asked}")[2]) == {"architecture": wanted}
