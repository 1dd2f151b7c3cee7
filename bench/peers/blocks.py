"""The blocks that are compared, their inputs, and what they should give. Both sides use it: numpy alone.

Sizes are those of GPT-2 small. Inputs are random, of the sizes that a trained model has.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

NAMES = (
    "block decode at 64",
    "64x768 by 768x3072",
    "GELU 64x3072",
    "softmax 768 rows of 64",
    "argmax of 50257",
)
WIDTH, HEADS, HIDDEN, CACHED, VOCAB, ROWS = 768, 12, 3072, 64, 50257, 64


def inputs(name: str) -> dict[str, Any]:
    """Inputs of a block by name, float32."""
    g = np.random.default_rng(NAMES.index(name))

    def draw(*shape: int, spread: float = 1.0) -> Any:
        return (spread * g.standard_normal(shape)).astype(np.float32)

    d, hd = WIDTH, WIDTH // HEADS
    match name:
        case "block decode at 64":
            return {
                "x": draw(1, d),
                "keys": draw(HEADS, CACHED, hd),
                "values": draw(HEADS, CACHED, hd),
                "qkv": draw(d, 3 * d, spread=1 / math.sqrt(d)),
                "o": draw(d, d, spread=1 / math.sqrt(d)),
                "up": draw(d, HIDDEN, spread=1 / math.sqrt(d)),
                "down": draw(HIDDEN, d, spread=1 / math.sqrt(HIDDEN)),
            }
        case "64x768 by 768x3072":
            return {"x": draw(ROWS, d), "w": draw(d, HIDDEN, spread=1 / math.sqrt(d))}
        case "GELU 64x3072":
            return {"x": draw(ROWS, HIDDEN, spread=2.0)}
        case "softmax 768 rows of 64":
            return {"x": draw(HEADS * ROWS, 64, spread=2.0)}
        case "argmax of 50257":
            return {"x": draw(VOCAB, spread=4.0)}
    raise KeyError(name)


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def expected(name: str) -> Any:
    """What the block gives in float64; None for the decoded block, which is timed only."""
    v = {k: x.astype(np.float64) for k, x in inputs(name).items()}
    match name:
        case "64x768 by 768x3072":
            return v["x"] @ v["w"]
        case "GELU 64x3072":
            return gelu(v["x"])
        case "softmax 768 rows of 64":
            e = np.exp(v["x"] - v["x"].max(-1, keepdims=True))
            return e / e.sum(-1, keepdims=True)
        case "argmax of 50257":
            return np.array(v["x"].argmax(), np.float64)
    return None


def error(name: str, got: Any) -> float | None:
    """Largest distance from what the block should give."""
    want = expected(name)
    return None if want is None else float(np.abs(np.asarray(got, np.float64) - want).max())


def loopback_bytes() -> int:
    """Bytes through this network namespace's loopback so far, headers and acknowledgements included."""
    with open("/proc/self/net/dev") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name.strip() == "lo":
                return int(rest.split()[8])
    raise SystemExit("peers: there is no loopback interface")
