"""The real server, as a process of its own on a temporary base directory."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.host.client import HostClient

MEMORY_FLAGS = {"--cpu", "--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram"}
LOG_TAIL = 60  # lines


class ServerProcess:
    """`with ServerProcess(...) as server: server.client.run(graph)`"""

    def __init__(self, comfyui: Path, base: Path, custom_nodes: Mapping[str, Path], arguments: Sequence[str] = ()):
        """custom_nodes: folders in custom_nodes/, by name, and their real paths.

        arguments: more for main.py. If none of them is about memory, the host gets --cpu on machines without CUDA.
        """
        self.comfyui, self.base, self.custom_nodes = comfyui, base, custom_nodes
        self.arguments = [*arguments]
        if not torch.cuda.is_available() and not MEMORY_FLAGS & set(arguments):
            self.arguments.append("--cpu")
        self.log_path = base / "server.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "ServerProcess":
        for name in ("models/checkpoints", "models/embeddings", "models/loras", "input", "output", "custom_nodes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, target in self.custom_nodes.items():
            link_folder(self.base / "custom_nodes" / name, target)
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        for name in self.custom_nodes:
            unlink_folder(self.base / "custom_nodes" / name)

    def start(self, timeout: float = 180) -> None:
        """Also called after `stop`, for a restart on the same base directory."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "main.py", "--base-directory", str(self.base), "--port", str(port)]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                cwd=self.comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            )
        self.client = HostClient(f"127.0.0.1:{port}", self.why_dead)
        deadline = time.monotonic() + timeout
        while True:
            if words := self.why_dead():
                raise RuntimeError(words)
            try:
                self.client.get("/system_stats")
                return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not answer within {timeout} s\n{self.log_tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def why_dead(self) -> str | None:
        code = self.process.poll() if self.process else None
        return None if code is None else f"the server ended with code {code}\n{self.log_tail()}"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-LOG_TAIL:])


def link_folder(link: Path, target: Path) -> None:
    if os.path.lexists(link):  # a killed process leaves it behind
        unlink_folder(link)
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))  # a symbolic link would need rights
    else:
        link.symlink_to(target, target_is_directory=True)


def unlink_folder(link: Path) -> None:
    """Remove the link before anything deletes the base directory, which would follow it."""
    if sys.platform == "win32":
        link.rmdir()
    else:
        link.unlink()
