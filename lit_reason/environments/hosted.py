"""An environment of the `verifiers` library run row by row, each by its own `rollout`, on one event loop in a thread.

    their rollout(input, client)  --client.get_response(messages)-->  waits
    our turn:  the engine's text is the response  -->  their env_response, stops, clean-up  -->  the next messages

Nothing of their loop is rebuilt: the client that they are handed asks us instead of a server. Interface of verifiers
0.1.14 to 0.3 (`MultiTurnEnv`); 0.4 took it out in favour of agents behind an HTTP endpoint.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from typing import Any

from lit_reason.errors import ConfigError

# Reward functions that raised while one row is scored.
_failed: ContextVar[list[str] | None] = ContextVar("failed", default=None)


def library() -> Any:
    """The module `verifiers`; ConfigError where it is missing or has another interface."""
    try:
        verifiers = importlib.import_module("verifiers")
    except ImportError as error:
        raise ConfigError(
            f"verifiers cannot be imported ({error}). Type pip install 'lit-reason[verifiers]'"
        ) from error
    if not hasattr(verifiers, "MultiTurnEnv"):
        raise ConfigError(
            f"verifiers {verifiers.__version__} has no MultiTurnEnv; valid: 0.1.14 to 0.3. "
            "Type pip install 'lit-reason[verifiers]'"
        )
    return verifiers


class Row:
    """One rollout of theirs in flight.

    Args:
        asked: the messages that it wants answered; None when it is over.
        state: theirs, once it is over.
        fault: why it failed, `""` if it did not.
    """

    def __init__(self) -> None:
        self.events: asyncio.Queue[list[Any] | None] = asyncio.Queue()
        self.replies: asyncio.Queue[Any] = asyncio.Queue()
        self.asked: list[Any] | None = None
        self.state: Any = None
        self.fault = ""
        self.scored = self.old = False
        self.task: asyncio.Task[Any] | None = None

    async def play(self, rollout: Coroutine[Any, Any, Any]) -> None:
        """Their rollout to its end, whatever that is."""
        try:
            self.state = await rollout
            if (error := self.state.get("error")) is not None:
                self.fault = f"{type(error).__name__}: {error}"
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"
        self.events.put_nowait(None)

    async def advance(self, timeout_s: float) -> None:
        """Waits until it asks for a response or is over."""
        try:
            self.asked = await asyncio.wait_for(self.events.get(), timeout_s)
        except TimeoutError:
            self.asked, self.fault = None, f"no answer within {timeout_s:g} s"
            if self.task is not None:
                self.task.cancel()


class Hosted:
    """One environment of theirs, its event loop, and its rows by (prompt id, seed).

    Args:
        env: a `verifiers.MultiTurnEnv`.
        timeout_s: the most seconds that its part of a turn, or the scoring of a row, may take.
    """

    def __init__(self, env: Any, timeout_s: float = 60.0) -> None:
        self.library, self.env, self.timeout_s = library(), env, timeout_s
        if not isinstance(env, self.library.MultiTurnEnv):
            raise ConfigError(f"a {type(env).__name__} is no verifiers.MultiTurnEnv; others drive the model themselves")
        if env.rubric.has_group_rewards:
            raise ConfigError("this environment's rubric judges whole groups; here each completion is judged by itself")
        self.rows: dict[tuple[str, int], Row] = {}
        self.tools = tuple(tool.name for tool in env.tool_defs or [])
        _tell_of_failures(env.rubric)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="verifiers", daemon=True).start()

    def run(self, coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of all, run side by side on the loop's thread."""

        async def together() -> list[Any]:
            return await asyncio.gather(*coroutines)

        return asyncio.run_coroutine_threadsafe(together(), self._loop).result()

    def start(self, keys: Sequence[tuple[str, int]], inputs: Sequence[dict[str, Any]]) -> list[Row]:
        """New rows, each up to its first question; those that were scored before the last such call are forgotten."""
        self.rows = {key: row for key, row in self.rows.items() if not row.old}
        for row in self.rows.values():
            row.old = row.scored
        rows = self.run([self._start(data) for data in inputs])
        self.rows |= dict(zip(keys, rows, strict=True))
        return rows

    async def _start(self, data: dict[str, Any]) -> Row:
        row = Row()
        client = _bridge(self.library)(row)
        row.task = asyncio.ensure_future(row.play(self.env.rollout(data, client, "policy", {})))
        await row.advance(self.timeout_s)
        return row

    async def reply(self, row: Row, text: str, call: tuple[str, str] | None, truncated: bool) -> None:
        """Answers a row's question and waits for its next one."""
        row.replies.put_nowait((text, call, truncated))
        await row.advance(self.timeout_s)

    async def close(self, row: Row) -> None:
        """Ends a row that still asks, as their own loop does where the context is full."""
        if row.asked is not None:
            row.replies.put_nowait(None)
            await row.advance(self.timeout_s)

    async def score(self, row: Row) -> None:
        """Their rubric on a row: `state["reward"]` and `state["metrics"]`; a function that raised is a fault."""
        if row.scored:
            return
        row.scored = True
        await self.close(row)
        if row.state is None:
            row.fault = row.fault or "it did not end when it was told to"
        if row.fault:
            return
        _failed.set(raised := [])
        try:
            await asyncio.wait_for(self.env.rubric.score_rollout(row.state), self.timeout_s)
        except TimeoutError:
            row.fault = f"not scored within {self.timeout_s:g} s"
        except Exception as error:
            row.fault = f"{type(error).__name__}: {error}"
        row.fault = row.fault or "; ".join(raised)


@functools.cache
def load(name: str, arguments: str) -> Hosted:
    """`verifiers.load_environment(name, **arguments)`, the same object for environment, data and reward.

    Args:
        arguments: as JSON.
    """
    return Hosted(library().load_environment(name, **json.loads(arguments)))


@functools.cache
def _bridge(vf: Any) -> Callable[[Row], Any]:
    """Their client class for one row: its server is our queue."""
    client, types = importlib.import_module("verifiers.clients").Client, importlib.import_module("verifiers.types")

    class Bridge(client):
        def __init__(self, row: Row) -> None:
            super().__init__(row)

        async def get_response(self, prompt: Any, model: str, *args: Any, **kwargs: Any) -> Any:
            self.client.events.put_nowait(list(prompt))
            reply = await self.client.replies.get()
            if reply is None:
                raise vf.OverlongPromptError("a limit of the rollout ended it")
            text, call, truncated = reply
            calls = (
                None if call is None else [types.ToolCall(id=f"call_{len(prompt)}", name=call[0], arguments=call[1])]
            )
            finish = "length" if truncated else "stop" if call is None else "tool_calls"
            message = types.ResponseMessage(
                content=text, tool_calls=calls, finish_reason=finish, is_truncated=truncated
            )
            return types.Response(id="", created=0, model=model, message=message)

        async def close(self) -> None:
            """Nothing is open."""

    Bridge.__abstractmethods__ = frozenset()  # what is abstract translates for a server
    return Bridge


def _tell_of_failures(rubric: Any) -> None:
    """Their rubric makes 0.0 of a reward function that raises; the wrapped functions also say so."""
    for part in getattr(rubric, "rubrics", None) or ():
        _tell_of_failures(part)
    rubric.funcs = [_watched(func) for func in rubric.funcs]


def _watched(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)  # they pass the arguments that the signature names
    async def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            value = func(*args, **kwargs)
            return float(await value if inspect.isawaitable(value) else value)
        except Exception as error:
            if (raised := _failed.get()) is not None:
                raised.append(f"{getattr(func, '__name__', 'a reward')}: {type(error).__name__}: {error}")
            raise

    return watched
