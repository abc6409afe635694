"""After every weight push: does the engine hold what the trainer has?

    tensors   the checksum of every parameter and buffer as the engine holds it = that of the trainer's checkpoint
    flushed   canaries that were scored just before the push are not found in the engine's cache
    cached    scored again, now through the cache, the trainer's log-probs come out

Checksums alone would not see a wrong name or layout on both sides, nor old keys and values; log-probs alone would not
see a skipped push: at the learning rates of RL it moves them less than bfloat16 rounds.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lit_kernels.swap import all_off
from torch import Tensor, nn

from lit_reason.errors import ConfigError, RolloutError, WeightSyncError
from lit_reason.models import CausalLM
from lit_reason.models.checksum import digest
from lit_reason.rollout.engine import Held, NextToken, OnProgress, Provable, plain
from lit_reason.rollout.sampling import Sampling
from lit_reason.types import Completion, Prompt

# The largest |log p engine - log p trainer| of the median canary that rounding explains (nats).
LIMITS = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


class Proof:
    """What is asked of an engine after a push.

    Args:
        prompts: token ids of texts that the model knows, of which the canaries are made: on others rounding flips
            experts.
        limit: the largest difference of log-probs of the median canary (nats); by the engine's dtype if None
            (`LIMITS`). The median: rounding flips experts on some canaries (0.2 nats and more), a wrong weight moves
            all of them.
        top: how many of the likeliest next tokens are compared, weighted by their probability.
        count: how many canaries.
        tensors: compare checksums; false for an engine that quantises, of which only log-probs can tell.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limit: float | None = None,
        top: int = 4,
        count: int = 8,
        tensors: bool = True,
    ) -> None:
        if not prompts or not all(prompts):
            raise ConfigError("a proof needs prompts to make canaries of: at least one, none of them empty")
        for name, value in (("limit", limit), ("top", top), ("count", count)):
            if value is not None and not value > 0:
                raise ConfigError(f"rollout.proof.{name}={value}: must be above 0")
        self.prompts, self.limit, self.top, self.count, self.tensors = prompts, limit, top, count, tensors
        self._canaries: list[list[int]] = []
        self._still: dict[str, Held] = {}  # what no push changes

    def before(self, engine: Provable) -> None:
        """Before a push: puts the canaries back into the cache, from which much generation may have pushed them, so
        that a flush which is skipped is seen."""
        if self._canaries and engine.version() >= 0:
            with contextlib.suppress(RolloutError):  # it died, or sleeps: the push starts or wakes it
                engine.next_token(self._canaries, self.top)

    def check(self, engine: Provable, model: nn.Module, version: int) -> dict[str, float]:
        """What was measured.

        Raises:
            WeightSyncError: the engine does not hold `model`; names the tensors that differ.
        """
        start = time.perf_counter()
        if not self._canaries:
            context = int(cast(CausalLM, model).config.max_seq_len)
            self._canaries = canaries_of(self.prompts, engine.prefix_block(), context, self.count)
        count = self._check_tensors(engine, model, version) if self.tensors else 0
        gap = self._check_canaries(engine, model, version)
        return {
            "sync/tensors": float(count),
            "sync/gap": gap,
            "speed/proof_s": time.perf_counter() - start,
        }

    def _check_tensors(self, engine: Provable, model: nn.Module, version: int) -> int:
        held, copies = engine.held(), defaultdict[str, list[str]](list)
        for key in held:
            copies[key.split(" ")[0]].append(key)
        faults: list[str] = []
        for name, tensor in engine.truth(model):
            keys = copies.pop(name, [])
            if not keys:
                faults.append(f"{name} is missing")
            faults += [f"{key} {fault}" for key in keys if (fault := _fault(tensor, held[key]))]
        still = {key: held[key] for keys in copies.values() for key in keys}
        faults += [f"{name} was not pushed" for name, one in still.items() if one.learnt]
        if self._still:
            both = {**self._still, **still}
            faults += [f"{name} has changed" for name in both if self._still.get(name) != still.get(name)]
        if faults:
            raise WeightSyncError(
                f"after the push of version {version} the engine does not hold the policy: {len(faults)} of "
                f"{len(held)} tensors are wrong: {'; '.join(faults[:8])}{' ...' if len(faults) > 8 else ''}"
            )
        self._still = still
        return len(held)

    def _check_canaries(self, engine: Provable, model: nn.Module, version: int) -> float:
        first = engine.next_token(self._canaries, self.top)
        if stale := sum(one.cached for one in first):
            raise WeightSyncError(
                f"after the push of version {version} the engine still had {stale} tokens of the canaries in its "
                "prefix cache: keys and values of old weights"
            )
        block = engine.prefix_block()
        second = engine.next_token(self._canaries, self.top) if block else first
        lengths = [len(ids) for ids in self._canaries] * (len(second) // len(self._canaries))
        if any(one.cached == 0 for one, length in zip(second, lengths, strict=True) if 0 < block < length):
            raise WeightSyncError("the engine did not use its prefix cache for a canary that it had just read")
        with all_off(model):  # other kernels, such as FP8's, are no fault of the push; mismatch/kl shows their share
            expected = next_logprobs(model, self._canaries)
        count = len(self._canaries)  # of each place
        gap = max(_gap(said[i : i + count], expected) for said in (first, second) for i in range(0, len(said), count))
        limit = LIMITS[engine.dtype] if self.limit is None else self.limit
        if not gap <= limit:
            dtype = str(engine.dtype).removeprefix("torch.")
            raise WeightSyncError(
                f"after the push of version {version} the log-probs of engine and trainer differ by {gap:.3g} nats on "
                f"the median canary (limit {limit:g} in {dtype}), though the checksums agree: a wrong name, layout or "
                "setting. If it is rounding: rollout.proof.limit"
            )
        return gap


class ProvenEngine:
    """An engine whose every push is proven, and that it wakes with the weights with which it fell asleep; else it
    passes everything on.

    Example::

        engine = ProvenEngine(VLLMEngine(tokenizer), Proof([prompt.token_ids for prompt in prompts]))

    Attributes:
        measured: of the last proof: `sync/gap` (nats), `sync/tensors`, `speed/proof_s`.
    """

    def __init__(self, engine: Provable, proof: Proof) -> None:
        self.engine, self.proof = engine, proof
        self.measured: dict[str, float] = {}
        self._lock = threading.Lock()  # replicas may be lost, started again and proven at the same time
        self._slept: Mapping[str, Held] = {}
        if hasattr(engine, "recovered"):
            cast(Any, engine).recovered = self._prove

    def push(self, model: nn.Module, version: int) -> None:
        self.proof.before(self.engine)
        self._slept = {}
        self.engine.push(model, version)
        self._prove(self.engine, model, version)

    def sleep(self, level: int = 1) -> None:
        self._slept = self.engine.held() if level == 1 else {}
        cast(Any, self.engine).sleep(level)

    def wake(self) -> None:
        """Raises WeightSyncError if the weights are not those of before a sleep of level 1."""
        cast(Any, self.engine).wake()
        if not self._slept:
            return  # of level 2: nothing can be generated before the next push
        held, slept = self.engine.held(), self._slept
        self._slept = {}
        changed = sorted(name for name in {**slept, **held} if slept.get(name) != held.get(name))
        if changed:
            raise WeightSyncError(
                f"after its sleep the engine holds other weights than before: {len(changed)} of {len(held)} tensors "
                f"differ: {'; '.join(changed[:8])}{' ...' if len(changed) > 8 else ''}"
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[Completion]:
        return self.engine.generate(prompts, sampling, seeds, sample_idx, progress)

    def version(self) -> int:
        return self.engine.version()

    def _prove(self, engine: Provable, model: nn.Module, version: int) -> None:
        with self._lock:
            self.measured = self.proof.check(engine, model, version)

    def __getattr__(self, name: str) -> object:
        if name == "engine":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.engine, name)


def canaries_of(prompts: Sequence[Sequence[int]], block: int, context: int, count: int) -> list[list[int]]:
    """Token ids for a proof: `count` different texts of prompts in a row, longer than a block of the prefix cache. Each
    begins at another token, so that none shares a block with a prompt or, where all prompts begin alike, with another.

    Raises:
        ConfigError: the model's context is too short for a cached prefix.
    """
    if block >= context:
        raise ConfigError(
            f"a canary needs more tokens than a block of the engine's prefix cache has ({block}), the model's context "
            f"is {context}: take a model with a longer context, or type rollout.proof=null"
        )
    length = min(max(48, block + 16), context - 1)
    found = []
    for first in range(min(count, len(prompts))):
        ids: list[int] = []
        for step in range(length + first + 1):
            ids += prompts[(first + step * count) % len(prompts)]
            if len(ids) > length + first:
                break
        found.append(ids[first + 1 :][:length])
    return found


@torch.no_grad()
def next_logprobs(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """log p of the token after each of B prompts, (B, V), by the forward that training uses, in the weights' dtype."""
    lm, training = cast(CausalLM, model), model.training
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(ids)) for ids in prompts], batch_first=True)
    counts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    counts_BT[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts])] = True
    model.eval()
    try:
        with torch.autocast(lm.device.type, enabled=False):
            states_BD = lm.states_at(ids_BT.to(lm.device), counts_BT.to(lm.device))
            return lm.head(states_BD).float().log_softmax(-1).cpu()
    finally:
        model.train(training)


def _gap(said: Sequence[NextToken], expected_BV: Tensor) -> float:
    """|difference| of the median canary: over its likeliest tokens, weighted by the engine's probabilities (nats)."""
    found = []
    for one, logprobs_V in zip(said, expected_BV, strict=True):
        tokens, logprobs = zip(*one.logprobs.items(), strict=True)
        theirs = torch.tensor(logprobs, dtype=torch.float64)
        weights = theirs.softmax(0)
        gap = float((weights * (theirs - logprobs_V[list(tokens)].double()).abs()).sum())
        found.append(gap if math.isfinite(gap) else math.inf)  # NaN has no order
    return statistics.median_high(found)


def _fault(tensor: Tensor, held: Held) -> str:
    """What is wrong with the engine's copy; "" if nothing. A wider dtype of its own is no fault, a narrower one is."""
    if held.dtype.startswith("float8"):
        return "is quantised, which has no checksum to compare: type rollout.proof.tensors=false"
    dtype = getattr(torch, held.dtype)
    if torch.promote_types(dtype, tensor.dtype) != dtype:
        return f"is {held.dtype}, the trainer's {str(tensor.dtype).removeprefix('torch.')}"
    if held.shape != tuple(tensor.shape):
        return f"has shape {held.shape}, the trainer's {tuple(tensor.shape)}"
    return "" if held.digest == digest(plain(tensor.to(dtype))) else "differs"
