"""A small client of the host's HTTP API, for tests: queue a graph, wait for it, and get errors as text."""

import asyncio
import io
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

Graph = dict[str, dict[str, Any]]
PROGRESS_TEXT = (3).to_bytes(4, "big")  # how a binary message with the text under a node begins


class PromptFailed(Exception):
    """A node raised, or the host refused the graph before it ran any."""

    def __init__(self, node_id: str | None, node_type: str | None, message: str, exception_type: str = ""):
        super().__init__(f"node {node_id} ({node_type}): {exception_type} {message}")
        self.node_id, self.node_type, self.message, self.exception_type = node_id, node_type, message, exception_type


class PromptInterrupted(PromptFailed):
    """The run was cancelled."""


class HostClient:
    def __init__(self, address: str, why_dead: Callable[[], str | None] = lambda: None):
        """why_dead: called while waiting; a text it returns ends the wait with a RuntimeError."""
        self.address, self.why_dead, self.client_id = address, why_dead, uuid.uuid4().hex

    def request(self, path: str, body: bytes | dict | None = None, content_type: str = "application/json") -> bytes:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": content_type} if data is not None else {}
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The description of one node, or of all by their ids."""
        if node is None:
            return self.get("/object_info")
        return self.get(f"/object_info/{urllib.parse.quote(node)}")[node]

    def queue(self, graph: Graph, **extra_data) -> str:
        """Queue a graph in API format and return its prompt id. extra_data: as in extra_pnginfo={"workflow": ...}."""
        body = {"prompt": graph, "client_id": self.client_id, "extra_data": extra_data}
        try:
            return json.loads(self.request("/prompt", body))["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise refusal(json.loads(error.read()), graph) from None

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """The history entry of a finished prompt: its `outputs` by node id, and its `status`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if words := self.why_dead():
                raise RuntimeError(words)
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return raise_failure(entry)
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} took more than {timeout} s")

    def run(self, graph: Graph, timeout: float = 120, **extra_data) -> dict[str, dict[str, Any]]:
        """What the nodes of a graph showed, by node id."""
        return self.wait(self.queue(graph, **extra_data), timeout)["outputs"]

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def upload_image(self, path: Path, subfolder: str = "") -> str:
        """Put a picture into the host's input folder. -> the name for LoadImage"""
        boundary = uuid.uuid4().hex
        head = f"--{boundary}\r\nContent-Disposition: form-data; name="
        fields = f'{head}"subfolder"\r\n\r\n{subfolder}\r\n{head}"overwrite"\r\n\r\ntrue\r\n'
        picture = f'{head}"image"; filename="{path.name}"\r\n\r\n'
        body = (fields + picture).encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        reply = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return "/".join(filter(None, (reply["subfolder"], reply["name"])))

    def images(self, outputs: dict[str, dict[str, Any]]) -> list[Image.Image]:
        """Every picture that a run showed, in the order of the nodes."""
        shown = [image for node in outputs.values() for image in node.get("images", [])]
        return [Image.open(io.BytesIO(self.request(f"/view?{urllib.parse.urlencode(image)}"))) for image in shown]

    @contextmanager
    def listen(self) -> Iterator[list[dict[str, Any]]]:
        """A list that grows with the host's messages: {"type": "progress", "data": {...}}, "executing", ..."""
        events: list[dict[str, Any]] = []
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def read() -> None:
            url = f"http://{self.address}/ws?clientId={self.client_id}"
            async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
                ready.set()
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        events.append(json.loads(message.data))
                    elif message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == PROGRESS_TEXT:
                        events.append(progress_text(message.data))

        task = loop.create_task(read())
        thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])), daemon=True)
        thread.start()
        assert ready.wait(timeout=30), "the host's websocket does not answer"
        try:
            yield events
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join(timeout=10)
            loop.close()


def progress_text(message: bytes) -> dict[str, Any]:
    length = int.from_bytes(message[4:8], "big")
    node, text = message[8 : 8 + length].decode(), message[8 + length :].decode()
    return {"type": "progress_text", "data": {"node": node, "text": text}}


def refusal(reply: dict[str, Any], graph: Graph) -> PromptFailed:
    for node_id, node in (reply.get("node_errors") or {}).items():
        words = "; ".join(f"{error['message']}: {error['details']}" for error in node["errors"])
        return PromptFailed(node_id, node["class_type"], words, node["errors"][0]["type"])
    error = reply["error"]
    node_id = (error.get("extra_info") or {}).get("node_id")
    node_type = graph.get(str(node_id), {}).get("class_type")
    return PromptFailed(node_id, node_type, f"{error['message']}: {error['details']}", error["type"])


def raise_failure(entry: dict[str, Any]) -> dict[str, Any]:
    for kind, data in (entry.get("status") or {}).get("messages", []):
        if kind == "execution_interrupted":
            raise PromptInterrupted(data["node_id"], data["node_type"], "interrupted")
        if kind == "execution_error":
            words = data["exception_message"].strip()
            raise PromptFailed(data["node_id"], data["node_type"], words, data["exception_type"])
    return entry
