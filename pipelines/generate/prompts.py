"""Rows from a .txt, .jsonl or .csv file. They stream: a file may be larger than the memory."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blockcache.errors import BlockCacheError
from blockcache.pipelines.generate.settings import Row, in_one_line

KINDS = (".txt", ".jsonl", ".csv")
_LONGEST_LINE = 2**20
_WIDE = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. It keeps its number, so that mending it moves no other row."""

    number: int
    line: int
    why: str


class Prompts:
    """Where the rows come from; may be gone through any number of times."""

    def __init__(self, source: str | Path | Sequence[Any]) -> None:
        """Take a file's path, or prompts and mappings.

        Raises:
            BlockCacheError: no such file, or of another kind.
        """
        self.path = Path(source) if isinstance(source, (str, Path)) else None
        self._given: Sequence[Any] = () if isinstance(source, (str, Path)) else source
        if self.path is not None:
            _check(self.path)
        elif not isinstance(source, Sequence):
            raise BlockCacheError(
                f"prompts must be a file or a list of rows, found {type(source).__name__}"
            )

    def __str__(self) -> str:
        """What to call it in messages."""
        return "prompts" if self.path is None else str(self.path)

    def rows(self) -> Iterator[Row | BadRow]:
        """Every row in order, blank lines left out.

        Raises:
            BlockCacheError: the file cannot be read, or its header is wrong.
        """
        for number, (line, found) in enumerate(self._found()):
            yield _row(number, line, found)

    def _found(self) -> Iterator[tuple[int, Any]]:
        if self.path is None:
            yield from enumerate(self._given, 1)
            return
        reader = {".txt": _of_text, ".jsonl": _of_json, ".csv": _of_csv}[self.path.suffix.lower()]
        try:
            yield from reader(self.path)
        except OSError as error:
            raise BlockCacheError(f"cannot read prompts from {self.path}: {error}") from None


def _check(path: Path) -> None:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise BlockCacheError(f"cannot read prompts from {path}: found {found}, expected a file")
    if path.suffix.lower() not in KINDS:
        raise BlockCacheError(
            f"cannot read prompts from {path}: expected a {', '.join(KINDS)} file"
        )


def _row(number: int, line: int, found: Any) -> Row | BadRow:
    """A checked row from what stood in a line: a problem, a prompt, or a mapping."""
    if isinstance(found, _Problem):
        return BadRow(number, line, str(found))
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, Mapping):
        return BadRow(number, line, f"expected an object, found {type(found).__name__}")
    given = {k: v for k, v in found.items() if v is not None}
    given.setdefault("id", f"{number:06d}")
    for name in ("number", "line"):
        if name in given:
            return BadRow(number, line, f"unknown name {name!r}")
    try:
        return Row(number=number, line=line, **given)
    except ValidationError as error:
        return BadRow(number, line, in_one_line(error, Row))
    except TypeError as error:
        return BadRow(number, line, str(error))


class _Problem(str):
    """Why a line could not be taken apart."""


def _lines(path: Path) -> Iterator[tuple[int, str | _Problem]]:
    """Line numbers and text, without the byte order mark, ends of line as they are.

    Decoded line by line, so that a bad one is known by its number.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if number == 1 and line.startswith(_WIDE):
                raise BlockCacheError(f"{path} is UTF-16; save it as UTF-8")
            if len(line) > _LONGEST_LINE:
                yield number, _Problem(f"longer than {_LONGEST_LINE >> 20} MiB")
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_LINE)
                continue
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, _Problem(f"no UTF-8 text at byte {error.start} of the line")


def _of_text(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if isinstance(line, _Problem):
            yield number, line
        elif prompt := line.strip():
            yield number, prompt


def _of_json(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if isinstance(line, _Problem):
            yield number, line
        elif text := line.strip():
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                found = _Problem(f"no valid JSON: {error}")
            yield number, found


def _of_csv(path: Path) -> Iterator[tuple[int, Any]]:
    texts = _Texts(path)
    reader = csv.DictReader(texts, strict=True, restkey="")
    header = reader.fieldnames or []
    unknown = [name for name in header if name not in _columns()]
    if unknown or "prompt" not in header:
        raise BlockCacheError(
            f"{path}, line 1: expected columns of {', '.join(_columns())} with a prompt, "
            f"found {', '.join(map(repr, header))[:120] or 'nothing'}"
        )
    while True:
        try:
            found: Any = next(reader, None)
        except csv.Error as error:
            found = _Problem(f"no valid CSV: {error}")
        yield from texts.problems
        texts.problems.clear()
        if found is None:
            return
        if isinstance(found, _Problem):
            yield texts.line, found
        elif "" in found:
            yield texts.line, _Problem(f"more than {len(header)} columns")
        elif any(found.values()):
            yield texts.line, {k: v for k, v in found.items() if v}


class _Texts:
    """The lines of a file for the CSV reader; those that are no text are set aside."""

    def __init__(self, path: Path) -> None:
        self._path, self.line = path, 0
        self.problems: list[tuple[int, _Problem]] = []

    def __iter__(self) -> Iterator[str]:
        for line, text in _lines(self._path):
            self.line = line
            if isinstance(text, _Problem):
                self.problems.append((line, text))
            else:
                yield text


def _columns() -> tuple[str, ...]:
    names = [name for name in Row.model_fields if name not in ("number", "line")]
    return (*names, "num_inference_steps", "guidance_scale", "num_frames")
