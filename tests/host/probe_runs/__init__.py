"""Trainings that a test tells to the server, which then serves and sends them. Their names begin with `told-`."""

import asyncio
import io

from aiohttp import web
from PIL import Image
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}
NAME = "{run:told-.*}"

routes = PromptServer.instance.routes
runs: dict = {}
asked: list = []


@routes.post("/probe/run")
async def put_run(request):
    run = await request.json()
    runs[run["run"]] = run
    return web.json_response({})


@routes.post("/probe/send")
async def send(request):
    """A message over the socket to everybody who is connected."""
    message = await request.json()
    PromptServer.instance.send_sync(message["type"], message["data"])
    return web.json_response({})


@routes.post("/probe/text")
async def text(request):
    """A line of text at the foot of a node, as nodes of ours show it."""
    body = await request.json()
    PromptServer.instance.send_progress_text(body["text"], body["node"])
    return web.json_response({})


@routes.get("/probe/asked")
async def get_asked(request):
    return web.json_response(asked)


@routes.get(f"/sa_inject/runs/{NAME}/samples/{{step}}/{{index}}")
async def get_sample(request):
    side = min(int(request.query.get("size", 512)), 512)
    file = io.BytesIO()
    Image.new("RGB", (side, side), (int(request.match_info["step"]) % 256, 80, 160)).save(file, "WEBP")
    return web.Response(body=file.getvalue(), content_type="image/webp")


@routes.get(f"/sa_inject/runs/{NAME}")
async def get_run(request):
    """The run as it was told. `answers_after` seconds go by until the page has it, as on a busy machine."""
    run = runs.get(request.match_info["run"])
    answer = web.json_response(run)
    if run and (wait := run.pop("answers_after", 0)):
        await asyncio.sleep(wait)
    return answer


@routes.post(f"/sa_inject/runs/{NAME}/{{wish}}")
async def post_wish(request):
    run = runs.get(request.match_info["run"])
    if run is None:
        return web.json_response({"error": "There is no such run."}, status=404)
    if run["phase"] == "done":
        return web.json_response({"error": "This training has ended."}, status=409)
    asked.append([run["run"], request.match_info["wish"]])
    return web.json_response({})
