"""Evaluate an engine on prompts: one greedy pass, and k samples per question when asked.

    prompts -> engine.generate (greedy, then k samples) -> rubric.score -> items -> EvalReport

A completion is correct when its reward column `correct` is exactly 1. A verifier's error or time-out says nothing about
the model: such a completion is left out of every accuracy and counted in `faults`, never counted as wrong.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lit_reason.errors import ConfigError, DataError, nearest
from lit_reason.evaluate.metrics import Estimate, by_question, majority, mean, pass_at_k, proportion
from lit_reason.report.records import write_rows
from lit_reason.rewards import Rubric, Tags
from lit_reason.rollout import Engine, Progress, Sampling, request_seed
from lit_reason.types import Completion, Prompt, RewardState, Scores

FORMAT_BLIND = "answer_anywhere"


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One judged completion.

    Args:
        mode: `"greedy"` or `"sample"`.
        answer: the reference answer.
        given: the answer found in the completion, None without one.
        columns: `{reward: value}`; None where the verifier failed.
        correct: whether column `correct` is exactly 1; None where the verifier failed.
        correct_anywhere: the same for the format-blind column; None too when the rubric has none.
        faults: `{reward: message}` of the verifiers that failed.
    """

    prompt_id: str
    mode: str
    sample_idx: int
    source: str
    question: str
    answer: str
    completion: str
    given: str | None
    columns: dict[str, float | None]
    correct: bool | None
    correct_anywhere: bool | None
    finish_reason: str
    tokens: int
    version: int
    faults: dict[str, str]


@dataclass(frozen=True)
class EvalReport:
    """What `evaluate` found.

    Args:
        items: the greedy completions, one per prompt, in the prompts' order.
        samples: the k sampled completions per prompt.
        names, weights: the rubric's columns.
        k: samples per prompt, 0 for greedy only.
        correct_column: the reward column that decides.
        seconds, tokens: of generation and scoring, of everything generated.
    """

    items: list[EvalItem]
    samples: list[EvalItem]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    k: int
    correct_column: str
    seconds: float
    tokens: int

    @property
    def pass_at_1(self) -> Estimate:
        """Greedy accuracy with its Wilson interval."""
        return proportion(list(correct_by_question(self.items).values()))

    @property
    def pass_at_1_format_blind(self) -> Estimate | None:
        """Greedy accuracy of the column `answer_anywhere`; None when the rubric has no such column."""
        if FORMAT_BLIND not in self.names:
            return None
        return proportion(list(correct_by_question(self.items, FORMAT_BLIND).values()))

    @property
    def rewards(self) -> dict[str, Estimate]:
        """Greedy mean of every reward column and of their weighted sum, `"total"`."""
        found = {name: mean(list(_column_by_question(self.items, name).values())) for name in self.names}
        return found | {"total": mean(list(self._totals().values()))}

    @property
    def faults(self) -> int:
        """Completions, greedy and sampled, with at least one verifier that failed."""
        return sum(bool(item.faults) for item in self.items + self.samples)

    @property
    def avg_at_k(self) -> Estimate | None:
        """Mean accuracy of the k samples."""
        return proportion(list(correct_by_question(self.samples).values())) if self.k else None

    @property
    def maj_at_k(self) -> Estimate | None:
        """Accuracy of the majority answer (`metrics.majority` states how ties and missing answers count)."""
        if not self.k:
            return None
        groups: dict[str, list[EvalItem]] = {}
        for item in self.samples:
            if item.correct is not None:
                groups.setdefault(item.prompt_id, []).append(item)
        return proportion([majority([i.given for i in g], [bool(i.correct) for i in g]) for g in groups.values()])

    @property
    def pass_at_k(self) -> dict[int, Estimate]:
        """Unbiased pass@j for j = 2, 4, 8, ... and k (pass@1 of samples is `avg_at_k`).

        Questions with fewer than j judged samples (verifier faults) are left out of that j.
        """
        judged = [item for item in self.samples if item.correct is not None]
        groups = by_question([i.prompt_id for i in judged], [float(bool(i.correct)) for i in judged]).values()
        ks = sorted({2**e for e in range(1, self.k.bit_length())} | {self.k}) if self.k > 1 else []
        return {j: proportion([pass_at_k(len(g), int(g.sum()), j) for g in groups if len(g) >= j]) for j in ks}

    def summary(self) -> dict[str, float]:
        """Plain floats, ready for JSON or a logger; an estimate `x` also has `x_low` and `x_high`.

        What has no finite value (a mean of nothing, the interval of one question) is left out.
        """
        estimates: dict[str, Estimate | None] = {
            "pass_at_1": self.pass_at_1,
            "pass_at_1_format_blind": self.pass_at_1_format_blind,
            "avg_at_k": self.avg_at_k,
            "maj_at_k": self.maj_at_k,
        }
        estimates |= {f"pass_at_{j}": estimate for j, estimate in self.pass_at_k.items()}
        estimates |= {f"reward/{name}/mean": estimate for name, estimate in self.rewards.items()}
        out = {"n": float(self.pass_at_1.n), "k": float(self.k), "faults": float(self.faults)}
        for name, estimate in estimates.items():
            if estimate is not None:
                parts = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
                out |= {key: value for key, value in parts.items() if math.isfinite(value)}
        out["completion/length"] = sum(i.tokens for i in self.items) / len(self.items)
        out["completion/truncated"] = sum(i.finish_reason == "length" for i in self.items) / len(self.items)
        out |= {"seconds": self.seconds, "tokens": float(self.tokens), "tokens_per_s": self.tokens / self.seconds}
        return out

    def write_jsonl(self, path: str | os.PathLike[str]) -> None:
        """One line per completion, greedy first; written whole or not at all."""
        write_rows(Path(path), (asdict(item) for item in self.items + self.samples))

    def _totals(self) -> dict[str, float]:
        whole = [i for i in self.items if not i.faults]
        weights = dict(zip(self.names, self.weights, strict=True))
        totals = [sum(weights[n] * (v or 0.0) for n, v in i.columns.items()) for i in whole]
        return {id_: float(v.mean()) for id_, v in by_question([i.prompt_id for i in whole], totals).items()}


def correct_by_question(items: Sequence[EvalItem], column: str | None = None) -> dict[str, float]:
    """`{prompt id: share of its judged completions that are correct}`; `column=FORMAT_BLIND` judges format-blind."""
    flags = [(i.prompt_id, i.correct_anywhere if column == FORMAT_BLIND else i.correct) for i in items]
    judged = [(id_, float(flag)) for id_, flag in flags if flag is not None]
    return {id_: float(v.mean()) for id_, v in by_question([j[0] for j in judged], [j[1] for j in judged]).items()}


def _column_by_question(items: Sequence[EvalItem], name: str) -> dict[str, float]:
    kept = [(i.prompt_id, value) for i in items if (value := i.columns[name]) is not None]
    return {id_: float(v.mean()) for id_, v in by_question([x[0] for x in kept], [x[1] for x in kept]).items()}


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    rubric: Rubric,
    *,
    sampling: Sampling,
    k: int = 0,
    seed: int = 0,
    correct: str = "answer",
    extract: Callable[[str], str | None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> EvalReport:
    """Generate, score and judge.

    Example::

        report = evaluate(engine, prompts, rubric, sampling=Sampling(max_tokens=64), k=8)
        print(report.pass_at_1)          # 0.412 [0.370, 0.456] (n=500)

    Args:
        engine: any rollout engine.
        prompts: the questions; a question that occurs twice counts once, with the mean of its completions.
        rubric: its column `correct` decides; a column `answer_anywhere` adds the format-blind accuracy.
        sampling: temperature and cut-offs of the k samples; the greedy pass takes its `max_tokens` only.
        k: samples per prompt beside the greedy completion, for avg@k, pass@k and maj@k.
        seed: of the samples; the same seed and weights give the same tokens.
        correct: the name of the deciding reward column.
        extract: finds the answer that votes in maj@k; None: what stands in the last pair of answer tags.
        progress: called with the engine's progress events, first of the greedy pass, then of the samples.
    """
    if not prompts:
        raise DataError("evaluate got 0 prompts; check the split (test) and data.size")
    if k < 0:
        raise ConfigError(f"evaluate got k={k}; valid: k=0 (greedy only) or the number of samples per question")
    start = time.perf_counter()
    passes = [("greedy", replace(sampling, temperature=0.0, top_p=1.0, min_p=0.0), 1)]
    if k:
        passes.append(("sample", sampling, k))
    items: dict[str, list[EvalItem]] = {"greedy": [], "sample": []}
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    for mode, how, copies in passes:
        asked = [prompt for prompt in prompts for _ in range(copies)]
        idx = [i for _ in prompts for i in range(copies)]
        seeds = [request_seed(seed, 0, prompt.id, i) for prompt, i in zip(asked, idx, strict=True)]
        completions = engine.generate(asked, how, seeds, idx, progress)
        scores = rubric.score(asked, completions)
        names, weights = scores.names, tuple(scores.weights_R.tolist())
        if correct not in names:
            raise ConfigError(
                f"evaluate(correct={correct!r}) is not a reward of this rubric; {nearest(correct, names)}"
            )
        items[mode] = [
            _item(mode, prompt, completion, scores, row, correct, extract or Tags().last_answer)
            for row, (prompt, completion) in enumerate(zip(asked, completions, strict=True))
        ]
    seconds = time.perf_counter() - start
    tokens = sum(item.tokens for part in items.values() for item in part)
    return EvalReport(items["greedy"], items["sample"], names, weights, k, correct, seconds, tokens)


def _item(
    mode: str,
    prompt: Prompt,
    completion: Completion,
    scores: Scores,
    row: int,
    correct: str,
    extract: Callable[[str], str | None],
) -> EvalItem:
    ok = (scores.states_BR[row] == RewardState.OK).tolist()
    values = [v if o and math.isfinite(v) else None for v, o in zip(scores.values_BR[row].tolist(), ok, strict=True)]
    columns = dict(zip(scores.names, values, strict=True))
    faults = {n: scores.messages.get((row, n), "") for n, v in columns.items() if v is None}
    verdicts = {n: None if v is None else v == 1.0 for n, v in columns.items()}
    return EvalItem(
        prompt_id=prompt.id,
        mode=mode,
        sample_idx=completion.sample_idx,
        source=prompt.source,
        question=prompt.question,
        answer=prompt.answer,
        completion=completion.text,
        given=extract(completion.text),
        columns=columns,
        correct=verdicts[correct],
        correct_anywhere=verdicts.get(FORMAT_BLIND),
        finish_reason=completion.finish_reason,
        tokens=len(completion.token_ids),
        version=completion.version,
        faults=faults,
    )
