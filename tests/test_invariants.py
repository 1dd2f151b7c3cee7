"""What must stay true of the whole source: arrows between modules, the doors, and material used once."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from parties import Party, run_parties

from mimir.errors import LocalError
from mimir.mpc import doors, ops, prep
from mimir.mpc.replicated import Replicated

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {p.relative_to(ROOT).with_suffix("").as_posix(): p for p in (ROOT / "mimir").rglob("*.py")}

# What a module, or a folder, must never import. The arrows of DESIGN.md, read backwards.
FORBIDDEN = {
    "mimir/kernels": ("mimir.mpc", "mimir.net", "mimir.model", "mimir.actors", "mimir.client"),
    "mimir/net": ("mimir.mpc", "mimir.actors", "mimir.client", "mimir.kernels"),
    "mimir/client": ("mimir.actors", "mimir.mpc.share", "mimir.mpc.doors", "mimir.mpc.prep", "mimir.mpc.ops"),
    "mimir/mpc": ("mimir.model", "mimir.actors", "mimir.client", "mimir.store"),
    "mimir/mpc/domain": ("mimir.mpc",),
    "mimir/mpc/drbg": ("mimir.mpc", "mimir.net"),
    "mimir/mpc/share": ("mimir.mpc.doors", "mimir.mpc.prep", "mimir.mpc.ops", "mimir.mpc.replicated"),
    "mimir/mpc/replicated": ("mimir.mpc.doors", "mimir.mpc.prep", "mimir.mpc.ops", "mimir.net"),
    "mimir/mpc/doors": ("mimir.mpc.check", "mimir.mpc.prep", "mimir.mpc.ops"),
    "mimir/mpc/check": ("mimir.mpc.prep", "mimir.mpc.ops", "mimir.mpc.replicated"),
    "mimir/mpc/prep": ("mimir.mpc.ops", "mimir.mpc.nonlinear", "mimir.mpc.replicated"),
    "mimir/mpc/ops": ("mimir.mpc.nonlinear", "mimir.mpc.replicated"),
    "mimir/mpc/nonlinear": ("mimir.mpc.replicated",),
    "mimir/mpc/plan": ("mimir.mpc.replicated",),
    "mimir/model": ("mimir.actors", "mimir.mpc.replicated", "mimir.client"),
}

# Every place that opens or reveals, by module and enclosing function. A new one is a decision: read doors.py,
# say why the value may be clear, and add it here.
DOORS = {
    "mimir/actors/session:_input reveal",
    "mimir/actors/session:_deliver reveal",
    "mimir/model/sampling:_largest open_low",
    "mimir/model/sampling:choose open_low",
    "mimir/model/transformer:attention open",
    "mimir/model/transformer:mix open",
    "mimir/model/transformer:reenter open_all",
    "mimir/mpc/check:_inner_product open_extension",
    "mimir/mpc/nonlinear:rms_norm open",
    "mimir/mpc/ops:are_below open_low",
    "mimir/mpc/ops:coarse_index open",
    "mimir/mpc/ops:conjunction open_bits",
    "mimir/mpc/ops:evaluate open",
    "mimir/mpc/ops:is_negative open_low",
    "mimir/mpc/ops:is_zero open_low",
    "mimir/mpc/ops:matmul open",
    "mimir/mpc/ops:mul open",
    "mimir/mpc/ops:read_index open",
    "mimir/mpc/ops:scale open",
    "mimir/mpc/ops:to_ring open_bits",
    "mimir/mpc/ops:together open_all",
    "mimir/mpc/ops:truncate open",
}
OPENING = {"open", "open_bits", "open_low", "open_all", "open_extension", "reveal"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("place", sorted(FORBIDDEN))
def test_arrows_go_one_way(place: str) -> None:
    for name, path in SOURCES.items():
        if name == place or name.startswith(f"{place}/"):
            for found in imports(path):
                for bad in FORBIDDEN[place]:
                    assert not (found == bad or found.startswith(f"{bad}.")), f"{name} imports {found}"


def test_only_the_command_line_imports_actors() -> None:
    for name, path in SOURCES.items():
        if not name.startswith("mimir/actors") and name not in ("mimir/__main__", "mimir/party"):
            assert not any(f.startswith("mimir.actors") for f in imports(path)), name


def test_tunnels_know_nothing_of_mimir() -> None:
    for path in (ROOT / "wg").rglob("*.py"):
        assert not any(f == "mimir" or f.startswith("mimir.") for f in imports(path)), path


class _Calls(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.module, self.stack, self.found = module, ["<module>"], set[str]()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.stack.append(node.name)
        self.generic_visit(node)
        self.stack.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Call(self, node: ast.Call) -> None:
        f = node.func
        if isinstance(f, ast.Attribute) and f.attr in OPENING:
            owner = ast.unparse(f.value)
            if owner.endswith(("doors", "_online")) or owner == "d":
                self.found.add(f"{self.module}:{self.stack[-1]} {f.attr}")
        self.generic_visit(node)


def test_every_place_that_opens_or_reveals_is_known() -> None:
    found: set[str] = set()
    for name, path in SOURCES.items():
        if name.startswith(("mimir/mpc", "mimir/model", "mimir/actors")) and name not in (
            "mimir/mpc/doors",
            "mimir/mpc/plan",
        ):
            calls = _Calls(name)
            calls.visit(ast.parse(path.read_text()))
            found |= calls.found
    assert found == DOORS


def test_a_reveal_needs_a_listed_purpose() -> None:
    async def curious(p: Party) -> None:
        await p.doors.reveal("curiosity", p.share(np.ones(1, np.uint64)))

    with pytest.raises(BaseException) as caught:
        run_parties(curious)
    assert caught.group_contains(LocalError, match="curiosity")
    assert doors.REVEAL_PURPOSES == {"token", "input mask"}


def test_shares_do_not_show_themselves() -> None:
    async def look(p: Party) -> None:
        share = p.share(np.arange(3, dtype=np.uint64))
        assert repr(share) == "<Share (3,)>"
        for misuse in (bool, lambda s: s == s, hash, pickle.dumps, copy.copy):
            with pytest.raises(TypeError):
                misuse(share)

    run_parties(look)


def test_material_is_taken_once() -> None:
    async def greedy(p: Party) -> None:
        ctx = await p.context({prep.Mul(): 3, prep.DaBit(): 64})
        first = ctx.take(prep.Mul(), 2)
        second = ctx.take(prep.Mul(), 1)
        assert not np.shares_memory(first["x"].v, second["x"].v)
        with pytest.raises(LocalError, match="used up"):
            ctx.take(prep.Mul(), 1)
        ctx.take(prep.DaBit(), 1)  # a lane takes its word along
        with pytest.raises(LocalError, match="used up"):
            ctx.take(prep.DaBit(), 1)
        with pytest.raises(LocalError, match="was prepared"):
            ctx.take(prep.Trunc(3), 1)

    run_parties(greedy)


def test_no_stream_is_expanded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, int]] = set()
    expand = Replicated._expand

    def watched(self: Replicated, out: np.ndarray) -> None:
        expand(self, out)
        key = (id(self), self._stream)
        assert key not in seen
        seen.add(key)

    monkeypatch.setattr(Replicated, "_expand", watched)

    async def work(p: Party) -> None:
        ctx = await p.context({prep.Mul(): 4, prep.Trunc(16): 4})
        x = p.share(np.arange(4, dtype=np.uint64))
        (y,) = await ops.mul(ctx, "mul", (x, x))
        await ops.truncate(ctx, "truncate", (y, 16))
        p.bk.wipe()
        with pytest.raises(LocalError, match="wiped"):
            p.bk.random(1)

    run_parties(work)
    assert len(seen) > 20


def test_there_is_no_switch_that_turns_a_check_off() -> None:
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg not in ("check", "verify", "insecure"), f"{name}: a switch named {node.arg}"
