"""Prompts to token ids and their weights, with the checkpoint's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32
from tokenizers import AddedToken

from sdjax import compel, vocabulary
from sdjax.compel import Encoding
from sdjax.prompts import Chunking, Fragment, Token, in_chunks, parse
from sdjax.values import one_line
from sdjax.weights.safetensors import CheckpointError

T = TypeVar("T")

MAX_CHUNKS = 8
"""Chunks that a prompt may have; the rest of it is cut off. Each number of them is a program of its own."""


class Variants(NamedTuple):
    """What a prompt's states are a sum of, as compel weighs it: encodings of the empty text, the prompt, and the prompt
    with phrases hidden whose weight is below 1; or of several prompts that are blended.

    ids: of each encoding, as in Text; the first one's are those of the empty text.
    weights: how far each id's state goes from the empty text's to its own.
    keep: the ids that the others see.
    shares: of each encoding's states in the sum.
    """

    ids: Int32[np.ndarray, "encoders prompts variants chunks length"]
    weights: Float32[np.ndarray, "encoders prompts variants chunks length"]
    keep: Bool[np.ndarray, "encoders prompts variants chunks length"]
    shares: Float32[np.ndarray, "encoders prompts variants chunks"]


class Text(NamedTuple):
    """A request's prompts for the text encoders; all have as many chunks, empty ones at the end of shorter prompts.

    ids: start, tokens, end and padding of each chunk of the joined prompts, then of the negative one.
    weights: of each id; 1 outside of brackets.
    clauses: weights of the joined prompts.
    truncated: whether something had to be cut off.
    variants: of prompts in compel's language, what their weights need; None where all weights are 1.
    """

    ids: Int32[np.ndarray, "encoders prompts chunks length"]
    weights: Float32[np.ndarray, "encoders prompts chunks length"]
    clauses: Float32[np.ndarray, " joined"]
    truncated: bool
    variants: Variants | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Prompts, chunks and variants, which are compiled into a program."""
        _, prompts, chunks, _ = self.ids.shape
        return prompts, chunks, 0 if self.variants is None else self.variants.ids.shape[2]

    def with_negative_twice(self) -> "Text":
        """For a network that is asked with the negative prompt once with an image and once without."""

        def twice(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([rows, rows[:, -1:]], axis=1)

        variants = None if self.variants is None else Variants(*map(twice, self.variants))
        return self._replace(ids=twice(self.ids), weights=twice(self.weights), variants=variants)


class Tokenizer:
    """CLIP's byte-pair encoding of prompts into chunks of a fixed number of ids.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt, as transformers writes them.
        vocab_size: of the text encoder; an id beyond it could not be embedded.
        length: ids of a chunk, its start and end included: the text encoder's max_position_embeddings.
        added: tokens that the tokenizer does not have, and for how many embeddings each stands; they get the ids from
            `first_added` on.

    Attributes:
        end: the id of the token that ends a text.
        length: as given.
        first_added: the id of the first token of `added`: how many tokens the tokenizer has itself.

    Raises:
        CheckpointError: no tokenizer is there, or it does not fit the text encoder.
    """

    def __init__(
        self, folder: str | Path, *, vocab_size: int, length: int, added: Sequence[tuple[str, int]] = ()
    ) -> None:
        files = {path.name for path in Path(folder).iterdir()}
        if not ("tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files):
            raise CheckpointError(
                "the checkpoint's tokenizer folder lacks vocab.json and merges.txt, or tokenizer.json"
            )
        try:
            self._encoder, self._start, self.end, self._padding = vocabulary.read(Path(folder))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the tokenizer cannot be read: {one_line(error)}") from None
        size = self._encoder.get_vocab_size()
        if size > vocab_size:
            raise CheckpointError(
                f"the tokenizer has {size} tokens, the text encoder {vocab_size}; they are not a pair"
            )
        self.length, self.first_added = length, size
        self._stands_for: dict[int, range] = {}
        for token, count in added:
            self._add(token, count)
        inner = {id for ids in self._stands_for.values() for id in ids[1:]}
        self._chunking = Chunking(length - 2, self.tokens(",")[-1], inner)

    def _add(self, token: str, count: int) -> None:
        if self._encoder.token_to_id(token) is not None:
            raise CheckpointError(f"the tokenizer has the token {token} already; give the textual inversion another")
        first = self._encoder.get_vocab_size()
        names = [token, *(f"{token}_{i}" for i in range(1, count))]
        # A token that looks like a word is not looked for inside of words.
        whole = token[0].isalnum()
        if self._encoder.add_tokens([AddedToken(name, single_word=whole) for name in names]) != count:
            raise CheckpointError(f"the tokenizer has some of the tokens {token}_1 to {token}_{count - 1} already")
        self._stands_for[first] = range(first, first + count)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without start, end and padding."""
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        return [each for id in ids for each in self._stands_for.get(id, (id,))]

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "prompts length"], Bool[np.ndarray, " prompts"]]:
        """The prompts' ids, from the start token to padding, and which prompts were cut short."""
        texts = [[Token(id, 1.0) for id in self.tokens(prompt)] for prompt in prompts]
        cut = np.array([len(text) > self.length - 2 for text in texts], bool)
        # A prompt that is too long keeps its start and its end token, as transformers truncates.
        return np.array([self.row(text)[0] for text in texts], np.int32), cut

    def chunks(self, text: str) -> list[list[Token]]:
        """The tokens of a text without weights, in chunks, at least one."""
        return in_chunks([[Fragment(text, 1.0)]], self.tokens, self._chunking)

    def clauses(self, prompt: str, negative_prompt: str, language: str) -> list[tuple[float, list[list[Token]]]]:
        """Each joined prompt, then the negative one: its weight and its tokens in chunks.

        language: `a1111`, that of `sdjax.prompts`; or `plain`, in which every character is text, in one chunk, cut
            where it is too long.
        """
        if language == "plain":
            return [(1.0, [[Token(id, 1.0) for id in self.tokens(text)]]) for text in (prompt, negative_prompt)]
        return [
            (clause.weight, in_chunks(clause.parts, self.tokens, self._chunking))
            for clause in parse(prompt) + parse(negative_prompt, join=False)
        ]

    def encodings(self, prompt: str) -> list[list[Encoding]]:
        """For each chunk of a prompt in compel's language the encodings that its states are a sum of."""
        return compel.encodings(prompt, self.tokens, self._chunking)

    def row(self, chunk: Sequence[Token]) -> tuple[list[int], list[float]]:
        """A chunk between start and end, padded, with the weights of all."""
        chunk = chunk[: self.length - 2]
        padding = self.length - 2 - len(chunk)
        ids = [self._start, *(token.id for token in chunk), self.end]
        weights = [1.0, *(token.weight for token in chunk), 1.0]
        return ids + [self._padding] * padding, weights + [1.0] * padding

    def encoding(self, one: Encoding) -> tuple[list[int], list[float], list[bool], float]:
        """An encoding's ids, their weights, which are kept, and its share."""
        ids, weights = self.row(one.tokens)
        _, keep = self.row([Token(id, kept) for (id, _), kept in zip(one.tokens, one.keep, strict=True)])
        return ids, [one.weight * weight for weight in weights], list(map(bool, keep)), one.share


def encode(tokenizers: Sequence[Tokenizer], prompts: Sequence[tuple[str, str]], language: str) -> Text:
    """A request's prompts, tokenized.

    Args:
        tokenizers: one a text encoder, of equal length.
        prompts: the prompt and the negative prompt that each of them reads.
        language: see `Tokenizer.clauses`; or `compel`, that of `sdjax.compel`.

    Raises:
        ValueError: the encoders' prompts join different numbers of prompts.
    """
    pairs, weighted = list(zip(tokenizers, prompts, strict=True)), None
    if language == "compel":
        weighted = [[tokenizer.encodings(text) for text in pair] for tokenizer, pair in pairs]
        read = [[(1.0, _unweighted(chunks)) for chunks in pair] for pair in weighted]
    else:
        read = [tokenizer.clauses(*pair, language) for tokenizer, pair in pairs]
    if len(set(map(len, read))) > 1:
        first, second = (len(clauses) - 1 for clauses in read)
        raise ValueError(f"prompt joins {first} prompts by AND, prompt_2 joins {second}; give as many")
    longest = max(len(chunks) for clauses in read for _, chunks in clauses)
    cut = any(len(chunk) > tokenizers[0].length - 2 for clauses in read for _, chunks in clauses for chunk in chunks)
    count = min(longest, MAX_CHUNKS)
    rows = [
        [[tokenizer.row(chunk) for chunk in _exactly(count, chunks, [])] for _, chunks in clauses]
        for tokenizer, clauses in zip(tokenizers, read, strict=True)
    ]
    ids, weights = (
        np.array([[[chunk[part] for chunk in row] for row in encoder] for encoder in rows], dtype)
        for part, dtype in ((0, np.int32), (1, np.float32))
    )
    clauses = np.array([weight for weight, _ in read[0][:-1]], np.float32)
    variants = None if weighted is None else _variants(tokenizers, weighted, count)
    return Text(ids, weights, clauses, cut or longest > MAX_CHUNKS, variants)


def chunked(
    tokenizers: Sequence[Tokenizer], texts: Sequence[str], most: int
) -> Int32[np.ndarray, "texts encoders chunks length"]:
    """The ids of texts without weights: as many chunks as the longest has, but no more than `most`."""
    read = [[tokenizer.chunks(text) for tokenizer in tokenizers] for text in texts]
    count = min(most, max(len(chunks) for row in read for chunks in row))
    return np.array(
        [
            [
                [tokenizer.row(chunk)[0] for chunk in _exactly(count, chunks, [])]
                for tokenizer, chunks in zip(tokenizers, row, strict=True)
            ]
            for row in read
        ],
        np.int32,
    )


def _unweighted(chunks: list[list[Encoding]]) -> list[list[Token]]:
    """The tokens of a prompt in compel's language."""
    return [[Token(id, 1.0) for id, _ in first.tokens] for first, *_ in chunks]


def _variants(
    tokenizers: Sequence[Tokenizer], read: Sequence[Sequence[list[list[Encoding]]]], count: int
) -> Variants | None:
    """What the weights of prompts in compel's language need, for `count` chunks; None where all of them are 1.

    read: for each encoder and prompt `Tokenizer.encodings`.
    """
    if all(one.is_plain() for pair in read for text in pair for encodings in text for one in encodings):
        return None
    most = 1 + max(len(encodings) for pair in read for text in pair for encodings in text)
    size = -(-most // 4) * 4  # programs are few so
    nothing, blank = Encoding(0.0, 1.0, [], []), Encoding(1.0, 1.0, [], [])
    rows = [
        [
            [
                [tokenizer.encoding(one) for one in _exactly(size, [nothing, *encodings], nothing)]
                for encodings in _exactly(count, text, [blank])
            ]
            for text in pair
        ]
        for tokenizer, pair in zip(tokenizers, read, strict=True)
    ]  # encoders, prompts, chunks, variants
    ids, weights, keep, shares = (
        np.array([[[[one[part] for one in chunk] for chunk in text] for text in pair] for pair in rows], dtype)
        for part, dtype in enumerate((np.int32, np.float32, np.bool_, np.float32))
    )
    return Variants(*(column.swapaxes(2, 3) for column in (ids, weights, keep, shares)))


def _exactly(count: int, items: list[T], filler: T) -> list[T]:
    """The first `count` of the items, or all with as many fillers as are missing."""
    return (items + [filler] * count)[:count]
