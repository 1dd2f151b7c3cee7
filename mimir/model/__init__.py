"""A language model at the edges of the engine: the owner's checkpoint, the client's tokenizer."""

from __future__ import annotations

from mimir.model.checkpoint import Plan, PlanSpec, decode, encode, load_checkpoint, read_spec
from mimir.model.tokenizer import Decoder, Tokenizer

__all__ = ["Decoder", "Plan", "PlanSpec", "Tokenizer", "decode", "encode", "load_checkpoint", "read_spec"]
