"""HTTP routes about adapters. Names are looked up in the host's list and never used as paths."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from server import PromptServer

from .adapter_cards import adapter_card, adapter_cards, listed_metadata
from .thumbnail import thumbnail_of

SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}


def register_adapter_routes(architecture_of: Callable[[str, str], str | None]) -> None:
    """Call this once, before the host adds its routes.

    architecture_of: what a file of a folder ("checkpoints", "sdxl.safetensors") is, where that is known.
    """
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    routes = server.routes
    if any(getattr(route, "path", None) == "/sa_inject/adapters" for route in routes):
        return
    routes.get("/sa_inject/adapters")(list_adapters)
    routes.get("/sa_inject/adapters/{name}/thumbnail")(get_thumbnail)
    routes.get("/sa_inject/adapters/{name}")(get_adapter)

    async def get_architecture(request: web.Request) -> web.Response:
        asked = request.query.get("folder", ""), request.query.get("name", "")
        return web.json_response({"architecture": await asyncio.to_thread(architecture_of, *asked)})

    routes.get("/sa_inject/architecture")(get_architecture)


async def list_adapters(request: web.Request) -> web.Response:
    """All cards, or the one of `?name=`. null if there is none, because browsers log every error status."""
    name = request.query.get("name")
    if name is None:
        return web.json_response({"adapters": await asyncio.to_thread(adapter_cards)})
    card = await asyncio.to_thread(adapter_card, name)
    return web.json_response({"adapters": [] if card is None else [card]})


async def get_adapter(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    card = await asyncio.to_thread(adapter_card, name)
    if card is None:
        return _missing("There is no such adapter in models/sa_inject.")
    return web.json_response(card)


async def get_thumbnail(request: web.Request) -> web.Response:
    picture = await asyncio.to_thread(_thumbnail, request.match_info["name"])
    if picture is None:
        return _missing("This adapter has no thumbnail.")
    return web.Response(body=picture, content_type="image/webp", headers=SAFE)


def _thumbnail(name: str) -> bytes | None:
    metadata = listed_metadata(name)
    return None if metadata is None else thumbnail_of(metadata)


def _missing(why: str) -> web.Response:
    return web.json_response({"error": why}, status=404)
