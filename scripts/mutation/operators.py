"""One-place changes of a source file, each a mistake that somebody could make.

core: signs (+ and -, unary minus, operands or arguments in the other order); denominators (* and /, dropped, sum and
    mean, another of the step's totals); stop-gradients (`.detach()` dropped, or added to what carries a gradient).
other: comparisons, conditions, bounds, constants, booleans; calls dropped, such as `.masked_fill`, `.clamp`, `.exp`.

Left alone: what is raised, docstrings, annotations, defaults, decorators, and strings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Change = tuple[str, str, ast.AST]  # class, operator, what takes the node's place

ARITHMETIC: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
BITWISE: dict[type, type] = {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
SWAPPED = {
    "core": {"sum": "mean", "mean": "sum", "sequences_total": "tokens_total", "tokens_total": "sequences_total"}
    | {"prompts_total": "sequences_total", "max_completion": "tokens_total"},
    "other": {"minimum": "maximum", "maximum": "minimum", "amin": "amax", "amax": "amin", "min": "max", "max": "min"}
    | {"any": "all", "all": "any", "rsqrt": "sqrt"},
}
DROPPED_METHODS = {"masked_fill", "clamp", "flip", "exp", "log", "sqrt", "abs", "square", "double"}
DROPPED_CALLS = {"safe_exp", "exp", "sigmoid"}
CARRIES_GRADIENT = re.compile(
    r"(ratio|(new_)?logprobs|new|w|log_w|log|loss|entropy|difference|values|student(_logits)?)_(BT|TV)|mean_B1"
)
NO_GRADIENT = re.compile(r"detach|ones_like|zeros_like|_never|masked_mean|\w+_metrics")  # calls that return none
OF_CONSTANTS = re.compile(r"advantage|statistics")  # files about rewards, which are constants of the update
CONSTANTS = {0: (1,), 1: (0, 2), 2: (1,), 0.5: (2, 1)}
SHAPES = {"ones", "zeros", "empty", "full"}  # the constants in these are sizes


@dataclass
class Mutant:
    """One change: `parent.field` (or its element `index`) becomes `new`.

    `change` is the smallest piece of source that shows it, before -> after; with `file` and `function` its name.
    """

    path: Path
    line: int
    function: str
    kind: str
    operator: str
    change: str
    tree: ast.Module
    parent: ast.AST
    field: str
    index: int | None
    new: ast.AST

    @property
    def key(self) -> str:
        return f"{self.path.name}:{self.function}: {self.change}"

    def code(self) -> Any:
        """The changed file, compiled. The tree stays changed: call it in a process of its own."""
        _put(self, self.new)
        return compile(ast.fix_missing_locations(self.tree), str(self.path), "exec")


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node, ancestors in _walk(tree, []):
        parent, field, index = ancestors[-1]
        for kind, operator, new in _changes(node, [ancestor for ancestor, *_ in ancestors]):
            if operator == "stop-gradient added" and OF_CONSTANTS.match(path.name):
                continue
            function = next((a.name for a, *_ in reversed(ancestors) if isinstance(a, ast.FunctionDef)), "module")
            mutant = Mutant(
                path, getattr(node, "lineno", 0), function, kind, operator, "", tree, parent, field, index, new
            )
            mutant.change = _shown(mutant, node, ancestors)
            found.append(mutant)
    return sorted(found, key=lambda m: m.line)


def _walk(node: ast.AST, ancestors: list[Any]) -> Iterator[tuple[ast.AST, list[Any]]]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                continue
            path = [*ancestors, (node, field, index)]
            yield child, path
            yield from _walk(child, path)


def _changes(node: ast.AST, above: list[ast.AST]) -> Iterator[Change]:
    match node:
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield "core", "arithmetic", ast.BinOp(left, ARITHMETIC[type(op)](), right)
            if isinstance(op, ast.Div):
                yield "core", "denominator dropped", left
            if isinstance(op, ast.Sub) and getattr(above[-1], "attr", "") not in ("square", "abs"):
                yield "core", "operands swapped", ast.BinOp(right, op, left)
        case ast.BinOp(left, op, right) if type(op) in BITWISE:
            yield "other", "boolean", ast.BinOp(left, BITWISE[type(op)](), right)
        case ast.UnaryOp(ast.USub(), operand):
            # The minus of an axis or of a step is no sign of the formula.
            yield "other" if isinstance(operand, ast.Constant) else "core", "minus dropped", operand
        case ast.UnaryOp(ast.Invert() | ast.Not(), operand):
            yield "other", "not dropped", operand
        case ast.BoolOp(op, values):
            yield "other", "boolean", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.Compare(left, [op], [right]):
            for other in COMPARISONS[type(op)]:
                yield "other", "comparison", ast.Compare(left, [other()], [right])
        case ast.Constant(bool(value)):
            yield "other", "constant", ast.Constant(not value)
        case ast.Constant(int() | float() as value) if _called(above[-1]) not in SHAPES:
            axis = getattr(above[-1], "arg", "") == "dim"
            for other in (1 - value,) if axis else CONSTANTS.get(value, (value + 1,)):
                yield "other", "constant", ast.Constant(other)
        case ast.Constant("amin" | "amax" as value):
            yield "other", "bound", ast.Constant(SWAPPED["other"][value])
        case ast.Attribute(value, name, ctx) if isinstance(ctx, ast.Load):
            for kind, names in SWAPPED.items():
                if name in names:
                    yield kind, "bound" if kind == "other" else "denominator", ast.Attribute(value, names[name], ctx)
        case ast.keyword(arg="min" | "max" as name, value=value) if len(above[-1].keywords) == 1:  # type: ignore
            yield "other", "bound", ast.keyword(SWAPPED["other"][name], value)
        case ast.Name(name) if isinstance(node.ctx, ast.Load):
            if name in ("min", "max", "any", "all", "reversed"):
                new = {"reversed": "list"}.get(name) or SWAPPED["other"][name]
                yield "other", "bound", ast.Name(new, ast.Load())
            elif CARRIES_GRADIENT.fullmatch(name) and not _constant(node, above):
                yield "core", "stop-gradient added", ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])
    match node:
        case ast.Call(ast.Attribute(value, "detach")) if not _under_no_grad(above):
            yield "core", "stop-gradient dropped", value
        case ast.Call(ast.Attribute(ast.Name("torch"), "where"), [condition, a, b]):
            yield "other", "branches swapped", ast.Call(node.func, [condition, b, a], [])
        case ast.Call(_, [argument, *_]) if _called(node) in DROPPED_CALLS:
            yield "other", "call dropped", argument
        case ast.Call(ast.Attribute(value, name)) if name in DROPPED_METHODS:
            yield "other", "call dropped", value
        case ast.Call(ast.Name(), [ast.Name(a) as first, ast.Name(b) as second, *rest]):
            if a.rpartition("_")[2] == b.rpartition("_")[2] and "_" in a:
                yield "core", "arguments swapped", ast.Call(node.func, [second, first, *rest], node.keywords)
    match above[-1]:
        case ast.If(test) | ast.IfExp(test) if test is node and not isinstance(node, ast.Compare | ast.UnaryOp):
            yield "other", "condition", ast.UnaryOp(ast.Not(), node)  # type: ignore[arg-type]


def _called(node: ast.AST) -> str:
    """The name of what is called, without what it belongs to."""
    return ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""


def _constant(node: ast.AST, above: list[ast.AST]) -> bool:
    """Whether no gradient can go through a name: in a comparison, already detached, or only its dtype or shape."""
    for ancestor in reversed(above):
        if isinstance(ancestor, ast.Compare) or getattr(ancestor, "attr", "") in ("dtype", "shape"):
            return True
        if NO_GRADIENT.fullmatch(_called(ancestor)):
            return True
    return _under_no_grad(above)


def _under_no_grad(above: list[ast.AST]) -> bool:
    functions = [ancestor for ancestor in above if isinstance(ancestor, ast.FunctionDef)]
    return any("no_grad" in ast.unparse(decorator) for f in functions for decorator in f.decorator_list)


def _put(mutant: Mutant, node: ast.AST) -> None:
    if mutant.index is None:
        setattr(mutant.parent, mutant.field, node)
    else:
        getattr(mutant.parent, mutant.field)[mutant.index] = node


def _shown(mutant: Mutant, node: ast.AST, ancestors: list[Any]) -> str:
    """before -> after of the largest piece around the change that fits a line."""
    shown = node
    for ancestor in reversed([ancestor for ancestor, *_ in ancestors]):
        fits = isinstance(ancestor, ast.expr | ast.Assign | ast.Return) and len(ast.unparse(ancestor)) <= 90
        if not fits and not (shown is node and isinstance(ancestor, ast.keyword)):
            break
        shown = ancestor
    before = ast.unparse(shown)
    _put(mutant, mutant.new)
    after = ast.unparse(mutant.new if shown is node else shown)
    _put(mutant, node)
    return f"{before} -> {after}"
