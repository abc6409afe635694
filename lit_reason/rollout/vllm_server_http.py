"""Several `vllm serve` processes, seen over HTTP from one event loop in a thread of its own.

    round     least loaded server <- next group of requests      (a group shares its prompt, hence a cached prefix)
    watch     every server's counters of tokens, while it works  (no answer, or no token: it is lost)
    lost      its requests go to the others, with their seeds    (none left: the round ends in an error)

A lost server stays out until the next push, which brings it the weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import httpx2

from lit_reason.errors import EngineDiedError, EngineStalledError, RolloutError
from lit_reason.rollout.engine import OnProgress, Progress

log = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request, thousands a round
T = TypeVar("T")
_CONNECT_S = 5.0
_CLOSED = "closed: close() was called on this engine, which cannot be used again. Make a new VLLMServerEngine"
_COUNTERS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)$", re.MULTILINE)


class Server:
    """One of them.

    Attributes:
        lost: why it takes no part; "" if it does.
        stalled: it was lost because it gave no sign of life.
        load: requests that it works on.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.lost, self.stalled, self.load = "", False, 0
        self.facts: dict[str, Any] = {}

    def lose(self, error: Exception) -> None:
        self.lost, self.stalled = f"{error}", isinstance(error, EngineStalledError)
        log.warning("%s is lost: %s", self.url, self.lost)


class Fleet:
    """The servers and the loop.

    Args:
        max_parallel: requests that one server is given at a time.
    """

    def __init__(self, urls: Sequence[str], max_parallel: int) -> None:
        self.servers = [Server(url) for url in urls]
        self.max_parallel = max_parallel
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        thread.start()
        # No proxies: those of the environment are for the internet. No limit: `max_parallel` is one. Idle connections
        # are given up before the server does (5 s): one that it closes just then would look like its death.
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=2.0)
        self._client = httpx2.AsyncClient(trust_env=False, limits=limits)
        self.changing = asyncio.Lock()  # of weights: no round begins meanwhile
        self._calls: set[Future[Any]] = set()
        self._opening = threading.Lock()  # a call is either known to `_stop` or refused
        self._finalizer = weakref.finalize(self, _stop, self._loop, thread, self._client, self._calls, self._opening)

    @property
    def alive(self) -> list[Server]:
        """Raises EngineDiedError or EngineStalledError, with each server's reason, if there is none."""
        alive = [server for server in self.servers if not server.lost]
        if not alive:
            kind = EngineStalledError if all(server.stalled for server in self.servers) else EngineDiedError
            reasons = "\n".join(f"  {server.url}: {server.lost}" for server in self.servers)
            raise kind(
                f"no server is left:\n{reasons}\nStart them again (python -m lit_reason.rollout.vllm_serve FOLDER "
                "prints the command); the same training command then resumes from the last checkpoint"
            )
        return alive

    def run(self, work: Callable[[OnProgress], Coroutine[Any, Any, T]], heard: OnProgress | None = None) -> T:
        """The result of `work` in the loop; what it tells on the way is heard in the caller's thread.

        Raises:
            RolloutError: closed, before or meanwhile.
        """
        said: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        with self._opening:
            if not self._finalizer.alive:
                raise RolloutError(_CLOSED)
            future = asyncio.run_coroutine_threadsafe(work(said.put), self._loop)
            self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        future.add_done_callback(lambda _: said.put(None))
        try:
            while (progress := said.get()) is not None:
                if heard is not None:
                    heard(progress)
            return future.result()
        except CancelledError as error:
            if self._finalizer.alive:
                raise
            raise RolloutError(_CLOSED) from error
        finally:
            future.cancel()  # Ctrl-C: the servers see that nobody waits any more

    def close(self) -> None:
        """Ends the calls that run, in whatever threads."""
        self._finalizer()

    async def ask(self, server: Server, method: str, path: str, within_s: float | None, **request: Any) -> Any:
        """The answer's JSON, or text.

        Raises:
            EngineStalledError: no answer `within_s`.
            EngineDiedError: no connection, or the server has failed (5xx).
            RolloutError: it refuses (4xx).
        """
        timeout = httpx2.Timeout(within_s, connect=_CONNECT_S)
        try:
            answer = await self._client.request(method, server.url + path, timeout=timeout, **request)
        except httpx2.ConnectTimeout as error:
            raise EngineDiedError(f"{server.url} cannot be reached within {_CONNECT_S:g} s") from error
        except httpx2.TimeoutException as error:
            raise EngineStalledError(f"{server.url}{path} gave no answer within {within_s:g} s") from error
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise EngineDiedError(f"{server.url}{path}: {type(error).__name__} {error}") from error
        if answer.status_code >= 400:
            kind = EngineDiedError if answer.status_code >= 500 else RolloutError
            text = " ".join(answer.text.split())[-1000:]
            raise kind(f"{server.url}{path} answered {answer.status_code}: {text}")
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    async def call(self, server: Server, method: str, *args: Any, within_s: float) -> dict[str, Any]:
        """What our extension's `method` says in the server's worker; RolloutError if it failed there."""
        body = {"method": method, "args": args}
        answer = (await self.ask(server, "POST", "/collective_rpc", within_s, json=body))["results"][0]
        if "failed" in answer:
            raise RolloutError(f"{server.url} failed to {method.removeprefix('lit_')}: {answer['failed']}")
        return answer

    async def each(self, work: Callable[[Server], Awaitable[T]]) -> dict[Server, T | Exception]:
        """`work` on every server that is alive, at the same time; waits for all."""
        servers = self.alive
        results = await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
        return dict(zip(servers, results, strict=True))  # type: ignore[arg-type]

    async def tokens(self, server: Server, within_s: float) -> float:
        """How many tokens it has read and written since it started."""
        found = _COUNTERS.findall(await self.ask(server, "GET", "/metrics", within_s))
        if not found:
            raise RolloutError(f"{server.url} counts no tokens. Start it without --disable-log-stats")
        return sum(map(float, found))

    async def round(
        self, bodies: Sequence[dict[str, Any]], groups: Sequence[Sequence[int]], silence_s: float, say: OnProgress
    ) -> list[dict[str, Any]]:
        """The answer to every body of /inference/v1/generate."""
        return await _Round(self, bodies, groups, silence_s, say).run()


class _Round:
    """One call of `Fleet.round`."""

    def __init__(
        self,
        fleet: Fleet,
        bodies: Sequence[dict[str, Any]],
        groups: Sequence[Sequence[int]],
        silence_s: float,
        say: OnProgress,
    ) -> None:
        self.fleet, self.bodies, self.silence_s, self.say = fleet, bodies, silence_s, say
        self.todo = deque(groups)
        self.found: dict[int, dict[str, Any]] = {}
        self.working: dict[asyncio.Task[Any], tuple[Server, int]] = {}
        self.watching: dict[asyncio.Task[None], Server] = {}
        self.heard = dict.fromkeys(fleet.servers, 0.0)  # when each gave a sign of life
        self.start, self.tokens = time.perf_counter(), 0

    async def run(self) -> list[dict[str, Any]]:
        self.watching = {asyncio.create_task(self._watch(server)): server for server in self.fleet.alive}
        try:
            while self.todo or self.working:
                self._deal()
                done, _ = await asyncio.wait([*self.working, *self.watching], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    self._take(task)
                self.say(Progress(len(self.found), len(self.bodies), self.tokens, time.perf_counter() - self.start))
            return [self.found[i] for i in range(len(self.bodies))]
        finally:
            for task, (server, _) in self.working.items():
                server.load -= 1
                task.cancel()
            for task in self.watching:
                task.cancel()
            await asyncio.gather(*self.working, *self.watching, return_exceptions=True)

    def _deal(self) -> None:
        """Groups to the least loaded server that has room; a group is never split but by a loss."""
        while self.todo:
            server = min(self.fleet.alive, key=lambda server: server.load)
            if server.load and server.load + len(self.todo[0]) > self.fleet.max_parallel:
                return
            if not server.load:
                self.heard[server] = time.monotonic()
            for i in self.todo.popleft():
                work = self.fleet.ask(server, "POST", "/inference/v1/generate", None, json=self.bodies[i])
                self.working[asyncio.create_task(work)] = (server, i)
                server.load += 1

    def _take(self, task: asyncio.Task[Any]) -> None:
        if (watched := self.watching.pop(task, None)) is not None:
            error = task.exception()
            assert error is not None, "a watch ends in an error"
            self._lose(watched, error)
        elif task in self.working:
            server, i = self.working.pop(task)
            server.load -= 1
            if (error := task.exception()) is not None:
                self.todo.appendleft([i])
                self._lose(server, error)
            else:
                self.found[i] = task.result()
                self.tokens += len(self.found[i]["choices"][0]["token_ids"])
                self.heard[server] = time.monotonic()

    def _lose(self, server: Server, error: BaseException) -> None:
        """Its requests go back; anything but its death or stall ends the round."""
        if not isinstance(error, EngineDiedError | EngineStalledError):
            raise error
        if not server.lost:
            server.lose(error)
        for task, (at, i) in list(self.working.items()):
            if at is server:
                del self.working[task]
                server.load -= 1
                task.cancel()
                self.todo.appendleft([i])
        _ = self.fleet.alive  # raises if none is left

    async def _watch(self, server: Server) -> None:
        """Ends in an error when the server, having work, gives no sign of life."""
        before = -1.0
        while True:
            await asyncio.sleep(min(1.0, self.silence_s / 4))
            if not server.load:
                continue
            if self.fleet.changing.locked():  # a push in flight pauses it, and has a deadline of its own
                self.heard[server] = time.monotonic()
                continue
            tokens = await self.fleet.tokens(server, self.silence_s)
            if tokens != before:
                before, self.heard[server] = tokens, time.monotonic()
            elif time.monotonic() - self.heard[server] > self.silence_s:
                raise EngineStalledError(
                    f"{server.url} has {server.load} requests and moved no token for {self.silence_s:g} s. If it only "
                    "needs longer: rollout.engine.deadlines.generate"
                )


def _stop(
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    client: httpx2.AsyncClient,
    calls: set[Future[Any]],
    opening: threading.Lock,
) -> None:
    with opening:
        running = list(calls)
    for call in running:  # wakes who waits for it, even if the loop hangs
        call.cancel()
    asyncio.run_coroutine_threadsafe(_end(client), loop)
    if thread is not threading.current_thread():  # where the garbage collector may have found it
        thread.join(timeout=3)


async def _end(client: httpx2.AsyncClient) -> None:
    """Stops the loop when the cancelled calls have cleaned up, so that servers drop their requests."""
    try:
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(left, timeout=1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client.aclose(), timeout=1)
    finally:
        asyncio.get_running_loop().stop()
