#!/usr/bin/env python3
"""Write a checkpoint of any Llama or GPT-2 shape with random weights of a trained model's sizes.

For benchmarks of shapes for which no weights are at hand: the text is noise, the cost is real. The directory
has the Hugging Face layout; weights go to disk in shards as they are drawn, so that little more than the
largest tensor is in memory at once. The tokenizer knows the 256 bytes and names every further id `<n>`, so
any text can be a prompt and any id is printable; or give one with --tokenizer DIRECTORY.

    python scripts/random_checkpoint.py --shape gpt2-small work/gpt2-small
    python scripts/random_checkpoint.py --shape llama-1b work/llama-1b
    python scripts/random_checkpoint.py --family gpt2 --layers 12 --width 768 --heads 12 --vocab 50257 \\
        --context 1024 --tokenizer ../shared/models/tokenizers/gpt2 work/gpt2-small
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

Array = npt.NDArray[np.float32]

SHAPES: dict[str, dict[str, Any]] = {
    "llama-15m": {
        "family": "llama",
        "layers": 6,
        "width": 288,
        "heads": 6,
        "hidden": 768,
        "vocab": 32000,
        "context": 128,
        "tied": True,
    },
    "gpt2-small": {
        "family": "gpt2",
        "layers": 12,
        "width": 768,
        "heads": 12,
        "vocab": 50257,
        "context": 1024,
        "tied": True,
    },
    "llama-1b": {
        "family": "llama",
        "layers": 22,
        "width": 2048,
        "heads": 32,
        "kv_heads": 4,
        "hidden": 5632,
        "vocab": 32000,
        "context": 2048,
        "tied": False,
        "dtype": "fp16",
    },
}
SHARD_BYTES = 256 << 20  # after which a new file is begun
MIN_VOCAB = 256 + 3  # the bytes and three special tokens
# Drawn to resemble trained checkpoints: norm gains of 0.5 to 1.5, attention scores of a few units, a residual
# that grows slowly with depth, logits with a clear winner.
GAIN_SPREAD = 0.25
SCORE_SPREAD = 2.0
LOGIT_SPREAD = 4.0


Tensors = Iterator[tuple[str, Array]]


def llama(a: argparse.Namespace, rng: np.random.Generator) -> Tensors:
    d, hd, kv = a.width, a.width // a.heads, a.kv_heads or a.heads
    hidden = a.hidden or 8 * d // 3
    draw = _drawer(rng)
    write = 1.0 / math.sqrt(
        2 * a.layers
    )  # each of 2 * layers writers adds this much to a residual of about 1
    yield "model.embed_tokens.weight", draw((a.vocab, d), _embed_spread(a))
    for i in range(a.layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", _gains(rng, d)
        yield at + "post_attention_layernorm.weight", _gains(rng, d)
        for part, rows, cols, spread in (
            ("self_attn.q_proj", a.heads * hd, d, math.sqrt(SCORE_SPREAD / d)),
            ("self_attn.k_proj", kv * hd, d, math.sqrt(SCORE_SPREAD / d)),
            ("self_attn.v_proj", kv * hd, d, math.sqrt(1 / d)),
            ("self_attn.o_proj", d, a.heads * hd, write * math.sqrt(2 / (a.heads * hd))),
            ("mlp.gate_proj", hidden, d, math.sqrt(2 / d)),
            ("mlp.up_proj", hidden, d, math.sqrt(1 / d)),
            ("mlp.down_proj", d, hidden, write * math.sqrt(1 / hidden)),
        ):
            yield f"{at}{part}.weight", draw((rows, cols), spread)
    yield "model.norm.weight", _gains(rng, d) * _final_gain(a)
    if not a.tied:
        yield "lm_head.weight", draw((a.vocab, d), LOGIT_SPREAD / math.sqrt(d) / _final_gain(a))


def llama_config(a: argparse.Namespace) -> dict[str, Any]:
    d = a.width
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": d,
        "intermediate_size": a.hidden or 8 * d // 3,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads or a.heads,
        "head_dim": d // a.heads,
        "max_position_embeddings": a.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": a.tied,
        "vocab_size": a.vocab,
    }


def gpt2(a: argparse.Namespace, rng: np.random.Generator) -> Tensors:
    d, hidden = a.width, a.hidden or 4 * a.width
    draw = _drawer(rng)
    write = 1.0 / math.sqrt(2 * a.layers)
    yield "transformer.wte.weight", draw((a.vocab, d), _embed_spread(a))
    yield "transformer.wpe.weight", draw((a.context, d), 0.3 * _embed_spread(a))
    for i in range(a.layers):
        at = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            yield f"{at}{norm}.weight", _gains(rng, d)
            yield f"{at}{norm}.bias", draw((d,), 0.1)
        attention = draw((d, 3 * d), 1.0)
        attention[:, : 2 * d] *= math.sqrt(SCORE_SPREAD / d)
        attention[:, 2 * d :] *= math.sqrt(1 / d)
        yield at + "attn.c_attn.weight", attention
        yield at + "attn.c_attn.bias", draw((3 * d,), 0.1)
        yield at + "attn.c_proj.weight", draw((d, d), write * math.sqrt(2 / d))
        yield at + "mlp.c_fc.weight", draw((d, hidden), math.sqrt(2 / d))
        yield at + "mlp.c_fc.bias", draw((hidden,), 0.1)
        yield at + "mlp.c_proj.weight", draw((hidden, d), write * math.sqrt(1 / hidden))
        yield at + "attn.c_proj.bias", draw((d,), 0.05)
        yield at + "mlp.c_proj.bias", draw((d,), 0.05)
    yield "transformer.ln_f.weight", _gains(rng, d) * _final_gain(a)
    yield "transformer.ln_f.bias", draw((d,), 0.1)
    if not a.tied:
        yield "lm_head.weight", draw((a.vocab, d), LOGIT_SPREAD / math.sqrt(d) / _final_gain(a))


def gpt2_config(a: argparse.Namespace) -> dict[str, Any]:
    d, hidden = a.width, a.hidden or 4 * a.width
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": a.act,
        "vocab_size": a.vocab,
        "n_positions": a.context,
        "n_embd": d,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_inner": hidden,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": a.tied,
    }


def _drawer(rng: np.random.Generator) -> Any:
    def draw(shape: tuple[int, ...], spread: float) -> Array:
        out = rng.standard_normal(shape, dtype=np.float32)
        out *= np.float32(spread)
        return out

    return draw


def _gains(rng: np.random.Generator, d: int) -> Array:
    out: Array = np.exp(GAIN_SPREAD * rng.standard_normal(d, dtype=np.float32)).astype(np.float32)
    return out


def _embed_spread(a: argparse.Namespace) -> float:
    return 1.0 if not a.tied else 0.5  # a tied embedding is also the head, and is drawn smaller by training


def _final_gain(a: argparse.Namespace) -> float:
    """With a tied head the final norm's gain sets the size of the logits."""
    return LOGIT_SPREAD / math.sqrt(a.width) / _embed_spread(a) if a.tied else 1.0


def byte_tokenizer(vocab: int) -> Tokenizer:
    """<s> is 0, </s> is 1, <pad> is 2, then the 256 bytes, then `<n>` up to the vocabulary's end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    known = {token: i for i, token in enumerate([*special, *letters])}
    for i in range(len(known), vocab):
        known[f"<{i}>"] = i
    out = Tokenizer(models.BPE(vocab=known, merges=[]))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens([AddedToken(token, special=True) for token in special])
    out.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return out


def copy_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json or tokenizer.model as they are; vocab.json with merges.txt becomes a tokenizer.json."""
    found = [
        n for n in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json") if (source / n).is_file()
    ]
    for name in found:
        shutil.copyfile(source / name, target / name)
    if "tokenizer.json" in found or "tokenizer.model" in found:
        return
    if not (source / "vocab.json").is_file() or not (source / "merges.txt").is_file():
        raise SystemExit(f"{source}: no tokenizer.json, tokenizer.model, or vocab.json with merges.txt")
    out = Tokenizer(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    if out.token_to_id("<|endoftext|>") is not None:
        out.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    out.save(str(target / "tokenizer.json"))


def save(out: Path, tensors: Tensors, dtype: Any) -> int:
    """Write tensors as they come, a file at a time; one file gets the plain name. Returns their elements."""
    placed: dict[str, str] = {}
    shard: dict[str, npt.NDArray[Any]] = {}
    files: list[Path] = []
    count = size = total = 0

    def flush() -> None:
        nonlocal size
        files.append(out / f"model-{len(files) + 1:05}.safetensors")
        save_file(shard, files[-1])
        placed.update(dict.fromkeys(shard, files[-1].name))
        shard.clear()
        size = 0

    for name, x in tensors:
        x = np.ascontiguousarray(x, dtype)
        if shard and size + x.nbytes > SHARD_BYTES:
            flush()
        shard[name] = x
        size += x.nbytes
        total += x.nbytes
        count += x.size
    flush()
    if len(files) == 1:
        files[0].rename(out / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return count


def write(a: argparse.Namespace) -> int:
    """Make the directory; returns the number of weights."""
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"{out}: not empty; choose a new directory")
    if a.width % a.heads:
        raise SystemExit(f"--heads {a.heads} does not divide --width {a.width}")
    if a.tokenizer is None and a.vocab < MIN_VOCAB:
        raise SystemExit(f"--vocab must be at least {MIN_VOCAB} for the byte tokenizer")
    draw, describe = {"llama": (llama, llama_config), "gpt2": (gpt2, gpt2_config)}[a.family]
    config = describe(a)
    if a.tokenizer is None:
        byte_tokenizer(a.vocab).save(str(out / "tokenizer.json"))
        names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        (out / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
        config |= {"bos_token_id": 0, "eos_token_id": 1}
    else:
        copy_tokenizer(Path(a.tokenizer), out)
        config |= {"bos_token_id": None, "eos_token_id": None}
    dtype = {"fp32": np.float32, "fp16": np.float16}[a.dtype]
    count = save(out, draw(a, np.random.default_rng(a.seed)), dtype)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return count


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("out", help="directory to make")
    p.add_argument("--shape", choices=sorted(SHAPES), help="a named shape; other options override its parts")
    p.add_argument("--family", choices=("llama", "gpt2"), default="llama")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, help="Llama only; as many as --heads if not given")
    p.add_argument("--hidden", type=int, help="8/3 of the width for Llama, 4 times for GPT-2 if not given")
    p.add_argument("--vocab", type=int, default=512)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--act", default="gelu_new", help="GPT-2's activation_function")
    p.add_argument(
        "--tied", action=argparse.BooleanOptionalAction, default=True, help="head is the embedding"
    )
    p.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    p.add_argument("--tokenizer", help="directory to take the tokenizer from instead of the byte tokenizer")
    p.add_argument("--seed", type=int, default=1)
    named, _ = p.parse_known_args(argv)
    if named.shape:
        p.set_defaults(**SHAPES[named.shape])
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    a = parse(sys.argv[1:] if argv is None else argv)
    count = write(a)
    print(f"{a.out}: {a.family}, {a.layers} layers of width {a.width}, {count:,} weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
