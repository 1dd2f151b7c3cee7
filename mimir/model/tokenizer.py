"""Text to token ids and back. It runs at clients only: no party ever sees text or a token id.

tokenizer.json is read by `tokenizers`; a directory that has only tokenizer.model needs `sentencepiece`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mimir.errors import BadInput, EnvironmentMissing, ModelError

MAX_TEXT = 1 << 20  # characters of one prompt; any context is far shorter
MAX_FILE_BYTES = 256 << 20
CONTEXT_PIECES = 8  # earlier pieces a Decoder looks at, so that spacing rules see what came before
# A UTF-8 character has at most four bytes and a token at least one, so text that still ends in a replacement
# character after this many more tokens will not be completed: it is what the model wrote.
MAX_HELD = 4
_REPLACEMENT = "\ufffd"


class _Codec(Protocol):
    """What both libraries offer, in one shape."""

    size: int

    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def id_of(self, token: str) -> int | None: ...


class Tokenizer:
    """The tokenizer of a model directory.

    `bos_id` is None when the model has none; `eos_ids` end a generation, as far as the tokenizer knows (the
    plan's `eos_ids` come from the model's configuration and take precedence).
    """

    def __init__(
        self, codec: _Codec, bos_id: int | None, eos_ids: tuple[int, ...], add_bos: bool | None
    ) -> None:
        self._codec = codec
        self._add_bos = add_bos
        self.bos_id = bos_id
        self.eos_ids = eos_ids

    @classmethod
    def load(cls, directory: str | Path, vocab: int | None = None) -> Tokenizer:
        """Read tokenizer.json, else tokenizer.model. With `vocab`, ids the model cannot take are an error."""
        home = Path(directory)
        config = _read_config(home / "tokenizer_config.json")
        codec: _Codec
        if (home / "tokenizer.json").is_file():
            codec = _Fast(home / "tokenizer.json")
            bos, eos = _named(config, "bos_token", codec), _named(config, "eos_token", codec)
            add_bos = config.get("add_bos_token")
        elif (home / "tokenizer.model").is_file():
            pieces = _Pieces(home / "tokenizer.model")
            codec, bos, eos = pieces, pieces.bos, pieces.eos
            add_bos = config.get("add_bos_token", True)  # what the Llama tokenizer class does unless told
        else:
            raise ModelError(f"{home}: neither tokenizer.json nor tokenizer.model")
        if add_bos is not None and type(add_bos) is not bool:
            raise ModelError(f"{home}/tokenizer_config.json: add_bos_token: expected true or false")
        if add_bos and bos is None:
            raise ModelError(f"{home}/tokenizer_config.json: add_bos_token is set, yet no bos_token is known")
        if vocab is not None and codec.size > vocab:
            raise ModelError(f"{home}: the tokenizer has {codec.size} ids, the model only {vocab}")
        return cls(codec, bos, () if eos is None else (eos,), add_bos)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return self._codec.size

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Ids of `text`. `begin` says that it opens a context: only then is the model's start token added."""
        if len(text) > MAX_TEXT:
            raise BadInput(f"the prompt has {len(text)} characters; at most {MAX_TEXT} are taken")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadInput(
                "the prompt is not valid Unicode text (lone surrogates); check its encoding"
            ) from None
        ids = self._codec.encode(text, begin and self._add_bos is not False)
        if begin and self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if text and not ids:
            raise BadInput("no character of the prompt is known to this model's tokenizer")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        self._check(ids)
        return self._codec.decode(ids)

    def decoder(self, context: Sequence[int] = ()) -> Decoder:
        """A streaming decoder; `context` is what precedes, so that its first piece keeps a leading space."""
        self._check(context)
        return Decoder(self, context)

    def _check(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self._codec.size:
                raise BadInput(f"token id {token} is outside this tokenizer's {self._codec.size} ids")


class Decoder:
    """Turns ids into text one at a time and never shows half a character.

    The pieces returned by `feed` and finally `flush` join to the text of `context` and all ids fed, less that
    of `context`; where the model wrote bytes that are no UTF-8, U+FFFD stands for them.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown: deque[list[int]] = deque(maxlen=CONTEXT_PIECES)  # ids whose text is out, piece by piece
        self._held: list[int] = []  # ids whose text is not
        for token in context:
            self.feed(token)

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still in parts."""
        self._tokenizer._check((token,))
        self._held.append(token)
        return self._take(final=len(self._held) > MAX_HELD)

    def flush(self) -> str:
        """What is still held back, incomplete characters as U+FFFD; the stream is over."""
        return self._take(final=True) if self._held else ""

    def _take(self, final: bool) -> str:
        shown = [token for piece in self._shown for token in piece]
        before = self._tokenizer.decode(shown)
        after = self._tokenizer.decode(shown + self._held)
        broken = after.endswith(_REPLACEMENT)
        if broken and not final:
            return ""
        if not after.startswith(before):
            # For some tokenizers one bad byte spoils a whole run of byte tokens, those already shown too.
            # Those stay; the new ids start afresh (at a byte, where no spacing rule applies).
            self._shown.clear()
            before, after = "", self._tokenizer.decode(self._held)
            broken = after.endswith(_REPLACEMENT)
        if (
            not broken
        ):  # a piece that ends inside a character would run into the next one, so it is no context
            self._shown.append(self._held)
        self._held = []
        return after[len(before) :]


class _Fast:
    """tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        _bounded(path)
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ModelError(f"{path}: cannot be read: {e}") from None
        self._backend.no_truncation()  # a prompt is refused or used whole, never cut behind the user's back
        self._backend.no_padding()
        self.size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def id_of(self, token: str) -> int | None:
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)


class _Pieces:
    """tokenizer.model."""

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise EnvironmentMissing(
                f"{path} needs the sentencepiece package: pip install 'mimir[sentencepiece]'"
            ) from None
        _bounded(path)
        self._backend = SentencePieceProcessor()
        try:
            self._backend.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as e:
            raise ModelError(f"{path}: cannot be read: {e}") from None
        self.size = int(self._backend.GetPieceSize())
        bos, eos = int(self._backend.bos_id()), int(self._backend.eos_id())
        self.bos, self.eos = (None if bos < 0 else bos), (None if eos < 0 else eos)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(map(int, self._backend.EncodeAsIds(text)))  # the caller adds the start token

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.DecodeIds(list(ids)))

    def id_of(self, token: str) -> int | None:
        found = int(self._backend.PieceToId(token))
        return None if found == int(self._backend.unk_id()) else found


def _bounded(path: Path) -> None:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(f"{path}: larger than {MAX_FILE_BYTES} bytes")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    _bounded(path)
    try:
        out = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read: {e}") from None
    if not isinstance(out, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return out


def _named(config: dict[str, Any], key: str, codec: _Codec) -> int | None:
    """The id of a special token that tokenizer_config.json names by its text (plain, or in a table)."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return None
    if not isinstance(value, str):
        raise ModelError(f"tokenizer_config.json: {key}: expected text, got {type(value).__name__}")
    return codec.id_of(value)


__all__ = ["Decoder", "Tokenizer"]
