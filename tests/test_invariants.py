"""What must stay true of the whole source: arrows between modules, the doors, and material used once."""

from __future__ import annotations

import ast
import copy
import fnmatch
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from parties import Party, run_parties
from session_fixture import LLAMA, PARTIES, Story, run_session

from mimir.errors import LocalError
from mimir.mpc import doors, ops, prep
from mimir.mpc.replicated import Replicated

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {p.relative_to(ROOT).with_suffix("").as_posix(): p for p in (ROOT / "mimir").rglob("*.py")}

# What a module, or a folder, must never import. The arrows of DESIGN.md, read backwards.
FORBIDDEN = {
    "mimir/attest": (
        "mimir.mpc",
        "mimir.net",
        "mimir.model",
        "mimir.actors",
        "mimir.client",
        "mimir.kernels",
    ),
    "mimir/attesters": (
        "mimir.mpc",
        "mimir.net",
        "mimir.model",
        "mimir.actors",
        "mimir.client",
        "mimir.kernels",
    ),
    "mimir/admission": (
        "mimir.mpc",
        "mimir.model",
        "mimir.actors",
        "mimir.client",
        "mimir.kernels",
        "mimir.store",
        "mimir.keys",
    ),
    "mimir/keys": (
        "mimir.mpc",
        "mimir.model",
        "mimir.actors",
        "mimir.client",
        "mimir.kernels",
        "mimir.store",
    ),
    "mimir/vault": ("mimir.mpc", "mimir.net", "mimir.model", "mimir.actors", "mimir.client", "mimir.keys"),
    "mimir/kernels": ("mimir.mpc", "mimir.net", "mimir.model", "mimir.actors", "mimir.client"),
    "mimir/net": ("mimir.mpc", "mimir.actors", "mimir.client", "mimir.kernels"),
    "mimir/client": ("mimir.actors", "mimir.mpc.share", "mimir.mpc.doors", "mimir.mpc.prep", "mimir.mpc.ops"),
    "mimir/mpc": ("mimir.model", "mimir.actors", "mimir.client", "mimir.store"),
    "mimir/mpc/domain": ("mimir.mpc",),
    "mimir/mpc/drbg": ("mimir.mpc", "mimir.net"),
    "mimir/mpc/branches": ("mimir.mpc", "mimir.net"),
    "mimir/mpc/waves": ("mimir.mpc.share", "mimir.mpc.doors", "mimir.mpc.prep", "mimir.mpc.ops", "mimir.net"),
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

# Every call that opens or reveals, by module and enclosing function. A new one is a decision: read doors.py,
# say why the value may be clear, and add it here.
DOORS: Counter[str] = Counter(
    {
        "mimir/actors/decode:choose reveal": 1,
        "mimir/actors/session:_input reveal": 1,
        "mimir/model/checkpoint:_add open": 1,  # a file
        "mimir/model/sampling:_largest open_low": 1,
        "mimir/model/sampling:choose open_low": 1,
        "mimir/model/transformer:enter open": 1,
        "mimir/model/transformer:mix open": 1,
        "mimir/model/transformer:reenter open_all": 1,
        "mimir/mpc/check:verify open_extension": 1,
        "mimir/mpc/ops:are_below open_low": 1,
        "mimir/mpc/ops:are_zero open_low": 1,
        "mimir/mpc/ops:choose open_all": 1,
        "mimir/mpc/ops:coarse_index open_low": 1,
        "mimir/mpc/ops:decay open_low": 1,
        "mimir/mpc/ops:is_negative open_low": 1,
        "mimir/mpc/ops:is_zero open_low": 1,
        "mimir/mpc/ops:matmul open_low": 1,
        "mimir/mpc/ops:monomials open_bits": 1,
        "mimir/mpc/ops:mul open": 1,
        "mimir/mpc/ops:open open_all": 1,  # these three: doors of a branch, for `together`
        "mimir/mpc/ops:open_bits open_all": 1,
        "mimir/mpc/ops:open_low open_all": 1,
        "mimir/mpc/ops:pick open_all": 1,
        "mimir/mpc/ops:read open_low": 1,
        "mimir/mpc/ops:scale open": 1,
        "mimir/mpc/ops:to_ring open_bits": 1,
        "mimir/mpc/ops:wave open_low": 1,
        "mimir/mpc/ops:opened open_all": 1,  # within `together`
        "mimir/mpc/ops:truncate open_all": 1,
        "mimir/mpc/ops:truncate_if open_all": 1,
        "mimir/mpc/ops:truncate_rows open_all": 1,
    }
)
NAMED = {"mimir/actors/peer": 1}  # the model store's, for a thread to call
OPENING = {"open", "open_bits", "open_low", "open_all", "open_extension", "_open", "reveal"}


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


# Modules in the order in which they may know of each other: a module imports what stands before it, or in its
# own line. What is not listed belongs to the line of its folder.
ORDER = (
    ("mimir/__init__", "mimir/errors"),
    ("mimir/secret", "mimir/hpke", "mimir/kernels"),
    ("mimir/config", "mimir/boot"),
    ("mimir/attest/__init__", "mimir/attest/trail"),
    ("mimir/attest/certs", "mimir/attest/rules"),
    ("mimir/attest/signatures",),
    ("mimir/attest/snp", "mimir/attest/tdx", "mimir/attest/nitro", "mimir/attest/tpm"),
    ("mimir/attest/azure", "mimir/attest/evidence"),
    ("mimir/attest/policy", "mimir/attest/collateral"),
    ("mimir/attest/appraisal",),
    ("mimir/model/checkpoint", "mimir/model/tokenizer", "mimir/model/__init__"),
    ("mimir/manifest", "mimir/mpc/weights"),
    ("mimir/vault",),
    ("mimir/store",),
    ("mimir/net",),
    ("mimir/attesters",),
    ("mimir/admission/__init__", "mimir/admission/revocation"),
    ("mimir/admission/certificates",),
    ("mimir/admission/tls",),
    ("mimir/net/metrics", "mimir/net/control"),
    ("mimir/admission/exchange",),
    ("mimir/admission/bootstrap",),
    ("mimir/keys",),
    ("mimir/mpc/__init__", "mimir/mpc/domain", "mimir/mpc/drbg", "mimir/mpc/offload", "mimir/mpc/branches"),
    ("mimir/mpc/waves",),
    ("mimir/mpc/share", "mimir/mpc/replicated"),
    ("mimir/mpc/doors",),
    ("mimir/mpc/check",),
    ("mimir/mpc/prep",),
    ("mimir/mpc/ops",),
    ("mimir/mpc/plan", "mimir/mpc/nonlinear"),
    ("mimir/model",),
    ("mimir/actors",),
    ("mimir/client",),
    ("mimir/dryrun", "mimir/loopback"),
    ("mimir/calibration",),
    ("mimir/cost",),
    ("mimir/confine",),
    ("mimir/doctor", "mimir/party", "mimir/policy", "mimir/attester", "mimir/revoke"),
    ("mimir/__main__",),
)


def line_of(module: str) -> int:
    """Where a module stands: the longest entry that names it or its folder."""
    places = [
        (len(p), i) for i, line in enumerate(ORDER) for p in line if module == p or module.startswith(f"{p}/")
    ]
    assert places, f"{module} has no place in ORDER"
    return max(places)[1]


def test_modules_stand_in_one_order() -> None:
    """No module imports one that stands after it, not even within a function."""
    for name, path in SOURCES.items():
        for found in imports(path):
            target = found.replace(".", "/")
            target = target if target in SOURCES else f"{target}/__init__"
            if target in SOURCES:  # else a name inside a module, and the module is found as well
                assert line_of(target) <= line_of(name), f"{name} imports {found}"


def test_verifiers_know_no_clock_and_no_network() -> None:
    """Time and collateral are arguments: a verdict can be had again, later and elsewhere."""
    for name, path in SOURCES.items():
        if name.startswith("mimir/attest/") and name != "mimir/attest/collateral":
            assert not imports(path) & {"time", "socket", "ssl", "trio"}, name
            assert not any(f.split(".")[0] in ("urllib", "http", "asyncio") for f in imports(path)), name
            called = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert not called & {"now", "utcnow", "today"}, f"{name} asks a clock"


def test_only_the_command_line_and_the_cost_model_import_actors() -> None:
    for name, path in SOURCES.items():
        known = ("mimir/__main__", "mimir/party", "mimir/dryrun", "mimir/loopback", "mimir/calibration")
        if not name.startswith("mimir/actors") and name not in known:
            assert not any(f.startswith("mimir.actors") for f in imports(path)), name


def test_no_party_can_run_over_shapes() -> None:
    """`dryrun` takes the engine's kernels away: nothing but the cost model and its command may import it."""
    reach = {
        "mimir/dryrun": ("mimir/calibration", "mimir/cost"),
        "mimir/loopback": ("mimir/calibration",),
        "mimir/calibration": ("mimir/cost",),
        "mimir/cost": ("mimir/__main__",),
    }
    for module, known in reach.items():
        dotted = module.replace("/", ".")
        for name, path in SOURCES.items():
            assert name in known or name == module or dotted not in imports(path), f"{name} imports {module}"


def test_tunnels_know_nothing_of_mimir() -> None:
    for path in (ROOT / "wg").rglob("*.py"):
        assert not any(f == "mimir" or f.startswith("mimir.") for f in imports(path)), path


# Lowest first: a module of the tunnel imports what stands before it.
WG_ORDER = (
    "errors",
    "keys",
    "uapi",
    "device",
    "interface",
    "probe",
    "exchange",
    "rotation",
    "generations",
    "tunnel",
    "vsock",
    "relay",
    "capture",
)


def test_modules_of_the_tunnel_stand_in_one_order() -> None:
    found = {path.stem: path for path in (ROOT / "wg").glob("*.py") if path.stem != "__init__"}
    assert set(found) == set(WG_ORDER)
    for name, path in found.items():
        for imported in imports(path):
            stem = imported.removeprefix("wg.").split(".")[0]
            if imported.startswith("wg.") and stem in found:
                assert WG_ORDER.index(stem) < WG_ORDER.index(name), f"wg/{name} imports {imported}"


class _Calls(ast.NodeVisitor):
    """Calls of what opens or reveals, by enclosing function; and how often their names occur at all."""

    def __init__(self, module: str) -> None:
        self.module, self.stack, self.found, self.named = module, ["<module>"], Counter[str](), 0

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.stack.append(node.name)
        self.generic_visit(node)
        self.stack.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in OPENING:
            self.found[f"{self.module}:{self.stack[-1]} {node.func.attr}"] += 1
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.named += node.attr in OPENING
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self.named += node.value in OPENING if isinstance(node.value, str) else 0


def test_every_place_that_opens_or_reveals_is_known() -> None:
    """Each call, whatever it is called on; and no opening is handed on by name, which would hide its call."""
    found: Counter[str] = Counter()
    for name, path in SOURCES.items():
        if name.startswith(("mimir/mpc", "mimir/model", "mimir/actors")) and name not in (
            "mimir/mpc/doors",
            "mimir/mpc/plan",
        ):
            calls = _Calls(name)
            calls.visit(ast.parse(path.read_text()))
            uncalled = calls.named - calls.found.total()
            assert uncalled == NAMED.get(name, 0), f"{name} names an opening without calling it"
            found += calls.found
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
        ctx = await p.context({prep.Mul(): 3, prep.Digits((2,)): 64})
        first = ctx.take(prep.Mul(), 2)
        second = ctx.take(prep.Mul(), 1)
        assert not np.shares_memory(first["x"].v, second["x"].v)
        with pytest.raises(LocalError, match="used up"):
            ctx.take(prep.Mul(), 1)
        ctx.take(prep.Digits((2,)), 1)  # a lane takes its word along
        with pytest.raises(LocalError, match="used up"):
            ctx.take(prep.Digits((2,)), 1)
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


def test_no_stream_of_a_session_serves_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole session with two turns: no key is expanded twice at one number by any party, and each
    component's key gives its two holders the same streams and nobody else any.
    """
    drawn: dict[tuple[bytes, int], list[tuple[int, int, int]]] = {}
    expand = Replicated._expand

    def watched(self: Replicated, out: np.ndarray) -> None:
        expand(self, out)
        for slot, key in enumerate((self._mine, self._next)):
            with key.reveal_to_kernel() as k:
                at = (bytes(k), self._stream)
            drawn.setdefault(at, []).append((self.party, (self.party + slot) % PARTIES, out[slot].size))

    monkeypatch.setattr(Replicated, "_expand", watched)
    story = Story(LLAMA, ((3, 0), (8,)))
    assert run_session(story).tokens == story.expected
    assert len({key for key, _ in drawn}) == 2 * PARTIES  # a key for each component, on each lane
    for uses in drawn.values():
        (first, component, size), (second, other, same) = uses
        assert component == other and size == same
        assert {first, second} == {component, (component - 1) % PARTIES}


def test_parties_print_nothing() -> None:
    """What may print is what talks to a person at a terminal; the engine and the wire have only the log."""
    talking = (
        "mimir/__main__",
        "mimir/cost",
        "mimir/doctor",
        "mimir/party",
        "mimir/client",
        "mimir/kernels/build",
    )
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "print",
                "pprint",
                "breakpoint",
            ):
                assert name.startswith(talking), f"{name} prints"


def test_the_log_is_given_no_arrays() -> None:
    """In the engine and the actors a log line takes names, numbers and texts: nothing named like a share."""
    secret = {
        "share",
        "shares",
        "components",
        "payload",
        "mask",
        "masks",
        "key",
        "seed",
        "message",
        "token",
    }
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if owner.split(".")[-1] == "log" and name.startswith(
                ("mimir/mpc", "mimir/model", "mimir/actors")
            ):
                for value in [*node.args, *(k.value for k in node.keywords)]:
                    words = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(value)}
                    arrays = {n.attr for n in ast.walk(value) if isinstance(n, ast.Attribute)} & {"v"}
                    assert not words & secret and not arrays, f"{name} logs {ast.unparse(value)}"


def test_no_check_is_an_assertion() -> None:
    """Python leaves assertions out if told to optimise: what guards against peers must raise."""
    for name in (
        "mimir/mpc/doors",
        "mimir/mpc/check",
        "mimir/net/wire",
        "mimir/client/session",
        "mimir/client/attestation",
        *(name for name in SOURCES if name.startswith("mimir/attest")),
    ):
        assert not any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(SOURCES[name].read_text()))), (
            name
        )


def test_there_is_no_switch_that_turns_a_check_off() -> None:
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg not in ("check", "verify", "insecure"), f"{name}: a switch named {node.arg}"


# --- prose -----------------------------------------------------------------------------------------------


def test_every_test_that_the_prose_names_is_there() -> None:
    """A claim in DESIGN.md or README.md points at a test; a test that was renamed leaves it without one."""
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    names = set(re.findall(r"^(?:async )?def (test_\w+)", "\n".join(files.values()), re.MULTILINE))
    assert names
    for prose in ("DESIGN.md", "README.md"):
        for name in re.findall(r"\btest_[\w*]+(?:\.py)?", (ROOT / prose).read_text()):
            there = name in files if name.endswith(".py") else fnmatch.filter(names, name)
            assert there, f"{prose}: {name} is in no file of tests/"
