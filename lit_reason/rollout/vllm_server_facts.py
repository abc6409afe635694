"""Who the servers are: asked before the first push, with what to type if one cannot be used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_reason.errors import ConfigError, EngineDiedError, EngineStalledError, RolloutError
from lit_reason.models.export import checkpoint_config
from lit_reason.rollout.process import Deadlines
from lit_reason.rollout.vllm_server_http import Fleet, Server

log = logging.getLogger(__name__)
_ROUTING = ("scoring_func", "topk_method")  # vLLM guesses them where config.json has none
_NOT_SHAPE = ("max_position_embeddings", "num_nextn_predict_layers")


async def meet(fleet: Fleet, deadlines: Deadlines, dtype: str | None) -> dict[str, Any]:
    """What all of them say; ConfigError if they cannot be used, or not together."""
    until = time.monotonic() + deadlines.start
    facts = await asyncio.gather(*(_ask_facts(fleet, server, deadlines, until) for server in fleet.servers))
    for server, one in zip(fleet.servers, facts, strict=True):
        server.facts = one
        if one["workers"] != 1:
            raise ConfigError(
                f"{server.url} has {one['workers']} workers, whose weights cannot be proven: start one server per "
                "device, without --tensor-parallel-size and the like, and name them all in rollout.engine.urls"
            )
        if dtype not in (None, one["dtype"]):
            raise ConfigError(
                f"{server.url} computes in {one['dtype']}, rollout.engine.dtype={dtype}: start it with "
                f"--dtype {dtype}, or leave rollout.engine.dtype out"
            )
        if one != facts[0]:
            uneven = {key: (facts[0][key], one[key]) for key in one if facts[0][key] != one[key]}
            raise ConfigError(f"{fleet.servers[0].url} and {server.url} are not alike: {uneven}")
    return facts[0]


async def _ask_facts(fleet: Fleet, server: Server, deadlines: Deadlines, until: float) -> dict[str, Any]:
    """Waits for a server that still starts; ConfigError says what is wrong with one that cannot be used.

    Raises EngineStalledError if it takes the connection and then says nothing.
    """
    how = "`python -m lit_reason.rollout.vllm_serve FOLDER` prints the command that starts one"
    waits = False
    while True:
        try:
            await fleet.ask(server, "GET", "/health", max(0.1, until - time.monotonic()))
            break
        except EngineStalledError as error:
            raise EngineStalledError(
                f"{server.url} takes connections but gave no answer to /health within {deadlines.start:g} s: it hangs, "
                f"or starts slowly (rollout.engine.deadlines.start). {how}"
            ) from error
        except EngineDiedError as error:
            if time.monotonic() > until:
                raise ConfigError(
                    f"no vLLM server at {server.url} within {deadlines.start:g} s ({error}). {how}; or type "
                    "where it is: rollout.engine.urls=[http://localhost:8000]"
                ) from error
            if not waits:
                log.warning("waiting for %s, at most %g s", server.url, deadlines.start)
            waits = True
            await asyncio.sleep(0.5)
        except RolloutError as error:
            raise ConfigError(
                f"what answers at {server.url} is no vLLM server ({error}). {how}; rollout.engine.urls takes its URL "
                "without /v1: [http://localhost:8000]"
            ) from error
    try:
        facts = await fleet.call(server, "lit_facts", within_s=deadlines.push)
        await fleet.tokens(server, deadlines.push)
        openapi = await fleet.ask(server, "GET", "/openapi.json", deadlines.push)
    except EngineStalledError:
        raise
    except RolloutError as error:
        raise ConfigError(
            f"{server.url} is no server that a trainer can use: it needs VLLM_SERVER_DEV_MODE=1 and "
            f"--worker-extension-cls, among others. {how}. It said: {error}"
        ) from error
    if "/inference/v1/generate" not in openapi["paths"]:
        raise ConfigError(f"{server.url} does not take token ids: start it with --enable-scale-out. {how}")
    return facts


def check_model(model: nn.Module, dtype: torch.dtype, theirs: Mapping[str, Any]) -> None:
    """ConfigError if the servers were started for a model of another shape: pushing ends them."""
    ours = checkpoint_config(model, dtype)
    uneven = {
        key: (theirs.get(key), value)
        for key, value in ours.items()
        if key in _ROUTING
        or (key in theirs and isinstance(value, int) and key not in _NOT_SHAPE and not key.endswith("_token_id"))
        if theirs.get(key) != value
    }
    if uneven:
        raise ConfigError(
            f"the servers run another model than the policy (theirs, ours): {uneven}. Start them with the policy's "
            "own folder: lit-reason-zoo export NAME --to FOLDER"
        )
