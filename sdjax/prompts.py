"""The prompt language of the A1111 web interface: weights, chunks and joined prompts. Knows no tokenizer and no JAX.

    (word) and (word:1.3)   weigh 1.1 and 1.3; brackets nest and multiply
    [word]                  weighs 1 / 1.1
    \\( \\) \\[ \\] \\\\         are the characters themselves, as are brackets that have no partner
    a BREAK b               begins a new chunk of tokens
    a AND b :0.5            are two prompts whose guidance is added, the second at half weight (composable diffusion,
                            https://arxiv.org/abs/2206.01714)

Two things differ: A1111 weighs what follows a round or square bracket that is never closed, and a prompt that is joined
to no other by a number at its end; here both are text.
"""

import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sdjax.values import RequestError, shown

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_CLAUSES = 8
MAX_WEIGHT = float(np.finfo(np.float32).max)

_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b")
_NUMBER = r"[-+]?(?:\d{1,3}(?:\.\d*)?|\.\d+)"
_TOKEN = re.compile(rf"\\[\\()\[\]]|[(\[\])]|:\s*({_NUMBER})\s*\)|[^\\()\[\]:]+|[\\:]")
_NETWORK = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")
_LOOK_BACK = 20  # tokens; a chunk ends after a comma that is at most so near to its end


class Fragment(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


class Clause(NamedTuple):
    """A prompt between ANDs: its weight, and its fragments between BREAKs."""

    weight: float
    parts: tuple[tuple[Fragment, ...], ...]


class Token(NamedTuple):
    """A token's id and weight."""

    id: int
    weight: float


class Chunking(NamedTuple):
    """How tokens are cut into chunks.

    length: the most tokens of a chunk.
    comma: the token after which a chunk would rather end.
    inner: those that go with the token before them, as the vectors of one word of a textual inversion do.
    """

    length: int
    comma: int
    inner: Container[int] = ()


def parse(prompt: str, *, join: bool = True) -> list[Clause]:
    """The clauses of a prompt; any text is one.

    Args:
        join: whether AND is heeded, which it is not in a negative prompt.

    Raises:
        RequestError: it names a network to load, as `<lora:name:1>` does; or see `check_weights`.
    """
    if found := _NETWORK.search(prompt):
        raise RequestError(
            f"prompt has {shown(found[0])}, which loads nothing here: add LoRAs to the model (--lora PATH:WEIGHT) and "
            "leave it out, or give prompt_language=plain if it is meant as text"
        )
    texts = _AND.split(prompt) if join else [prompt]
    if len(texts) == 1:
        return [Clause(1.0, _parts(prompt))]
    clauses = []
    for text in texts:
        words, _, weight = text.rpartition(":")
        if re.fullmatch(_NUMBER, weight.strip()):
            clauses.append(Clause(float(weight), _parts(words)))
        else:
            clauses.append(Clause(1.0, _parts(text)))
    return clauses


def _parts(text: str) -> tuple[tuple[Fragment, ...], ...]:
    """The fragments between BREAKs; neighbours of one weight are one."""
    parts: list[list[Fragment]] = [[]]
    for fragment in fragments(text):
        for i, piece in enumerate(_BREAK.split(fragment.text)):
            if i:
                parts.append([])
            if piece:
                parts[-1].append(Fragment(piece, fragment.weight))
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    return tuple(map(tuple, parts))


@np.errstate(over="ignore", invalid="ignore")  # refused below
def fragments(text: str) -> list[Fragment]:
    """Text by weight, brackets and escapes resolved; neighbours of one weight are one.

    Raises:
        RequestError: see `check_weights`.
    """
    pieces: list[str] = []
    weights = np.ones(len(text))
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for match in _TOKEN.finditer(text):
        token, weight = match[0], match[1]
        closes = "(" if token.endswith(")") else "["
        if token in opened:
            opened[token].append(len(pieces))
        elif token[0] == "\\":
            token = token[1:]
        elif (token in (")", "]") or weight is not None) and opened[closes]:
            start = opened[closes].pop()
            factor = float(weight) if weight is not None else ROUND if closes == "(" else SQUARE
            weights[start : len(pieces)] *= factor
            pieces[start] = token = ""
        pieces.append(token)
    merged: list[Fragment] = []
    for piece, weight in zip(pieces, weights.tolist(), strict=False):
        if piece and merged and merged[-1].weight == weight:
            merged[-1] = Fragment(merged[-1].text + piece, weight)
        elif piece:
            merged.append(Fragment(piece, weight))
    check_weights(fragment.weight for fragment in merged)
    return merged


def check_weights(weights: Iterable[float]) -> None:
    """Raise RequestError where a weight is more than the float32 of text states can hold, or no number."""
    if not all(abs(weight) <= MAX_WEIGHT for weight in weights):
        raise RequestError(f"prompt has a weight beyond {MAX_WEIGHT:.1e}; take out some of its brackets or signs")


def in_chunks(
    parts: Sequence[Sequence[Fragment]], tokenize: Callable[[str], list[int]], chunking: Chunking
) -> list[list[Token]]:
    """The tokens of a clause in chunks, at least one; each part begins a chunk."""
    result: list[list[Token]] = []
    length, comma, inner = chunking
    for part in parts:
        left = [Token(id, fragment.weight) for fragment in part for id in tokenize(fragment.text)]
        while True:
            cut = length
            while 0 < cut < len(left) and left[cut].id in inner:
                cut -= 1
            cut = cut or length  # what does not go together into any chunk
            if cut == length < len(left) and left[length].id != comma:
                near = range(length - 1, max(length - 1 - _LOOK_BACK, -1), -1)
                cut = next((i + 1 for i in near if left[i].id == comma), length)
            result.append(left[:cut])
            left = left[cut:]
            if not left:
                break
    return result
