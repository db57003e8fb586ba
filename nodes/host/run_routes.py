"""HTTP routes about trainings. Names are looked up in lists and never used as paths."""

from __future__ import annotations

import asyncio
import io as bytes_io

from aiohttp import web
from PIL import Image
from server import PromptServer

from .training_runs import known_run, running, sample_file

SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-cache"}
SIDES = range(16, 2049)  # pixels; the allowed sizes of a picture


def register_run_routes() -> None:
    """Call this once, before the host adds its routes."""
    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", None) == "/sa_inject/runs/{run}" for route in server.routes):
        return
    server.routes.get("/sa_inject/runs/{run}")(get_run)
    server.routes.get("/sa_inject/runs/{run}/samples/{step}/{index}")(get_sample)
    server.routes.post("/sa_inject/runs/{run}/finish")(post_finish)
    server.routes.post("/sa_inject/runs/{run}/sample")(post_sample)


async def get_run(request: web.Request) -> web.Response:
    """The state of a training. null if there is none, because browsers log every error status."""
    return web.json_response(await asyncio.to_thread(known_run, request.match_info["run"]))


async def get_sample(request: web.Request) -> web.Response:
    asked = request.match_info
    try:
        step, index, side = int(asked["step"]), int(asked["index"]), int(request.query.get("size", SIDES[-1]))
    except ValueError:
        return _error(404, "A step, an index and a size are whole numbers.")
    picture = await asyncio.to_thread(_sample, asked["run"], step, index, min(max(side, SIDES[0]), SIDES[-1]))
    if picture is None:
        return _error(404, "There is no such sample.")
    return web.Response(body=picture, content_type="image/webp", headers=SAFE)


async def post_finish(request: web.Request) -> web.Response:
    """End the training after the current step."""
    return _set_flag(request.match_info["run"], "wants_finish")


async def post_sample(request: web.Request) -> web.Response:
    """Draw samples after the current step."""
    return _set_flag(request.match_info["run"], "wants_sample")


def _set_flag(name: str, flag: str) -> web.Response:
    run = running(name)
    if run is None:
        return _error(404, "There is no such training in this ComfyUI.")
    if run.is_over:
        return _error(409, "This training has ended.")
    setattr(run, flag, True)
    return web.json_response({"ok": True})


def _sample(name: str, step: int, index: int, side: int) -> bytes | None:
    path = sample_file(name, step, index)
    if path is None:
        return None
    file = bytes_io.BytesIO()
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side))
    small.save(file, "WEBP", quality=90)
    return file.getvalue()


def _error(status: int, why: str) -> web.Response:
    return web.json_response({"error": why}, status=status)
