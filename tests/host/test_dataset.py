"""LoadSAInjectDataset: folders as people have them, and as OneTrainer and kohya lay them out."""

import logging
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SIDE = 64


@pytest.fixture
def folder(comfy_host, pack_nodes):
    """An empty folder inside `input`."""
    path = comfy_host.base / "input" / "dataset-test"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def load(comfy_host, folder):
    def run(name: str = folder.name, **inputs):
        return comfy_host.execute("LoadSAInjectDataset", folder=name, **inputs)

    return run


def save(path: Path, red: int = 200, size: tuple[int, int] = (SIDE, SIDE), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 90, 40)).save(path, **options)
    return path


def reds(images) -> list[int]:
    return [round(image[0, 0, 0, 0].item() * 255) for image in images]


def half_mask(left: bool = True) -> Image.Image:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[:, slice(0, 32) if left else slice(32, 64)] = 255
    return Image.fromarray(pixels)


def png_claiming(width: int, height: int) -> bytes:
    """A valid header of a picture of any size, and nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --- which files, in which order --------------------------------------------------------------------------------------


def test_order_is_natural_and_ignores_case(folder, load):
    names = ["b10.png", "B2.PNG", "a.JPG", "é.png", "b1.jpeg", "中.webp", "Z.png", "_.png"]
    for number, name in enumerate(names):
        save(folder / name, 20 + 20 * number, **({"lossless": True} if name.endswith("webp") else {}))
    images, captions, masks = load()
    order = ["_.png", "a.JPG", "b1.jpeg", "B2.PNG", "b10.png", "Z.png", "é.png", "中.webp"]
    assert reds(images) == pytest.approx([20 + 20 * names.index(name) for name in order], abs=3)
    assert len(captions) == len(masks) == len(names)


def test_order_and_captions_do_not_depend_on_how_accents_are_stored(folder, load):
    """macOS hands over names in which accents are characters of their own."""
    save(folder / unicodedata.normalize("NFD", "é1.png"), 10)
    (folder / unicodedata.normalize("NFC", "é1.txt")).write_text("one", encoding="utf-8")
    save(folder / "f.png", 20)
    images, captions, _ = load()
    assert reds(images) == [20, 10] and captions == ["", "one"]


def test_files_that_systems_leave_behind_are_ignored(folder, load, caplog):
    save(folder / "a.png")
    for name in ("._a.png", ".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.md", "__MACOSX/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    (folder / "folder.png").mkdir()
    images, _, _ = load()
    assert len(images) == 1 and "Left out" not in caplog.text


def test_kohya_folders_are_read_and_their_number_does_not_repeat_pictures(folder, load, comfy_host):
    save(folder / "own.png", 10)
    save(folder / "10_sainj toy" / "a.png", 20)
    (folder / "10_sainj toy" / "a.txt").write_text("a sainj toy")
    save(folder / "2_sainj toy" / "b.png", 30)
    save(folder / "another" / "c.png", 40)
    images, captions, _ = load()
    assert reds(images) == [10, 30, 20] and captions == ["", "", "a sainj toy"]
    assert reds(load(f"{folder.name}/10_sainj toy")[0]) == [20]


def test_two_pictures_of_one_name_share_caption_and_mask(folder, load):
    save(folder / "a.png", 10)
    save(folder / "a.jpg", 200)
    (folder / "a.txt").write_text("text")
    half_mask().save(folder / "a_mask.png")
    images, captions, masks = load()
    assert len(images) == 2 and captions == ["text", "text"] and torch.equal(masks[0], masks[1])


# --- pictures of every kind -------------------------------------------------------------------------------------------


UPRIGHT = {  # EXIF orientation: what to do with the stored pixels
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_phone_pictures_stand_upright_as_load_image_shows_them(folder, load, comfy_host, orientation):
    pixels = np.zeros((32, SIDE, 3), np.uint8)
    pixels[:16, :16] = 255  # one corner is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "phone.jpg", exif=exif, quality=95, subsampling=0)
    (image,), _, (mask,) = load()
    upright = torch.from_numpy(UPRIGHT[orientation](pixels).copy()) / 255
    assert image.shape == (1, *upright.shape) and (image - upright).abs().max() < 0.05
    assert mask.shape == image.shape[:3]
    if orientation in (1, 3, 6, 8):  # newer hosts leave the mirrored ones, which no camera writes, as they are stored
        shutil.copy(folder / "phone.jpg", comfy_host.base / "input" / "phone.jpg")
        shown, _ = comfy_host.execute("LoadImage", image="phone.jpg")
        assert shown.shape == image.shape and (image - shown).abs().max() < 0.05


def test_transparency_becomes_a_mask_that_is_white_where_the_subject_is(folder, load):
    pixels = np.full((SIDE, SIDE, 4), 255, np.uint8)
    pixels[:, 32:, 3] = 0
    Image.fromarray(pixels, "RGBA").save(folder / "a.png")
    save(folder / "b.png")
    (image, _), _, (mask, whole) = load()
    assert image.shape == (1, SIDE, SIDE, 3) and mask.shape == (1, SIDE, SIDE)
    assert (mask[..., :32] == 1).all() and (mask[..., 32:] == 0).all() and (whole == 1).all()
    assert (image[..., :32, :] == 1).all() and (image[..., 32:, :] == 0.5).all()


RAMP = np.linspace(0, 255, SIDE, dtype=np.uint8)[None].repeat(SIDE, 0)
GREY_RAMP = Image.fromarray(RAMP)
OPAQUE_LEFT = half_mask()


def with_transparent_colour(picture: Image.Image, colour) -> Image.Image:
    picture.info["transparency"] = colour
    return picture


KINDS = {
    "16-bit grey.png": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257),
    "16-bit grey.tif": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257),
    "32-bit float.tif": lambda: Image.fromarray(RAMP.astype(np.float32) / 255),
    "grey.png": lambda: GREY_RAMP,
    "grey.jpg": lambda: GREY_RAMP,
    "palette.png": lambda: GREY_RAMP.convert("RGB").quantize(256),
    "palette.gif": lambda: GREY_RAMP.convert("RGB").quantize(256),
    "cmyk.jpg": lambda: GREY_RAMP.convert("RGB").convert("CMYK"),
    "cmyk.tif": lambda: GREY_RAMP.convert("RGB").convert("CMYK"),
    "ycbcr.tif": lambda: GREY_RAMP.convert("RGB").convert("YCbCr"),
    "lossless.webp": lambda: GREY_RAMP.convert("RGB"),
    "windows.bmp": lambda: GREY_RAMP.convert("RGB"),
    "targa.tga": lambda: GREY_RAMP.convert("RGB"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_shows_the_same_ramp(folder, load, name):
    KINDS[name]().save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    (image,), _, (mask,) = load()
    expected = torch.from_numpy(RAMP.copy()).float() / 255
    assert image.shape == (1, SIDE, SIDE, 3) and image.dtype == torch.float32
    assert (image[0] - expected[..., None]).abs().max() < 0.03 and (mask == 1).all()


@pytest.mark.parametrize("name", ["dark.png", "dark.tif", "dark float.tif"])
def test_dark_picture_of_many_bits_stays_dark(folder, load, name):
    """Its brightest pixel is no white."""
    dark = RAMP.astype(np.float32) / 255 * 0.25
    pixels = dark if "float" in name else (dark * 65535).astype(np.uint16)
    Image.fromarray(pixels).save(folder / name)
    (image,), _, _ = load()
    assert (image[0] - torch.from_numpy(dark)[..., None]).abs().max() < 0.01


def test_one_bit_picture_is_black_and_white(folder, load):
    half_mask().convert("1").save(folder / "a.png")
    (image,), _, _ = load()
    assert (image[..., :32, :] == 1).all() and (image[..., 32:, :] == 0).all()


def palette_with_transparency() -> Image.Image:
    picture = Image.new("P", (SIDE, SIDE), 0)
    picture.putpalette([200, 0, 0, 0, 0, 200])
    picture.paste(1, (32, 0, SIDE, SIDE))
    return with_transparent_colour(picture, 1)


CUT_OUTS = {
    "grey and alpha.png": lambda: Image.merge("LA", (Image.new("L", (SIDE, SIDE), 200), OPAQUE_LEFT)),
    "rgb and alpha.webp": lambda: Image.merge(
        "RGBA", (*Image.new("RGB", (SIDE, SIDE), (200, 0, 0)).split(), OPAQUE_LEFT)
    ),
    "palette.png": palette_with_transparency,
    "palette.gif": palette_with_transparency,
    "colour key.png": lambda: with_transparent_colour(
        Image.merge("RGB", [OPAQUE_LEFT.point(lambda v: v and 200), *[Image.new("L", (SIDE, SIDE))] * 2]), (0, 0, 0)
    ),
    "grey key.png": lambda: with_transparent_colour(OPAQUE_LEFT.point(lambda v: v and 200), 0),
}


@pytest.mark.parametrize("name", CUT_OUTS)
def test_every_kind_of_transparency_becomes_a_mask(folder, load, name):
    picture = CUT_OUTS[name]()
    options = {"transparency": picture.info["transparency"]} if "transparency" in picture.info else {}
    picture.save(folder / name, **options, **({"lossless": True} if name.endswith("webp") else {}))
    (image,), _, (mask,) = load()
    assert mask[..., :30].min() > 0.99 and mask[..., 34:].max() < 0.01
    assert image[..., :30, 0].mean() == pytest.approx(200 / 255, abs=0.02)
    assert image[..., 34:, :].mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp", "pages.tif"])
def test_first_frame_of_an_animated_file(folder, load, name):
    first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ((200, 90, 40), (0, 0, 255)))
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(folder / name, save_all=True, append_images=[second], **options)
    images, _, _ = load()
    assert reds(images) == pytest.approx([200], abs=3)


def rotated_primaries() -> bytes:
    """PIL's sRGB profile with the columns of red and blue exchanged, so that red comes out blue."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_colour_profile_is_converted_to_srgb(folder, load, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    save(folder / name, icc_profile=rotated_primaries(), **options)
    (image,), _, _ = load()
    red, green, blue = (image[0, 0, 0] * 255).tolist()
    assert (red, green, blue) == pytest.approx((40, 90, 200), abs=4)


def test_colour_profile_that_does_not_fit_is_ignored_and_told(folder, load, caplog):
    from PIL import ImageCms

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, profile in (("a.png", b"no profile"), ("b.png", lab)):
        save(folder / name, icc_profile=profile)
    with caplog.at_level(logging.INFO):
        images, _, _ = load()
    assert reds(images) == [200, 200] and caplog.text.count("could not be used") == 2


def test_large_picture_is_made_smaller_with_its_mask(folder, load, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.host.picture_file.ENOUGH_PIXELS", 64 * 64)
    save(folder / "a.png", size=(256, 128))
    half_mask().resize((256, 128)).save(folder / "a_mask.png")
    palette_with_transparency().resize((256, 256)).save(folder / "b.png", transparency=1)
    (wide, square), _, (mask, alpha) = load()
    assert wide.shape == (1, 45, 90, 3) and mask.shape == (1, 45, 90) and mask[..., :40].min() == 1
    assert square.shape == (1, 64, 64, 3) and alpha[..., :30].min() > 0.98 and alpha[..., 34:].max() < 0.02


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_of_every_spelling(folder, load):
    texts = {
        "a": b"a [trigger] toy",
        "b": b"\xef\xbb\xbfwith a mark, [Trigger]",
        "c": "ünïcode 中文 [TRIGGER]".encode(),
        "d": "from Notepad".encode("utf-16"),
        "e": b"  two\r\nlines \n",
        "f": b"",
    }
    for name, data in texts.items():
        save(folder / f"{name}.png")
        (folder / f"{name}.{'TXT' if name == 'a' else 'txt'}").write_bytes(data)
    save(folder / "g.png")
    (folder / "g.caption").write_bytes(b"kohya's own")
    save(folder / "h.png")
    (folder / "h.png.txt").write_bytes(b"after the whole name")
    save(folder / "i.png")
    _, captions, _ = load(placeholder_token=" xyz ")
    assert captions[:3] == ["a xyz toy", "with a mark, xyz", "ünïcode 中文 xyz"]
    assert captions[3:] == ["from Notepad", "two lines", "", "kohya's own", "after the whole name", ""]
    assert load(placeholder_token="")[1][0] == "a [trigger] toy"
    assert load(placeholder_token=r"\1")[1][0] == r"a \1 toy"


def test_caption_in_the_systems_encoding(folder, load, monkeypatch, caplog):
    import locale

    save(folder / "a.png")
    (folder / "a.txt").write_bytes("玩具".encode("gbk"))
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale=True: "gbk")
    assert load()[1] == ["玩具"]
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale=True: "utf-8")
    assert "\ufffd" in load()[1][0]
    assert "a.txt is not UTF-8" in caplog.text


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a-masklabel.png", "a_mask.png", "A_MASK.PNG", "a-masklabel.jpg"])
def test_mask_files_are_masks_and_never_pictures(folder, load, name):
    save(folder / "a.jpg", 50)
    save(folder / "b.jpg", 200)
    half_mask().save(folder / name)
    save(folder / "a-condlabel.png")
    images, _, (mask, whole) = load()
    assert len(images) == 2 and (whole == 1).all()
    assert mask.shape == (1, SIDE, SIDE) and mask[..., :28].min() > 0.9 and mask[..., 36:].max() < 0.1


def test_mask_file_and_transparency_both_count(folder, load):
    pixels = np.full((SIDE, SIDE, 4), 255, np.uint8)
    pixels[32:, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(folder / "a.png")
    half_mask().save(folder / "a-masklabel.png")
    _, _, (mask,) = load()
    assert (mask[:, :32, :32] == 1).all() and mask.sum() == 32 * 32


def test_mask_of_another_size_is_fitted_and_of_another_shape_left_out(folder, load, caplog):
    save(folder / "a.png", 10)
    half_mask().resize((32, 32)).save(folder / "a_mask.png")
    for name in ("b", "c", "d", "e"):
        save(folder / f"{name}.png", 20, size=(SIDE, 32))
    half_mask().resize((32, SIDE)).save(folder / "b_mask.png")  # as the camera held it
    (folder / "c_mask.png").write_bytes(b"no picture")
    Image.new("L", (SIDE, 32)).save(folder / "d_mask.png")  # black
    images, _, masks = load()
    assert reds(images) == [10, 20] and masks[0].shape == (1, SIDE, SIDE) and masks[0][..., :30].min() > 0.98
    assert "b.png: its mask b_mask.png cannot be used, it is 32x64 pixels and the picture 64x32: it lies" in caplog.text
    assert "c.png: its mask c_mask.png cannot be used, it is no picture" in caplog.text
    assert "d.png: its mask leaves nothing of it" in caplog.text


def test_mask_without_a_picture_is_named(folder, load, caplog):
    save(folder / "a.png")
    save(folder / "gas_mask.png")
    assert len(load()[0]) == 1
    assert "'gas_mask.png' is a mask, but there is no picture for it" in caplog.text


# --- broken files -----------------------------------------------------------------------------------------------------


def test_broken_files_are_named_and_the_others_read(folder, load, caplog, comfy_host, monkeypatch):
    import server

    save(folder / "good.png", 10)
    whole = save(folder / "truncated.jpg", size=(512, 512)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "bomb.png").write_bytes(png_claiming(60_000, 60_000))
    (folder / "large.png").write_bytes(png_claiming(16_000, 12_000))
    save(folder / "dot.png", size=(1, 1))
    save(folder / "strip.png", size=(2000, 20))
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "camera.dng").write_bytes(whole)
    Image.new("RGBA", (SIDE, SIDE)).save(folder / "clear.png")
    texts = []
    monkeypatch.setattr(server.PromptServer.instance, "send_progress_text", lambda text, node_id: texts.append(text))
    images, captions, masks = load()
    assert reds(images) == [10] and len(captions) == len(masks) == 1
    said = {
        "truncated.jpg": "it is damaged (image file is truncated",
        "empty.png": "it is no picture, or damaged",
        "text.jpg": "it is no picture, or damaged",
        "bomb.png": "it claims more pixels than any picture has",
        "large.png": "it claims more pixels than any picture has: save it smaller",
        "dot.png": "it is only 1x1 pixels",
        "strip.png": "it is 2000x20 pixels, a strip",
        "phone.HEIC": "this Python cannot read HEIC: save it as PNG or JPEG",
        "camera.dng": "DNG is no finished picture: export it as PNG or JPEG",
        "clear.png": "it is transparent everywhere",
    }
    for name, reason in said.items():
        assert f"Left out of 'dataset-test': {name}: {reason}" in caplog.text
    assert texts[-1].startswith("1 picture, 0 captions, 0 masks; left out: ")


@pytest.mark.parametrize("limit", [None, 89_478_485])
def test_absurd_size_is_refused_whatever_another_pack_has_allowed(folder, load, monkeypatch, limit, caplog):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    (folder / "bomb.png").write_bytes(png_claiming(60_000, 60_000))
    whole = save(folder / "half.png", size=(512, 512)).read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    save(folder / "good.png", 10)
    assert reds(load()[0]) == [10]
    assert "bomb.png: it" in caplog.text and "half.png: it" in caplog.text


def test_damaged_exif_does_not_cost_the_picture(folder, load):
    save(folder / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert len(load()[0]) == 1


def test_nothing_but_broken_files_is_one_sentence(folder, load):
    for name in ("a.png", "b.jpg"):
        (folder / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"None of 2 pictures in 'dataset-test' can be used: a.png: .*; b.jpg: "):
        load()


def test_empty_folder_is_one_sentence(folder, load):
    with pytest.raises(ValueError, match=r"There are no pictures in 'dataset-test'\. Put 3 to 10 pictures"):
        load()
    save(folder / "robot" / "a.png")
    with pytest.raises(ValueError, match=r"There are pictures in its sub-folder 'dataset-test/robot': choose that"):
        load()


# --- folders ----------------------------------------------------------------------------------------------------------


def offered(pack_nodes) -> list[str]:
    return pack_nodes["LoadSAInjectDataset"].INPUT_TYPES()["required"]["folder"][1]["options"]


def test_folders_inside_input_are_offered_nested_and_linked(folder, load, pack_nodes, tmp_path):
    save(folder / "Robot 2" / "front" / "a.png")
    (folder / "Robot 10").mkdir()
    (folder / ".cache").mkdir()
    (folder / "__MACOSX").mkdir()
    save(tmp_path / "elsewhere" / "b.png")
    os.symlink(tmp_path / "elsewhere", folder / "linked", target_is_directory=True)
    os.symlink(folder, folder / "loop", target_is_directory=True)
    ours = [name for name in offered(pack_nodes) if name.startswith("dataset-test/")]
    assert ours == [f"dataset-test/{name}" for name in ("linked", "Robot 2", "Robot 2/front", "Robot 10")]
    assert len(load("dataset-test/linked")[0]) == 1  # a link inside of input may lead elsewhere
    assert len(load("dataset-test\\Robot 2\\front")[0]) == 1  # as a workflow from Windows has it


@pytest.mark.parametrize("name", ["", ".", "..", "../input/dataset-test", "dataset-test/../..", "/etc", "a\0b", "gone"])
def test_folders_outside_of_input_and_vanished_ones_are_refused(folder, load, pack_nodes, name):
    with pytest.raises(ValueError, match=r"There is no folder '.*' inside .*input\. Choose another one"):
        load(name)
    assert "There is no folder" in pack_nodes["LoadSAInjectDataset"].validate_inputs(folder=name)


def test_fingerprint_follows_every_file_that_counts_and_no_other(folder, pack_nodes):
    def fingerprint() -> str:
        return pack_nodes["LoadSAInjectDataset"].fingerprint_inputs(folder=folder.name, placeholder_token="sainj")

    save(folder / "a.png")
    seen = [fingerprint()]
    (folder / "notes.md").write_text("not read")
    os.utime(folder / "a.png", (1, 1))
    assert fingerprint() == seen[0]
    for change in (
        lambda: save(folder / "a.png", 11),
        lambda: (folder / "a.txt").write_text("text"),
        lambda: half_mask().save(folder / "a_mask.png"),
        lambda: save(folder / "3_more" / "b.png"),
        lambda: (folder / "a_mask.png").unlink(),
        lambda: shutil.rmtree(folder),
    ):
        change()
        assert fingerprint() not in seen
        seen.append(fingerprint())


# --- with the other nodes ---------------------------------------------------------------------------------------------


def test_dataset_without_captions_and_masks_trains_as_plain_pictures(folder, load, comfy_host, load_checkpoint):
    model, clip, vae = load_checkpoint("sd15")
    for number in range(3):
        save(folder / f"{number}.png", 20 + 100 * number)
    images, captions, masks = load()
    inputs = {"model": model, "clip": clip, "vae": vae, "images": images, "resolution": 64, "steps": 2, "rank": 2}
    inputs |= {"alpha": 2.0, "previews": 0, "sample_every": 0}
    _, _, plain, *_ = comfy_host.execute("TrainSAInjectAdapter", **inputs, file_name="dataset plain")
    _, _, full, *_ = comfy_host.execute(
        "TrainSAInjectAdapter", **inputs, captions=captions, masks=masks, file_name="dataset full"
    )
    assert full["loss"] == plain["loss"]


def test_dataset_node_through_the_prompt_api(server):
    folder = server.base / "input" / "data set é"
    for number in (1, 10, 2):
        save(folder / f"{number}.png", number * 20)
    graph = {
        "1": {"class_type": "LoadSAInjectDataset", "inputs": {"folder": folder.name, "placeholder_token": "sainj"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    assert folder.name in server.client.object_info("LoadSAInjectDataset")["input"]["required"]["folder"][1]["options"]
    shown = server.client.images(server.client.run(graph))
    assert [picture.getpixel((0, 0))[0] for picture in shown] == [20, 40, 200]

    save(folder / "3.png", 60)  # a new file runs the node again
    assert len(server.client.images(server.client.run(graph))) == 4
    graph["1"]["inputs"]["folder"] = "gone"
    with pytest.raises(Exception, match="There is no folder 'gone' inside"):
        server.client.run(graph)
