"""Read a Hugging Face directory into the one canonical plan that the secure engine runs.

The owner does here, once and in float64, all that needs no secrecy between parties: norm gains and biases
go into the next matrix, the attention scale into the columns of queries (or, half and half, of keys), and
for LayerNorm the centring into whatever writes the residual. What is left has a single shape for both
families:

    h = embed[token] (+ pos[position])
    per layer:  u = h / sqrt(mean(h^2) + eps)
                q, k, v = split(u @ qkv + qkv_b);  q, k rotated when positions == "rope"
                h = h + concat_heads(softmax(q k^T, causal) v) @ o + o_b
                u = h / sqrt(mean(h^2) + eps);  m = u @ in + in_b
                a = silu(m[:F]) * m[F:]  when act == "silu_glu", else act(m)
                h = h + a @ out + out_b
    logits = h / sqrt(mean(h^2) + eps) @ head + head_b

`PlanSpec` is the public half (shapes and constants, no weight); the peers see only that. `Plan` adds the
weights, computed tensor by tensor when asked for, so that a model larger than memory can be provisioned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mimir.errors import LocalError, ModelError

Floats = npt.NDArray[np.float64]

WEIGHT_BITS = 15  # an encoded weight satisfies |w| < 2**WEIGHT_BITS; trained ones stay below a few hundred
MAX_SCALE_BITS = 62 - WEIGHT_BITS  # so that an encoded weight fits the signed 64-bit ring with a bit to spare
# Fraction bits of weights shared modulo 2^32: of embeddings, which are added up as they are, and of matrices.
EMBEDDING_SCALE = 16
HALF_SCALE = 12
SHORT_SCALE = 14  # of matrices modulo 2^64 whose products have no truncation before them or behind them
PUBLIC_FORMAT = 1  # version of the dictionary made by PlanSpec.public
MAX_LAYERS = 512
MAX_WIDTH = 1 << 16
MAX_HEADS = 1 << 10
MAX_HIDDEN = 1 << 19
MAX_VOCAB = 1 << 20
MAX_CONTEXT = 1 << 17
MAX_EOS = 16
MAX_JSON_BYTES = 64 << 20  # config.json and index files are far below this
MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own bound

FAMILIES = ("llama", "gpt2")
ACTS = ("silu_glu", "gelu", "gelu_tanh", "relu")
POSITIONS = ("rope", "learned")

# Hugging Face activation names, by the function they compute.
_GPT2_ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_LLAMA_ACTS = ("silu", "swish")
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class PlanSpec:
    """What is public of a model: family, dimensions and constants. Every field is checked on construction."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    act: str
    norm_eps: float
    positions: str
    rope_theta: float | None
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        def need(ok: bool, why: str) -> None:
            if not ok:
                raise ModelError(f"model description: {why}")

        for key, allowed in (("family", FAMILIES), ("act", ACTS), ("positions", POSITIONS)):
            value = getattr(self, key)
            need(
                isinstance(value, str) and value in allowed, f"{key} must be one of {allowed}, not {value!r}"
            )
        for key, top in (
            ("layers", MAX_LAYERS),
            ("width", MAX_WIDTH),
            ("heads", MAX_HEADS),
            ("kv_heads", MAX_HEADS),
            ("head_dim", MAX_WIDTH),
            ("hidden", MAX_HIDDEN),
            ("vocab", MAX_VOCAB),
            ("context", MAX_CONTEXT),
        ):
            value = getattr(self, key)
            need(
                type(value) is int and 1 <= value <= top,
                f"{key} must be an integer in 1..{top}, not {value!r}",
            )
        need(
            self.heads % self.kv_heads == 0,
            f"{self.heads} heads cannot share {self.kv_heads} key/value heads",
        )
        need(
            type(self.norm_eps) is float and 0.0 < self.norm_eps < 1.0,
            f"norm_eps must be in (0, 1), not {self.norm_eps!r}",
        )
        if self.positions == "rope":
            theta = self.rope_theta
            need(
                type(theta) is float and math.isfinite(theta) and theta > 1.0,
                f"rope_theta must exceed 1, not {theta!r}",
            )
            need(self.head_dim % 2 == 0, f"rotary positions need an even head_dim, not {self.head_dim}")
        else:
            need(self.rope_theta is None, "rope_theta has no meaning with learned positions")
        for key, ids in (
            ("bos_id", () if self.bos_id is None else (self.bos_id,)),
            ("eos_ids", self.eos_ids),
        ):
            need(type(ids) is tuple and len(ids) <= MAX_EOS, f"{key}: at most {MAX_EOS} ids")
            for token in ids:
                need(
                    type(token) is int and 0 <= token < self.vocab,
                    f"{key}: {token!r} is not a token of {self.vocab}",
                )

    @property
    def qkv_width(self) -> int:
        """Columns of "l.qkv": all query heads, then all key heads, then all value heads."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def in_width(self) -> int:
        """Columns of "l.in": gate then up for a gated activation, else the hidden layer alone."""
        return 2 * self.hidden if self.act == "silu_glu" else self.hidden

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the plan with its shape, in the order in which one token meets them."""
        d = self.width
        out: dict[str, tuple[int, ...]] = {"embed": (self.vocab, d)}
        if self.positions == "learned":
            out["pos"] = (self.context, d)
        for layer in range(self.layers):
            out[f"{layer}.qkv"] = (d, self.qkv_width)
            out[f"{layer}.qkv_b"] = (self.qkv_width,)
            out[f"{layer}.o"] = (self.heads * self.head_dim, d)
            out[f"{layer}.o_b"] = (d,)
            out[f"{layer}.in"] = (d, self.in_width)
            out[f"{layer}.in_b"] = (self.in_width,)
            out[f"{layer}.out"] = (self.hidden, d)
            out[f"{layer}.out_b"] = (d,)
        out["head"] = (d, self.vocab)
        out["head_b"] = (self.vocab,)
        return out

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes())

    def halved(self, name: str) -> bool:
        """Whether a tensor is shared modulo 2^32, in words of 4 bytes: embeddings, and the large matrices
        behind a norm, the head and those of gates, which wait for it. The others are multiplied beside it,
        before it scales anything, which takes more bits.
        """
        part = name.rpartition(".")[2]
        return part in ("embed", "pos", "head") or (part == "in" and self.act == "silu_glu")

    def scale(self, name: str, scale_bits: int) -> int:
        """Fraction bits at which a tensor is encoded."""
        if name.endswith((".o", ".qkv")) or (name.endswith(".in") and not self.halved(name)):
            return SHORT_SCALE
        if not self.halved(name):
            return scale_bits
        return EMBEDDING_SCALE if name in ("embed", "pos") else HALF_SCALE

    def word_bytes(self, name: str) -> int:
        """Of an element of a component of a tensor, at rest, on the wire and in memory."""
        return 4 if self.halved(name) else 8

    def sizes(self) -> dict[str, int]:
        """Bytes of a component of each tensor, in the order of `shapes`."""
        return {name: math.prod(shape) * self.word_bytes(name) for name, shape in self.shapes().items()}

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def public(self) -> dict[str, Any]:
        """The public manifest: plain str, int, float, None and lists, ready for JSON or msgpack."""
        out: dict[str, Any] = {"format": PUBLIC_FORMAT}
        for f in fields(PlanSpec):
            value = getattr(self, f.name)
            out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_public(cls, manifest: Mapping[str, Any]) -> PlanSpec:
        """The inverse of `public`; a missing, unknown or ill-typed entry is an error that names it."""
        if not isinstance(manifest, Mapping):
            raise ModelError(f"model description: expected a table, got {type(manifest).__name__}")
        known = {f.name for f in fields(PlanSpec)} | {"format"}
        odd = sorted(map(str, set(manifest) ^ known))
        if odd:
            raise ModelError(f"model description: missing or unknown entries: {', '.join(odd[:8])}")
        if manifest["format"] != PUBLIC_FORMAT or type(manifest["format"]) is not int:
            raise ModelError(
                f"model description: format {manifest['format']!r}, this program reads {PUBLIC_FORMAT}"
            )
        values = {key: manifest[key] for key in known - {"format"}}
        if not isinstance(values["eos_ids"], list):
            raise ModelError("model description: eos_ids must be a list")
        values["eos_ids"] = tuple(values["eos_ids"])
        return cls(**values)


@dataclass(frozen=True, eq=False, repr=False)
class Plan(PlanSpec):
    """A `PlanSpec` with its weights, each computed in float64 from the checkpoint when asked for."""

    directory: Path = field(default=Path())
    _recipes: Mapping[str, Callable[[], Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self._recipes) != set(self.shapes()):
            raise LocalError("a plan needs exactly one recipe per tensor")

    def __repr__(self) -> str:
        return f"<Plan {self.family} {self.layers}x{self.width}, {self.parameters()} weights>"

    def __eq__(self, other: object) -> bool:
        return self is other  # comparing weights is nobody's business; compare `spec`

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a plan holds private weights and is not pickled")

    @property
    def spec(self) -> PlanSpec:
        """The public half alone."""
        return PlanSpec(**{f.name: getattr(self, f.name) for f in fields(PlanSpec)})

    def tensor(self, name: str) -> Floats:
        """One folded tensor, float64, C order, y = x @ W orientation; checked finite and in range."""
        recipe = self._recipes.get(name)
        if recipe is None:
            raise LocalError(f"the plan has no tensor {name!r}")
        out = np.ascontiguousarray(recipe(), dtype=np.float64)
        if out.shape != self.shapes()[name]:
            raise LocalError(f"fold of {name} gave shape {out.shape}")
        _check_range(out, f"{self.directory}: {name} (after folding norms and scales)")
        return out

    @property
    def tensors(self) -> Mapping[str, Floats]:
        """All tensors as a lazy mapping: each access computes afresh and keeps nothing."""
        return _Lazy(self)

    def encoded(self, name: str, scale_bits: int) -> npt.NDArray[Any]:
        """`tensor(name)` at its `scale` in the ring, or modulo 2^32 if it is `halved`; or an error naming the
        directory and the tensor.
        """
        words = encode(self.tensor(name), self.scale(name, scale_bits), f"{self.directory}: {name}")
        return words.astype(np.uint32) if self.halved(name) else words

    def check(self) -> None:
        """Compute every tensor once, so that a bad weight is reported before anything is sent."""
        for name in self.names():
            self.tensor(name)


class _Lazy(Mapping[str, Floats]):
    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __getitem__(self, name: str) -> Floats:
        if name not in self._plan._recipes:
            raise KeyError(name)
        return self._plan.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.names())

    def __len__(self) -> int:
        return len(self._plan._recipes)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors>"


# -- fixed point


def encode(x: npt.ArrayLike, scale_bits: int, name: str = "value") -> npt.NDArray[np.uint64]:
    """round(x * 2**scale_bits), ties to even, as two's complement modulo 2**64.

    `name` is what an error calls the tensor. NaN, infinities and |x| >= 2**WEIGHT_BITS are errors.
    """
    if not 0 <= scale_bits <= MAX_SCALE_BITS:
        raise LocalError(f"scale_bits must be in 0..{MAX_SCALE_BITS}, not {scale_bits}")
    values = np.asarray(x, dtype=np.float64)
    _check_range(values, name)
    # Scaling by a power of two is exact, so rint is the only rounding.
    return np.rint(values * float(1 << scale_bits)).astype(np.int64).view(np.uint64)


def decode(x: npt.ArrayLike, scale_bits: int) -> Floats:
    """The float64 nearest to the signed value of each ring element over 2**scale_bits."""
    ring = np.ascontiguousarray(x, dtype=np.uint64)
    return ring.view(np.int64).astype(np.float64) / float(1 << scale_bits)


def _check_range(values: npt.NDArray[Any], name: str) -> None:
    if values.size == 0:
        return
    low, high = float(values.min()), float(values.max())  # NaN propagates through both
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        raise ModelError(
            f"{name}: {bad} of {values.size} values are NaN or infinite; the checkpoint is damaged"
        )
    if max(-low, high) >= 1 << WEIGHT_BITS:
        raise ModelError(
            f"{name}: value of magnitude {max(-low, high):.6g} is out of range; "
            f"fixed point holds magnitudes below {1 << WEIGHT_BITS}"
        )


# -- reading a directory


def load_checkpoint(directory: str | Path) -> Plan:
    """Read config.json and the safetensors header(s) of a Llama or GPT-2 directory, and plan the folds.

    Everything structural (architecture, options, names, shapes, dtypes) is checked here; values are checked
    when a tensor is computed (`Plan.check` does all). Raises ModelError naming the directory and the tensor.
    """
    home, config, family = _opened(directory)
    return _FAMILIES[family][1](home, config, _Tensors(home))


def read_spec(directory: str | Path) -> PlanSpec:
    """The public shape that config.json describes, without weights. Raises ModelError naming the file."""
    home, config, family = _opened(directory)
    return _FAMILIES[family][0](home, config)


def _opened(directory: str | Path) -> tuple[Path, _Config, str]:
    """A model directory, its config.json and its family, or an error that says what is not supported."""
    home = Path(directory)
    if not home.is_dir():
        raise ModelError(f"{home}: no such model directory")
    config = _Config(home, "config.json")
    archs = config.raw.get("architectures")
    arch = archs[0] if isinstance(archs, list) and len(archs) == 1 else config.raw.get("model_type")
    families = {"LlamaForCausalLM": "llama", "llama": "llama", "GPT2LMHeadModel": "gpt2", "gpt2": "gpt2"}
    family = families.get(str(arch))
    if family is None:
        raise ModelError(
            f"{home}/config.json: architecture {arch!r} is not supported; "
            "supported are LlamaForCausalLM and GPT2LMHeadModel"
        )
    config.refuse_unless("quantization_config", None)
    config.refuse_unless("auto_map", None)
    return home, config, family


class _Config:
    """config.json with typed access; every complaint names the file and the key."""

    def __init__(self, home: Path, name: str) -> None:
        self.path = home / name
        self.raw = _read_json(self.path)

    def fail(self, key: str, why: str) -> NoReturn:
        raise ModelError(f"{self.path}: {key}: {why}")

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is present and not null."""
        for key in keys:
            value = self.raw.get(key)
            if value is not None:
                if type(value) is not int:
                    self.fail(key, f"expected an integer, got {value!r}")
                return value
        if default is None:
            self.fail(keys[0], "is missing")
        return default

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if type(value) not in (int, float):
            self.fail(key, f"expected a number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if type(value) is not bool:
            self.fail(key, f"expected true or false, got {value!r}")
        return value

    def refuse_unless(self, key: str, *allowed: object) -> None:
        """A key that changes the computation may be absent or have one of these values, nothing else."""
        if key in self.raw and self.raw[key] not in allowed:
            shown = json.dumps(self.raw[key])
            self.fail(key, f"{shown[:80]} is not supported")

    def token_ids(self, key: str, vocab: int) -> tuple[int, ...]:
        """Ids of a special token. Ids outside the vocabulary can never be produced, so they are dropped."""
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if type(token) is not int or token < 0:
                self.fail(key, f"expected a token id or a list of them, got {value!r}")
        return tuple(dict.fromkeys(token for token in ids if token < vocab))


def _special_ids(home: Path, config: _Config, vocab: int) -> tuple[int | None, tuple[int, ...]]:
    """(bos, eos): generation_config.json wins over config.json, as it does for whoever trained the model."""
    bos, eos = config.token_ids("bos_token_id", vocab), config.token_ids("eos_token_id", vocab)
    if (home / "generation_config.json").is_file():
        generation = _Config(home, "generation_config.json")
        bos = generation.token_ids("bos_token_id", vocab) or bos
        eos = generation.token_ids("eos_token_id", vocab) or eos
    return (bos[0] if bos else None), eos


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        out = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; expected a Hugging Face model directory") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read: {e}") from None
    if not isinstance(out, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return out


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Tensors:
    """The tensors of model.safetensors, or of all the shards that model.safetensors.index.json names."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.entries: dict[str, _Entry] = {}
        single, index = home / "model.safetensors", home / "model.safetensors.index.json"
        if single.is_file():
            self._add(single)
            return
        if not index.is_file():
            raise ModelError(
                f"{home}: neither model.safetensors nor model.safetensors.index.json; "
                "save the model with safe_serialization=True (pickled weights are never loaded)"
            )
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ModelError(f"{index}: weight_map is missing or empty")
        for shard in sorted({str(name) for name in placed.values()}):
            if Path(shard).name != shard:
                raise ModelError(f"{index}: shard {shard!r} is not a plain file name")
            if not (home / shard).is_file():
                raise ModelError(f"{home / shard}: shard named by {index.name} is missing")
            self._add(home / shard)
        for name, shard in placed.items():
            if name not in self.entries or self.entries[name].path.name != shard:
                raise ModelError(
                    f"{home / str(shard)}: tensor {name} is missing, though {index.name} places it there"
                )

    def _add(self, path: Path) -> None:
        try:
            # The library checks the header against the file (offsets, overlaps, sizes); it does not give the
            # offsets away nor read bfloat16 into NumPy, so the header is then read once more here.
            with safe_open(str(path), framework="numpy"):
                pass
            with path.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                if size > MAX_HEADER_BYTES:
                    raise ModelError(f"{path}: header of {size} bytes")
                header = json.loads(f.read(size))
        except (SafetensorError, OSError, ValueError) as e:
            raise ModelError(f"{path}: not a readable safetensors file: {e}") from None
        for name, meta in header.items():
            if name == "__metadata__":
                continue
            if name in self.entries:
                raise ModelError(f"{path}: tensor {name} is also in {self.entries[name].path.name}")
            start = 8 + size + int(meta["data_offsets"][0])
            self.entries[name] = _Entry(path, str(meta["dtype"]), tuple(map(int, meta["shape"])), start)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def require(self, wanted: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]) -> None:
        """Exactly the tensors of `wanted`, each with its shape and a float dtype, but for those `ignored`."""
        for name, shape in wanted.items():
            entry = self.entries.get(name)
            if entry is None:
                raise ModelError(f"{self.home}: tensor {name} is missing")
            if entry.shape != shape:
                raise ModelError(
                    f"{self.home}: tensor {name} has shape {list(entry.shape)}, "
                    f"config.json implies {list(shape)}"
                )
            if entry.dtype not in _DTYPES:
                raise ModelError(
                    f"{self.home}: tensor {name} has dtype {entry.dtype}; supported are {', '.join(_DTYPES)}"
                )
        extra = sorted(name for name in self.entries if name not in wanted and not ignored(name))
        if extra:
            # A tensor nobody would use means the network is not the one config.json describes.
            raise ModelError(
                f"{self.home}: unexpected tensor {extra[0]}"
                + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")
                + "; the architecture in config.json has no place for it"
            )

    def read(self, name: str) -> Floats:
        """One tensor as float64 (exact for every supported dtype), checked to be finite and in range."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        raw: npt.NDArray[Any] = np.fromfile(
            entry.path, _DTYPES[entry.dtype], count=count, offset=entry.offset
        )
        if raw.size != count:
            raise ModelError(f"{self.home}: tensor {name} is cut short")
        if entry.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        out: Floats = raw.astype(np.float64).reshape(entry.shape)
        _check_range(out, f"{self.home}: tensor {name}")
        return out


# -- the two families


def _llama_spec(home: Path, config: _Config) -> PlanSpec:
    for key, allowed in (
        ("sliding_window", (None,)),
        ("attn_logit_softcapping", (None,)),
        ("final_logit_softcapping", (None,)),
        ("partial_rotary_factor", (None, 1, 1.0)),
    ):
        config.refuse_unless(key, *allowed)
    for kind in config.raw.get("layer_types") or ():
        if kind != "full_attention":
            config.fail("layer_types", f"{kind!r} is not supported, only full attention")
    act = config.raw.get("hidden_act", "silu")
    if act not in _LLAMA_ACTS:
        config.fail("hidden_act", f"{act!r} is not supported for Llama; supported: {', '.join(_LLAMA_ACTS)}")
    theta = config.number("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):  # the newer name holds theta as well
        scaling = config.raw.get(key)
        if scaling is None:
            continue
        if not isinstance(scaling, dict):
            config.fail(key, f"expected a table, got {scaling!r}")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            config.fail(key, f"rotary scaling {kind!r} is not supported, only plain rotary positions")
        theta = _Config.number(_Nested(config, key, scaling), "rope_theta", theta)
        _Nested(config, key, scaling).refuse_unless("partial_rotary_factor", None, 1, 1.0)

    d, layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    heads = config.integer("num_attention_heads")
    kv = config.integer("num_key_value_heads", default=heads)
    if heads < 1 or ("head_dim" not in config.raw and d % heads):
        config.fail("num_attention_heads", f"{heads} heads do not divide hidden_size {d}")
    hd = config.integer("head_dim", default=d // heads)
    hidden, vocab = config.integer("intermediate_size"), config.integer("vocab_size")
    bos, eos = _special_ids(home, config, vocab)
    return _spec(
        config,
        family="llama",
        layers=layers,
        width=d,
        heads=heads,
        kv_heads=kv,
        head_dim=hd,
        hidden=hidden,
        vocab=vocab,
        context=config.integer("max_position_embeddings", default=2048),
        act="silu_glu",
        norm_eps=config.number("rms_norm_eps", 1e-6),
        positions="rope",
        rope_theta=theta,
        bos_id=bos,
        eos_ids=eos,
    )


def _llama(home: Path, config: _Config, source: _Tensors) -> Plan:
    spec = _llama_spec(home, config)
    d, layers, heads, kv, hd = spec.width, spec.layers, spec.heads, spec.kv_heads, spec.head_dim
    hidden, vocab = spec.hidden, spec.vocab
    attn_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    tied = config.flag("tie_word_embeddings", False)
    p = "" if "embed_tokens.weight" in source else "model."

    wanted: dict[str, tuple[int, ...]] = {f"{p}embed_tokens.weight": (vocab, d), f"{p}norm.weight": (d,)}
    for i in range(layers):
        at = f"{p}layers.{i}."
        wanted[at + "input_layernorm.weight"] = wanted[at + "post_attention_layernorm.weight"] = (d,)
        for part, rows, cols, bias in (
            ("self_attn.q_proj", heads * hd, d, attn_bias),
            ("self_attn.k_proj", kv * hd, d, attn_bias),
            ("self_attn.v_proj", kv * hd, d, attn_bias),
            ("self_attn.o_proj", d, heads * hd, attn_bias),
            ("mlp.gate_proj", hidden, d, mlp_bias),
            ("mlp.up_proj", hidden, d, mlp_bias),
            ("mlp.down_proj", d, hidden, mlp_bias),
        ):
            wanted[f"{at}{part}.weight"] = (rows, cols)
            if bias:
                wanted[f"{at}{part}.bias"] = (rows,)
    head = _head_name(wanted, source, f"{p}embed_tokens.weight", tied, (vocab, d))
    source.require(wanted, lambda name: name.endswith(".rotary_emb.inv_freq"))

    read = source.read

    def weight(part: str) -> Floats:  # stored (out, in); the plan wants x @ W
        return read(part + ".weight").T

    def bias_of(part: str) -> Floats:
        return read(part + ".bias") if part + ".bias" in wanted else np.zeros(wanted[part + ".weight"][0])

    scale = hd**-0.5
    recipes: dict[str, Callable[[], Floats]] = {"embed": lambda: read(f"{p}embed_tokens.weight")}
    for i in range(layers):
        at, to = f"{p}layers.{i}.", f"{i}."
        attn, mlp = at + "self_attn.", at + "mlp."

        def qkv(at: str = at, attn: str = attn) -> Floats:
            parts = [weight(attn + "q_proj") * scale, weight(attn + "k_proj"), weight(attn + "v_proj")]
            return _scale_rows(np.concatenate(parts, axis=1), read(at + "input_layernorm.weight"))

        def qkv_b(attn: str = attn) -> Floats:
            return np.concatenate(
                [bias_of(attn + "q_proj") * scale, bias_of(attn + "k_proj"), bias_of(attn + "v_proj")]
            )

        def gate_up(at: str = at, mlp: str = mlp) -> Floats:
            parts = [weight(mlp + "gate_proj"), weight(mlp + "up_proj")]
            return _scale_rows(np.concatenate(parts, axis=1), read(at + "post_attention_layernorm.weight"))

        def gate_up_b(mlp: str = mlp) -> Floats:
            return np.concatenate([bias_of(mlp + "gate_proj"), bias_of(mlp + "up_proj")])

        recipes[to + "qkv"], recipes[to + "qkv_b"] = qkv, qkv_b
        recipes[to + "o"] = lambda attn=attn: weight(attn + "o_proj")  # type: ignore[misc]
        recipes[to + "o_b"] = lambda attn=attn: bias_of(attn + "o_proj")  # type: ignore[misc]
        recipes[to + "in"], recipes[to + "in_b"] = gate_up, gate_up_b
        recipes[to + "out"] = lambda mlp=mlp: weight(mlp + "down_proj")  # type: ignore[misc]
        recipes[to + "out_b"] = lambda mlp=mlp: bias_of(mlp + "down_proj")  # type: ignore[misc]
    recipes["head"] = lambda: _scale_rows(read(head).T, read(f"{p}norm.weight"))
    recipes["head_b"] = lambda: np.zeros(vocab)
    return _plan(spec, home, recipes)


def _gpt2_spec(home: Path, config: _Config) -> PlanSpec:
    config.refuse_unless("add_cross_attention", False)
    name = config.raw.get("activation_function", "gelu_new")
    if name not in _GPT2_ACTS:
        config.fail("activation_function", f"{name!r} is not supported; supported: {', '.join(_GPT2_ACTS)}")
    d, layers = config.integer("n_embd", "hidden_size"), config.integer("n_layer", "num_hidden_layers")
    heads = config.integer("n_head", "num_attention_heads")
    if heads < 1 or d % heads:
        config.fail("n_head", f"{heads} heads do not divide n_embd {d}")
    hd, vocab = d // heads, config.integer("vocab_size")
    hidden = config.integer("n_inner", default=4 * d)
    context = config.integer("n_positions", "n_ctx", "max_position_embeddings", default=1024)
    bos, eos = _special_ids(home, config, vocab)
    return _spec(
        config,
        family="gpt2",
        layers=layers,
        width=d,
        heads=heads,
        kv_heads=heads,
        head_dim=hd,
        hidden=hidden,
        vocab=vocab,
        context=context,
        act=_GPT2_ACTS[name],
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        rope_theta=None,
        bos_id=bos,
        eos_ids=eos,
    )


def _gpt2(home: Path, config: _Config, source: _Tensors) -> Plan:
    spec = _gpt2_spec(home, config)
    d, layers, hd, hidden = spec.width, spec.layers, spec.head_dim, spec.hidden
    vocab, context = spec.vocab, spec.context
    scaled = config.flag("scale_attn_weights", True)
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)
    tied = config.flag("tie_word_embeddings", True)
    p = "transformer." if "transformer.wte.weight" in source else ""

    wanted: dict[str, tuple[int, ...]] = {f"{p}wte.weight": (vocab, d), f"{p}wpe.weight": (context, d)}
    for i in range(layers):
        for part, rows, cols in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, hidden),
            ("mlp.c_proj", hidden, d),
        ):  # Conv1D stores (in, out), the orientation of the plan
            wanted[f"{p}h.{i}.{part}.weight"], wanted[f"{p}h.{i}.{part}.bias"] = (rows, cols), (cols,)
        for part in ("ln_1", "ln_2"):
            wanted[f"{p}h.{i}.{part}.weight"] = wanted[f"{p}h.{i}.{part}.bias"] = (d,)
    wanted[f"{p}ln_f.weight"] = wanted[f"{p}ln_f.bias"] = (d,)
    head = _head_name(wanted, source, f"{p}wte.weight", tied, (vocab, d))
    # Old files carry the causal mask as a buffer.
    source.require(wanted, lambda name: name.endswith((".attn.bias", ".attn.masked_bias")))

    read = source.read

    def centred(x: Floats) -> Floats:
        """x (I - 11^T/d): the residual then has mean zero by construction, so LayerNorm needs no centring."""
        out: Floats = x - x.mean(axis=-1, keepdims=True)
        return out

    def after_norm(norm: str, part: str) -> Floats:
        return _scale_rows(read(part + ".weight"), read(norm + ".weight"))

    def bias_after_norm(norm: str, part: str) -> Floats:
        return read(norm + ".bias") @ read(part + ".weight") + read(part + ".bias")

    recipes: dict[str, Callable[[], Floats]] = {
        "embed": lambda: centred(read(f"{p}wte.weight")),
        "pos": lambda: centred(read(f"{p}wpe.weight")),
    }
    for i in range(layers):
        at, to = f"{p}h.{i}.", f"{i}."
        # Half of the attention scale on the queries, half on the keys: smaller weights would lose more bits.
        columns = np.ones(3 * d)
        columns[: 2 * d] = ((hd**-0.5 if scaled else 1.0) / (i + 1 if by_layer else 1)) ** 0.5

        def qkv(at: str = at, columns: Floats = columns) -> Floats:
            return after_norm(at + "ln_1", at + "attn.c_attn") * columns

        def qkv_b(at: str = at, columns: Floats = columns) -> Floats:
            return bias_after_norm(at + "ln_1", at + "attn.c_attn") * columns

        recipes[to + "qkv"], recipes[to + "qkv_b"] = qkv, qkv_b
        recipes[to + "o"] = lambda at=at: centred(read(at + "attn.c_proj.weight"))  # type: ignore[misc]
        recipes[to + "o_b"] = lambda at=at: centred(read(at + "attn.c_proj.bias"))  # type: ignore[misc]
        recipes[to + "in"] = lambda at=at: after_norm(at + "ln_2", at + "mlp.c_fc")  # type: ignore[misc]
        recipes[to + "in_b"] = lambda at=at: bias_after_norm(at + "ln_2", at + "mlp.c_fc")  # type: ignore[misc]
        recipes[to + "out"] = lambda at=at: centred(read(at + "mlp.c_proj.weight"))  # type: ignore[misc]
        recipes[to + "out_b"] = lambda at=at: centred(read(at + "mlp.c_proj.bias"))  # type: ignore[misc]
    recipes["head"] = lambda: _scale_rows(read(head).T, read(f"{p}ln_f.weight"))
    recipes["head_b"] = lambda: read(f"{p}ln_f.bias") @ read(head).T
    return _plan(spec, home, recipes)


_FAMILIES = {"llama": (_llama_spec, _llama), "gpt2": (_gpt2_spec, _gpt2)}


def _scale_rows(matrix: Floats, gain: Floats) -> Floats:
    """diag(gain) @ matrix: the norm's gain moved into what it feeds."""
    out: Floats = gain[:, None] * matrix
    return out


class _Nested(_Config):
    """A table inside config.json, with the same complaints."""

    def __init__(self, parent: _Config, key: str, raw: dict[str, Any]) -> None:
        self.path = parent.path / key
        self.raw = raw


def _spec(config: _Config, **values: Any) -> PlanSpec:
    try:
        return PlanSpec(**values)
    except ModelError as e:
        raise ModelError(f"{config.path}: {e}") from None


def _plan(spec: PlanSpec, home: Path, recipes: Mapping[str, Callable[[], Floats]]) -> Plan:
    return Plan(**{f.name: getattr(spec, f.name) for f in fields(PlanSpec)}, directory=home, _recipes=recipes)


def _head_name(
    wanted: dict[str, tuple[int, ...]], source: _Tensors, embed: str, tied: bool, shape: tuple[int, int]
) -> str:
    """The tensor that holds the output head; adds it to `wanted` when the file has, or must have, one."""
    name = "lm_head.weight"
    if not tied or name in source:
        wanted[name] = shape
    if tied and name in source and embed in source:
        if not np.array_equal(source.read(name), source.read(embed)):
            raise ModelError(f"{source.home}: tensor {name} differs from {embed}, yet config.json ties them")
    return embed if tied else name
