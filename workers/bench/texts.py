"""Real text that every Python brings along."""

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from workers.model.tokenizer import Tokenizer

# Of the standard library, those whose docstrings are long and which no Python lacks.
PACKAGES = (
    *("asyncio", "concurrent", "email", "http", "importlib", "json", "logging"),
    *("multiprocessing", "unittest", "urllib", "wsgiref", "xml", "xmlrpc"),
)


def windows(tokenizer: Tokenizer, tokens: int, count: int) -> list[list[int]]:
    """``count`` pieces of ``tokens`` tokens, none overlapping.

    They are of Python's reference, long chapters first, then of docstrings of the library's packages.
    There may be fewer, as these end.
    """
    return _pieces(tokenizer, _chapters(), tokens, count)


def others(tokenizer: Tokenizer, tokens: int, count: int) -> list[list[int]]:
    """As ``windows``, of docstrings of the library's modules: text that is in none of those."""
    library = Path(sysconfig.get_path("stdlib"))
    said = (docstrings(file.read_bytes()) for file in sorted(library.glob("*.py")))
    return _pieces(tokenizer, sorted(said, key=len, reverse=True), tokens, count)


def docstrings(source: bytes) -> str:
    """Of a module, its classes and functions, a paragraph each."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _chapters() -> Iterator[str]:
    yield from sorted(topics.values(), key=len, reverse=True)
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for file in sorted((library / package).rglob("*.py")):
            if "test" not in file.parts and (text := docstrings(file.read_bytes())):
                yield text


def _pieces(tokenizer: Tokenizer, chapters: Iterable[str], tokens: int, count: int) -> list[list[int]]:
    pieces: list[list[int]] = []
    short: list[int] = []
    for chapter in chapters:
        if len(pieces) == count:
            break
        # What is left of a chapter is joined to the next.
        short += tokenizer.encode(chapter)
        while len(short) >= tokens and len(pieces) < count:
            pieces.append(short[:tokens])
            short = short[tokens:]
    return pieces
