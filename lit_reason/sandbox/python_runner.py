"""Runs a program that a model wrote, and says what it printed. Only the worker loads this: it executes text.

payload: `{"code": "print(12 * 7)", "max_chars": 512}`
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import random
import sysconfig

# What programs import, loaded before the fork: some walk frames when they are first imported, which a child may not.
COMMON = ["bisect", "calendar", "cmath", "collections", "dataclasses", "datetime", "decimal", "enum", "fractions"]
COMMON += ["functools", "heapq", "itertools", "json", "math", "operator", "re", "statistics", "string", "textwrap"]
COMMON += ["csv", "hashlib", "random", "typing", "uuid"]
for _name in COMMON:
    importlib.import_module(_name)

TEXTS = True
# A program may read what it can import, and no file of the user's: it could print it into a completion.
READABLE = tuple({sysconfig.get_paths()[name] + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def prepare(payload: dict) -> None:
    """Nothing to build."""


def is_prepared(payload: dict) -> bool:
    return True


def score(payload: dict) -> str:
    """What the program prints, then the value of its last line if that is an expression, or its error in one line.

    At most `max_chars` characters. The generator of `random` is seeded; `namedtuple`, which walks frames, is forbidden.
    """
    out = _Limited(payload["max_chars"])
    random.seed(0)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            _run(payload["code"])
        except BaseException as error:  # also SystemExit: whatever it is, it is what the model gets to read
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return out.getvalue().strip()


def _run(code: str) -> None:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    names = {"__name__": "__main__"}
    exec(compile(tree, "<program>", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<program>", "eval"), names)  # type: ignore[attr-defined]
        if value is not None:
            print(value)


class _Limited(io.StringIO):
    """Forgets what is written beyond `room` characters, so that a loop that prints cannot fill the memory."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, text: str) -> int:
        kept = text[: max(0, self.room)]
        self.room -= len(kept)
        super().write(kept)
        return len(text)
