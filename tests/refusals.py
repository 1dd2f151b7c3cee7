"""Which calls of the verifiers can refuse, and which of them a test has made do so.

A pytest plugin: while it is registered, it notes the place in `mimir/attest` that each refusal came from.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from mimir import attest
from mimir.attest.trail import Trail

FOLDER = Path(attest.__file__).parent
#: Methods of a trail that can refuse, and which of their arguments names the step.
CALLS = {"require": 1, "refuse": 0, "same": 0, "one_of": 0, "guard": 0, "within": 0}
Place = tuple[str, int, int, int]  # file, line of the call, line and column of its end

reached: set[Place] = set()


def note() -> None:
    """Let every refusal from here on be noted."""
    refuse = Trail.refuse
    if hasattr(refuse, "__wrapped__"):
        return

    @functools.wraps(refuse)
    def noted(self: Trail, step: str, expected: Any, got: Any) -> NoReturn:
        frame = sys._getframe(1)
        while frame.f_code.co_qualname.startswith("Trail.") and frame.f_back is not None:
            frame = frame.f_back
        where = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        line, end, _, column = (each or 0 for each in where)
        reached.add((Path(frame.f_code.co_filename).name, line, end, column))
        refuse(self, step, expected, got)

    Trail.refuse = noted  # type: ignore[method-assign]


def places() -> dict[str, Place]:
    """Every call that can refuse, by a name that does not change when lines move."""
    found: dict[str, Place] = {}
    for path in sorted(FOLDER.glob("*.py")):
        seen: Counter[str] = Counter()
        for owner, call in _calls(ast.parse(path.read_text()), path.stem):
            assert isinstance(call.func, ast.Attribute)
            step = ast.unparse(call.args[CALLS[call.func.attr]])
            name = f"{owner} {step}"
            seen[name] += 1
            name += f" {seen[name]}" if seen[name] > 1 else ""
            place = (path.name, call.lineno, call.end_lineno or 0, call.end_col_offset or 0)
            found[name] = place
    return found


def _calls(node: ast.AST, owner: str) -> list[tuple[str, ast.Call]]:
    """Calls in the order of the text, each with the function that it stands in; those of `Trail` aside."""
    found: list[tuple[str, ast.Call]] = []
    for child in ast.iter_child_nodes(node):
        inner = owner
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            if child.name == "Trail":
                continue
            inner = f"{owner}.{child.name}"
        if (
            isinstance(child, ast.Call)
            and isinstance(child.func, ast.Attribute)
            and child.func.attr in CALLS
            and len(child.args) > CALLS[child.func.attr]
            and not _only_notes(child)
        ):
            found.append((inner, child))
        found += _calls(child, inner)
    return found


def _only_notes(call: ast.Call) -> bool:
    """`require(True, ...)` cannot refuse: it writes down what a guard before it has made sure."""
    first = call.args[0]
    return isinstance(first, ast.Constant) and first.value is True


note()
