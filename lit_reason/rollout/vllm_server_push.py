"""Two ways of weights into servers; both end in one `reload_weights` of each worker.

files   shard after shard into a folder that trainer and servers see, then one call; /dev/shm is memory
nccl    broadcast from the trainer's GPU, tensor after tensor; written against vLLM 0.32, unmeasured on a GPU
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lit_reason.errors import ConfigError, WeightSyncError
from lit_reason.rollout.process import BUCKET, buckets

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]
# Calls a method of our extension on every server: (method, what the i-th server gets).
Call = Callable[[str, Callable[[int], Sequence[Any]]], Awaitable[None]]


class Transfer(Protocol):
    async def send(self, tensors: Tensors, urls: Sequence[str], call: Call) -> None: ...


class Files:
    """Args: folder: seen under this name by trainer and servers."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(
                f"rollout.engine.folder={folder}: no such folder; it must be one that the servers see too"
            )

    async def send(self, tensors: Tensors, urls: Sequence[str], call: Call) -> None:
        _sweep(self.folder)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(os.getpid()), dir=self.folder))
        try:
            folder.chmod(0o755)  # the servers may be another user's
            try:
                files = await asyncio.to_thread(_written, tensors, folder)
            except (OSError, SafetensorError) as error:
                raise WeightSyncError(
                    f"the weights could not be written to {self.folder}: {error}. If it is full: rollout.engine.folder"
                ) from error
            await call("lit_load_files", lambda _: [str(folder), files])
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _prefix(pid: int | str) -> str:
    return f"lit_reason-weights-{socket.gethostname()}-{pid}-"


def _sweep(folder: Path) -> None:
    """Removes what trainers of this machine left that were killed in a push."""
    for left in folder.glob(_prefix("*") + "*"):
        pid = left.name.removeprefix(_prefix("").removesuffix("-")).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _written(tensors: Tensors, folder: Path) -> list[str]:
    files = []
    for bucket in buckets(tensors(), BUCKET):
        files.append(f"{len(files):05}.safetensors")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in bucket}, folder / files[-1])
    return files


class Nccl:
    """Args: device: the trainer's GPU. The group is made anew when other servers take part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._members: Sequence[str] = ()
        self._group: Any = None

    async def send(self, tensors: Tensors, urls: Sequence[str], call: Call) -> None:
        if tuple(urls) != self._members:
            await self._join(urls, call)
        table = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors()]
        await asyncio.gather(call("lit_load_nccl", lambda _: [table]), _aside(self._broadcast, tensors))

    async def _join(self, urls: Sequence[str], call: Call) -> None:
        from lit_reason.rollout.vllm_extension import communicator

        address, port, world = _address(urls[0]), _free_port(), len(urls) + 1
        mine = _aside(communicator, address, port, 0, world, self.device)
        _, self._group = await asyncio.gather(call("lit_join", lambda i: [address, port, i + 1, world]), mine)
        self._members = tuple(urls)

    def _broadcast(self, tensors: Tensors) -> None:
        with torch.cuda.device(self.device):
            for _, tensor in tensors():
                self._group.broadcast(tensor.contiguous(), src=0, stream=torch.cuda.current_stream())
            torch.cuda.synchronize()


async def _aside(work: Callable[..., Any], *args: Any) -> Any:
    """In a thread that nobody waits for at the end: NCCL never returns when a server is gone."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


def _address(url: str) -> str:
    """This machine's address as the server sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "localhost", parts.port or 80))  # sends nothing
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
