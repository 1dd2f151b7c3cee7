"""The model owner's side of a language model: read a checkpoint, fold it, encode it, and its tokenizer."""

from __future__ import annotations

from mimir.model.checkpoint import Plan, PlanSpec, decode, encode, load_checkpoint

__all__ = ["Plan", "PlanSpec", "decode", "encode", "load_checkpoint"]
