"""Adapter files as strangers might send them. Only their headers matter, so their tensors have one number."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

from PIL import Image

SCRIPT = "<script>window.taken=1</script><img/src=x/onerror=window.taken=1>"


def write_adapter(path: Path, **changes: str) -> None:
    """A file whose header is an adapter's, with some entries changed."""
    import numpy
    from safetensors.numpy import save_file

    metadata = {
        "format": "sa_inject",
        "format_version": "1",
        "architecture": "SD1.x",
        "blocks": json.dumps([["input", 1, 0, "input_blocks.1.1.transformer_blocks.0.attn1", 320, 320]]),
        "rank": "4",
        "alpha": "4.0",
        "reference_mode": "clean",
        "placeholder": "sainj",
        "class_word": "toy",
        "training": json.dumps({"steps": 40, "resolution": 128}),
        "date": "2026-11-29T10:00:00+00:00",
        "modelspec.thumbnail": data_url(picture((200, 40, 40))),
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"nothing": numpy.zeros(1, numpy.float32)}, path, metadata=metadata)


def picture(colour: tuple[int, int, int], side: int = 256) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "JPEG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def enormous_png() -> bytes:
    """A few hundred bytes of a picture file that claims 50,000 x 50,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_shapes_alone(path: Path) -> None:
    """A file with the tensor shapes of the tiny checkpoint `.ckpt` beside it, without any number."""
    import torch

    tensors = torch.load(path.with_suffix(".ckpt"), map_location="meta", weights_only=True)
    tensors = tensors.get("state_dict", tensors)
    header = {
        key: {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [0, 0]}
        for key, tensor in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
