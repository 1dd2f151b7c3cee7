"""How single values of a policy are read: parsers for `mimir.config.read_table`, all strict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mimir.config import Parser
from mimir.config import flag_rule as flag_rule

MAX_VALUES = 256
ANY = "any"  # must be written out: leaving a restriction away does not lift it
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/= -]{0,99}")


def hexes_rule(*sizes: int) -> Parser:
    """A list of hexadecimal strings, each of one of `sizes` bytes, none twice, at least one."""
    wanted = "a list of 1 to {} different hexadecimal strings of {} digits".format(
        MAX_VALUES, " or ".join(str(2 * size) for size in sizes)
    )

    def parse(value: Any, folder: Path) -> tuple[str, ...]:
        if not isinstance(value, list) or not 0 < len(value) <= MAX_VALUES:
            raise ValueError(wanted)
        found = []
        for each in value:
            if not isinstance(each, str) or len(each) not in {2 * size for size in sizes}:
                raise ValueError(wanted)
            try:
                found.append(bytes.fromhex(each).hex())
            except ValueError:
                raise ValueError(wanted) from None
            if len(found[-1]) != len(each):  # fromhex skips blanks
                raise ValueError(wanted)
        if len(set(found)) != len(found):
            raise ValueError(wanted)
        return tuple(found)

    return parse


def hexes_or_any_rule(*sizes: int) -> Parser:
    """The same, or the word "any"; None stands for any."""
    inner = hexes_rule(*sizes)

    def parse(value: Any, folder: Path) -> tuple[str, ...] | None:
        if value == ANY:
            return None
        try:
            return tuple(inner(value, folder))
        except ValueError as error:
            raise ValueError(f'{error}, or "any"') from None

    return parse


def maybe_empty_hexes_rule(*sizes: int) -> Parser:
    """A list that may be empty: of what is refused, where nothing to refuse is a meaningful list."""
    inner = hexes_rule(*sizes)
    return lambda value, folder: () if value == [] else inner(value, folder)


def words_rule(*choices: str) -> Parser:
    """A list of at least one of the choices, or of any plain words where there are no choices."""
    wanted = "a list of " + (" and ".join(f'"{each}"' for each in choices) if choices else "names")

    def parse(value: Any, folder: Path) -> tuple[str, ...]:
        if not isinstance(value, list) or len(value) > MAX_VALUES or (choices and not value):
            raise ValueError(wanted)
        for each in value:
            if not isinstance(each, str) or not _WORD.fullmatch(each) or (choices and each not in choices):
                raise ValueError(wanted)
        if len(set(value)) != len(value):
            raise ValueError(wanted)
        return tuple(value)

    return parse


def pcrs_rule(last: int, *sizes: int) -> Parser:
    """A table of PCR numbers up to `last`, each with the values that it may have. At least one PCR."""
    inner = hexes_rule(*sizes)
    wanted = f'a table such as {{ "0" = ["<hex>"] }} with PCR numbers from 0 to {last}'

    def parse(value: Any, folder: Path) -> dict[int, tuple[str, ...]]:
        if not isinstance(value, dict) or not value:
            raise ValueError(wanted)
        found = {}
        for name, values in value.items():
            if not name.isascii() or not name.isdigit() or str(int(name)) != name or int(name) > last:
                raise ValueError(wanted)
            try:
                found[int(name)] = tuple(inner(values, folder))
            except ValueError as error:
                raise ValueError(f"{wanted}, each {error}") from None
        return found

    return parse
