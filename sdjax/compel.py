"""compel's prompt language (https://github.com/damian0815/compel): weights behind words, blends, joined prompts.

    word+ word-- (words)1.3 "words"+      weigh 1.1 for each plus, 0.9 for each minus, or the number, and nest
    \\( \\) \\" \\+ \\-                      are the characters themselves, as are brackets that have no partner
    ("a cat", "a dog").blend(0.3, 0.7)    one embedding between two prompts; no_normalize keeps the sum of the weights
    ("a cat", "a dog").and(1, 0.5)        chunks of tokens one after the other, each of its weight

A token's state is taken from the empty text's towards its own by its weight, and beyond. `.swap` and LoRA commands are
refused. Knows no tokenizer and no JAX.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sdjax.prompts import Chunking, Fragment, Token, check_weights, in_chunks
from sdjax.values import RequestError

PLUS, MINUS = 1.1, 0.9
MAX_ENCODINGS = 31
"""Encodings of a chunk."""

_SUFFIX = r"\++|-+|\d+(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(
    rf"""
    \\[()"+-]                                                   # an escaped character
    | [)"] (?:{_SUFFIX})?                                       # a bracket or quote closes with its weight
    | (?<=[^\s()"+-]) (?P<weight>\++|-+) (?=[\s()",.]|$)        # of the word before
    | [^\s()"\\,.+-]+ (?:[+.-]+ [^\s()"\\,.+-]+)*               # a word, also with such characters inside
    | \s+ | .
    """,
    re.VERBOSE | re.DOTALL,
)
_TEXT = r'"((?:\\.|[^"\\])*)"'
_CALL = re.compile(rf"\s*\(\s*((?:{_TEXT}\s*(?:,\s*)?)+)\)\s*\.(blend|and|add)\(([\d\s,.-]*)(no_normalize\s*)?\)\s*")
_UNSUPPORTED = re.compile(r"\.swap\(|\b(?:with|use)Lora\(")


class Blend(NamedTuple):
    """A prompt and its share in an embedding."""

    share: float
    fragments: tuple[Fragment, ...]


class Part(NamedTuple):
    """What comes to chunks of its own: prompts of which the embedding is the sum, and the weight of all of it."""

    weight: float
    blends: tuple[Blend, ...]


class Encoding(NamedTuple):
    """A chunk of tokens to encode: which ones the others see, their weights and that of all, and its states' share."""

    share: float
    weight: float
    tokens: list[Token]
    keep: list[bool]

    def is_plain(self) -> bool:
        """Whether its states are what they would be without weights."""
        return self.share == self.weight == 1 and all(token.weight == 1 for token in self.tokens)


def encodings(prompt: str, tokenize: Callable[[str], list[int]], chunking: Chunking) -> list[list[Encoding]]:
    """For each chunk of a prompt the encodings that its states are a sum of, the prompt's own first.

    A phrase of weight w below 1 is also pulled towards the prompt without it, tan((1 - w) pi / 2) to 1.

    Raises:
        RequestError: see `parse` and `check_weights`; or it takes more than MAX_ENCODINGS of them.
    """
    result: list[list[Encoding]] = []
    for part in parse(prompt):
        read: list[tuple[list[list[Token]], dict[int | None, float]]] = []  # each prompt's chunks, and the pulls
        for share, words in part.blends:
            check_weights([share, part.weight, *(part.weight * fragment.weight for fragment in words)])
            # Each fragment goes through with its place for its weight, so that a token says which phrase it is of.
            numbered = [Fragment(fragment.text, i) for i, fragment in enumerate(words)]
            chunks = in_chunks([numbered], tokenize, chunking)
            there = sorted({int(token.weight) for chunk in chunks for token in chunk})
            read.append((chunks, {None: 1.0} | {i: _pull(words[i].weight) for i in there if words[i].weight < 1}))
        count = sum(len(pulls) for _, pulls in read)
        if count > MAX_ENCODINGS:
            raise RequestError(f"prompt blends texts and lowers phrases {count} times; allowed are {MAX_ENCODINGS}")
        column = [  # of each encoding its chunks
            [
                Encoding(
                    share * pull / sum(pulls.values()),
                    part.weight,
                    [Token(token.id, words[int(token.weight)].weight) for token in chunk],
                    [token.weight != hidden for token in chunk],
                )
                for chunk in chunks
            ]
            for (share, words), (chunks, pulls) in zip(part.blends, read, strict=True)
            for hidden, pull in pulls.items()
        ]
        longest = max(map(len, column))
        padded = [chunks + [chunks[0]._replace(tokens=[], keep=[])] * (longest - len(chunks)) for chunks in column]
        result += map(list, zip(*padded, strict=True))
    return result


def _pull(weight: float) -> float:
    return math.tan((1 - max(weight, 1e-5)) * math.pi / 2)


def parse(prompt: str) -> list[Part]:
    """The parts of a prompt, at least one.

    Raises:
        RequestError: it asks for what is not supported, or counts of prompts and weights differ.
    """
    if found := _UNSUPPORTED.search(prompt):
        raise RequestError(f"prompt has {found[0]}...), which of compel's language is not supported")
    call = _CALL.fullmatch(prompt)
    if call is None:
        return [Part(1.0, (Blend(1.0, tuple(fragments(prompt))),))]
    prompts = [tuple(fragments(text.replace('\\"', '"'))) for text in re.findall(_TEXT, call[1])]
    _, _, operator, listed, no_normalize = call.groups()
    try:
        weights = [float(number) for number in listed.replace(",", " ").split()] or [1.0] * len(prompts)
    except ValueError:
        raise RequestError(f"prompt has .{operator}({listed}), which are no weights; give numbers") from None
    if len(weights) != len(prompts):
        raise RequestError(f"prompt joins {len(prompts)} texts by .{operator} with {len(weights)} weights")
    if operator != "blend":
        return [Part(weight, (Blend(1.0, prompt),)) for weight, prompt in zip(weights, prompts, strict=True)]
    total = 1.0 if no_normalize else sum(weights)
    if total == 0:
        raise RequestError("prompt has weights in .blend whose sum is 0; change them, or add no_normalize")
    return [Part(1.0, tuple(Blend(weight / total, prompt) for weight, prompt in zip(weights, prompts, strict=True)))]


@np.errstate(over="ignore", invalid="ignore")  # refused by `encodings`
def fragments(text: str) -> list[Fragment]:
    """Text by weight, brackets, quotes and escapes resolved; neighbours of one weight are one."""
    pieces: list[str] = []
    weights = np.ones(len(text))
    opened: dict[str, list[int]] = {"(": [], '"': []}
    for match in _TOKEN.finditer(text):
        token, suffix = match[0], match[0][1:]
        starts = opened.get({")": "(", '"': '"'}.get(token[0], ""), [])
        begins = not (pieces and pieces[-1][-1:].isalnum())  # in the middle of a word a bracket is text
        if (token == "(" and begins) or (token == '"' and not starts):
            opened[token].append(len(pieces))
        elif starts:
            start = starts[-1]
            for each in opened.values():  # what opened inside has no partner
                del each[bisect_left(each, start) :]
            weights[start : len(pieces)] *= _factor(suffix)
            pieces[start] = token = " "
        elif len(token) == 2 and token[0] == "\\":
            token = token[1]
        elif match["weight"]:
            weights[len(pieces) - 1] *= _factor(token)
            token = ""
        pieces.append(token)
    merged: list[Fragment] = []
    for piece, weight in zip(pieces, weights.tolist(), strict=False):
        if merged and (piece.isspace() or merged[-1].weight == weight):
            merged[-1] = Fragment(merged[-1].text + piece, merged[-1].weight)
        elif piece.strip():
            merged.append(Fragment(piece, weight))
    return merged


def _factor(suffix: str) -> float:
    """The weight that `++`, `--`, `1.3` or nothing stands for."""
    if suffix[:1] in ("+", "-"):
        try:
            return (PLUS if suffix[0] == "+" else MINUS) ** len(suffix)
        except OverflowError:
            return math.inf
    return float(suffix) if suffix else 1.0
