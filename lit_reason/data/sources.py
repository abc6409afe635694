"""Where problems come from: reasoning-gym tasks by name, GSM8K, a user's JSONL. A source is iterated for `Prompt`s
without token ids; `prompts.py` splits and tokenises them. Each question appears once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lit_reason.data.questions import prompt_id
from lit_reason.errors import ConfigError, DataError, nearest
from lit_reason.types import Prompt

log = logging.getLogger(__name__)

GSM8K_HUB = "openai/gsm8k"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class ReasoningGym:
    """Tasks of the reasoning-gym library by their registered names, mixed in equal shares.

    The library draws item i of seed s from `Random(s + i)`, so that its seeds 1 and 2 share all items but one. Here
    the library's seed is a hash of (seed, task): different seeds give unrelated draws.

    Args:
        tasks: `{name: {config key: value}}`, e.g. `{"chain_sum": {"max_terms": 3}, "gcd": {}}`.
        size: distinct questions over all tasks; a task that has fewer gives what it has, with a warning.
        seed: of the draws.
    """

    def __init__(self, tasks: Mapping[str, Mapping[str, Any] | None], size: int = 1000, seed: int = 0) -> None:
        if not tasks:
            raise ConfigError("got no tasks; name at least one, e.g. tasks={'chain_sum': {'max_terms': 3}}")
        if size < len(tasks):
            raise ConfigError(f"got size={size} for {len(tasks)} tasks; give at least one question per task")
        self.tasks = {name: _plain(config or {}) for name, config in tasks.items()}
        self.size = size
        self.seed = seed
        for name, config in self.tasks.items():
            _check_task(name, config)

    def __iter__(self) -> Iterator[Prompt]:
        names = list(self.tasks)
        shares = [self.size // len(names) + (i < self.size % len(names)) for i in range(len(names))]
        seen: set[str] = set()
        for name, share in zip(names, shares, strict=True):
            yield from self._draw(name, share, seen)

    def _draw(self, name: str, share: int, seen: set[str]) -> Iterator[Prompt]:
        """`share` new questions of one task, or as many as turn up before draws stop being new."""
        first_seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:4], "big")
        offset = found = misses = 0
        # with one of n questions left unseen, 4n misses in a row happen with probability e^-4
        while found < share and misses < max(200, 4 * found):
            chunk = max(share, 64)
            dataset = _create(name, {**self.tasks[name], "seed": first_seed + offset, "size": chunk})
            for i in range(chunk):
                prompt = _gym_prompt(name, dataset[i])
                if prompt.id in seen:
                    misses += 1
                    continue
                seen.add(prompt.id)
                found, misses = found + 1, 0
                yield prompt
                if found == share:
                    return
            offset += chunk
        log.warning("reasoning_gym/%s has about %d distinct questions under this config, %d wanted", name, found, share)


class GSM8K:
    """Grade-school word problems in their own JSONL: `{"question", "answer"}`, the answer's last line `#### n`.

    The worked solution goes to `meta["thought"]` without its `<<48/2=24>>` calculator marks.

    Args:
        path: a JSONL file, a folder holding `train.jsonl` and `test.jsonl`, or the hub name `"openai/gsm8k"`.
        part: the official `"train"` or `"test"` part, of a folder or the hub. To evaluate on the whole official test
            part, take `part="test"` with `held_out_fraction=1.0`.
        revision: commit of the hub repository.
    """

    def __init__(self, path: str = GSM8K_HUB, part: str = "train", revision: str = "main") -> None:
        if part not in ("train", "test"):
            raise ConfigError(f"got part={part!r}; {nearest(part, ['train', 'test'])}")
        self.path, self.part, self.revision = path, part, revision

    def __iter__(self) -> Iterator[Prompt]:
        return _distinct(self._prompts(), "gsm8k", self.path)

    def _prompts(self) -> Iterator[Prompt]:
        for where, row in self._rows():
            question, solution = _text(row, "question", where), _text(row, "answer", where)
            thought, mark, answer = solution.rpartition("####")
            if not mark or not answer.strip():
                raise DataError(
                    f"{where}: the answer has no last line '#### <number>'; for files in another form type data=jsonl"
                )
            meta = {"thought": _CALCULATOR.sub("", thought).strip()}
            yield Prompt(prompt_id(question), question, answer.strip().replace(",", ""), "gsm8k", (), meta)

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        path = Path(self.path)
        if path.is_dir():
            path = path / f"{self.part}.jsonl"
        if path.exists() or self.path != GSM8K_HUB:
            return read_jsonl(path)
        return _hub_parquet(GSM8K_HUB, f"main/{self.part}-00000-of-00001.parquet", self.revision)


class JSONL:
    """A user's problems, one JSON object per line.

    Args:
        path: the file.
        question_field, answer_field, thought_field: names of the fields. The thought (a worked solution, for priming)
            may be missing; every other field of the line goes to `meta["fields"]`.
        name: `Prompt.source` becomes `"jsonl/NAME"`; the file's stem by default.
    """

    def __init__(
        self,
        path: str,
        question_field: str = "question",
        answer_field: str = "answer",
        thought_field: str = "thought",
        name: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.question_field, self.answer_field, self.thought_field = question_field, answer_field, thought_field
        self.name = f"jsonl/{name or self.path.stem}"

    def __iter__(self) -> Iterator[Prompt]:
        return _distinct(self._prompts(), self.name, str(self.path))

    def _prompts(self) -> Iterator[Prompt]:
        known = {self.question_field, self.answer_field, self.thought_field}
        for where, row in read_jsonl(self.path):
            question, answer = _text(row, self.question_field, where), _text(row, self.answer_field, where)
            meta: dict[str, Any] = {}
            if self.thought_field in row:
                meta["thought"] = _text(row, self.thought_field, where)
            if rest := {key: value for key, value in row.items() if key not in known}:
                meta["fields"] = rest
            yield Prompt(prompt_id(question), question, answer, self.name, (), meta)


def read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(`"file:line"`, object) of every non-empty line."""
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}; give the path of a .jsonl file with one JSON object per line")
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _object(line, where)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a file that you may read") from error


def _object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, thousands of open brackets
        raise DataError(
            f"{where}: not JSON ({error}); repair or remove this line (valid: one object per line, in UTF-8)"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: got {type(row).__name__}, expected an object like {{"question": ...}}')
    return row


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where}: no field {field!r}; {nearest(field, [str(key) for key in row])}")
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f"{where}: field {field!r} is {value!r}, expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):  # Python's JSON reads NaN and Infinity
        raise DataError(f"{where}: field {field!r} is {value}, expected text or a finite number")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone, from a text that was cut: no record could hold it
        cut = text[error.start]
        raise DataError(f"{where}: field {field!r} holds half a character, {cut!r}; remove it") from error
    return text


def _distinct(prompts: Iterator[Prompt], name: str, path: str) -> Iterator[Prompt]:
    answers: dict[str, str] = {}
    total = others = 0
    for prompt in prompts:
        total += 1
        if prompt.id not in answers:
            answers[prompt.id] = prompt.answer
            yield prompt
        else:
            others += prompt.answer != answers[prompt.id]
    if total == 0:
        raise DataError(
            f'{path} holds no problems; give one object per line, e.g. {{"question": "What is 2 + 3?", "answer": "5"}}'
        )
    if total > len(answers):
        hint = f"; {others} of them have another answer than the first" if others else ""
        log.warning("%s: %d of %d questions are repeats and were left out%s", name, total - len(answers), total, hint)


def _hub_parquet(repo: str, file: str, revision: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:  # every hub and connection error is an OSError
        raise DataError(
            f"could not get {file} of the dataset {repo}: {error}\n"
            "Without a network, give the path of the dataset's own JSONL: data.source.path=/path/to/train.jsonl"
        ) from error
    for number, row in enumerate(pq.read_table(path).to_pylist(), start=1):
        yield f"{path}:{number}", row


def _check_task(name: str, config: Mapping[str, Any]) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ConfigError(f"reasoning-gym has no task {name!r}; {nearest(name, DATASETS)}")
    valid = [f.name for f in fields(DATASETS[name][1]) if f.name not in ("seed", "size")]
    for key in config:
        if key not in valid:
            raise ConfigError(f"task {name!r} has no config key {key!r}; {nearest(key, valid)}")
    in_order = name == "basic_arithmetic" and not config.get("allow_parentheses", True)
    if in_order and set(config.get("operators", "+-*/")) & set("*/"):
        raise ConfigError(
            "basic_arithmetic with allow_parentheses=false gives wrong answers in reasoning-gym: it evaluates from "
            "left to right, without precedence. Set allow_parentheses=true, or operators=['+','-']."
        )
    _create(name, {**config, "seed": 0, "size": 1})


def _create(name: str, config: dict[str, Any]) -> Any:
    from reasoning_gym import create_dataset

    try:
        return create_dataset(name, **config)
    except (AssertionError, ValueError, TypeError) as error:  # the library validates with assert
        given = {key: value for key, value in config.items() if key not in ("seed", "size")}
        raise ConfigError(f"task {name!r} refuses the config {given}: {error}") from error


def _gym_prompt(name: str, entry: dict[str, Any]) -> Prompt:
    question = entry["question"]
    # a scorer reads the entry in another process, so what it gets must already be what JSON can carry
    plain = json.loads(json.dumps(entry, default=str))
    meta = {"reasoning_gym": {"dataset": name, "entry": plain}}
    # puzzles with many solutions have no reference: only the task's own scorer can judge them
    answer = "" if entry["answer"] is None else str(entry["answer"])
    return Prompt(prompt_id(question), question, answer, f"reasoning_gym/{name}", (), meta)


def _plain(value: Any) -> Any:
    """Plain dicts and lists out of whatever mapping a config library hands over."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return value
    return [_plain(item) for item in value]
