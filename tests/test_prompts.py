"""The prompt language: what is a weight and what is text, chunks, and that plain prompts stay diffusers'."""

import contextlib
import dataclasses
import itertools
import time

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdjax import Request, RequestError, StableDiffusion
from sdjax.prompts import ROUND, SQUARE, Chunking, Clause, Fragment, fragments, in_chunks, parse
from sdjax.spec import Spec
from tests import checkpoints

MEANINGS = [
    ("a cat", [("a cat", 1)]),
    ("a (red) cat", [("a ", 1), ("red", ROUND), (" cat", 1)]),
    ("(red:1.3)[cat]", [("red", 1.3), ("cat", SQUARE)]),
    ("((red))", [("red", ROUND**2)]),
    ("((red:2) cat)", [("red", 2 * ROUND), (" cat", ROUND)]),
    ("( red : .5 )", [(" red ", 0.5)]),
    ("(red:-1)", [("red", -1)]),
    (r"\(red\) \[a\] \\ \n", [(r"(red) [a] \ n", 1)]),
    (r"(\(red\):2)", [("(red)", 2)]),
    ("(red", [("(red", 1)]),
    ("red) (cat)", [("red) ", 1), ("cat", ROUND)]),
    ("((red)", [("(", 1), ("red", ROUND)]),
    ("a [red", [("a [red", 1)]),
    ("red:1.3)", [("red:1.3)", 1)]),
    ("(16:9:2)", [("16:9", 2)]),
    ("(red:1.2.3)", [("red:1.2.3", ROUND)]),
    ("(red:99999)", [("red:99999", ROUND)]),
    ("ratio 16:9", [("ratio 16:9", 1)]),
    ("()", []),
    ("", []),
]


@pytest.mark.parametrize(("prompt", "expected"), MEANINGS, ids=[prompt for prompt, _ in MEANINGS])
def test_brackets_weigh_and_lone_ones_are_text(prompt, expected):
    found = fragments(prompt)
    assert [fragment.text for fragment in found] == [text for text, _ in expected]
    assert [fragment.weight for fragment in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("named", ["<lora:add_detail:0.8>", "<lyco:x>", "<hypernet:y:1>"])
def test_a_prompt_that_loads_a_network_is_refused(spec, named):
    for fields in ({"prompt": f"a cat {named}"}, {"prompt": "a cat", "negative_prompt": named}):
        with pytest.raises(RequestError, match=f"prompt has '{named}'.*--lora"):
            spec.resolve(Request(**fields))
    assert spec.resolve(Request(prompt=f"a cat {named}", prompt_language="plain"))
    assert parse("<b> lora: <lora> 1 < 2")


def test_break_and_and():
    red, cat = (Fragment("red ", 1), Fragment(" cat", 1))
    assert parse("red BREAK cat") == [Clause(1, ((red,), (cat,)))]
    assert parse("red BREAK") == [Clause(1, ((red,),))]
    assert parse("BREAKS AND") == [Clause(1, ((Fragment("BREAKS ", 1),),)), Clause(1, ((),))]
    assert parse("red AND cat:-.5") == [Clause(1, ((red,),)), Clause(-0.5, ((cat,),))]
    assert parse("red AND cat", join=False) == [Clause(1, ((Fragment("red AND cat", 1),),))]
    assert parse("red ANDREW and cat:2") == [Clause(1, ((Fragment("red ANDREW and cat:2", 1),),))]


TOKENIZER = checkpoints.pipeline().tokenizer
SPECIAL = st.text(st.sampled_from("ab ()[]:\\1.2,"), max_size=40)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="()[]\\"), max_size=60)


@given(SPECIAL | st.text(max_size=60))
def test_any_text_has_a_meaning_in_which_no_letter_is_lost(prompt):
    found = fragments(prompt)
    assert all(fragment.text and np.isfinite(fragment.weight) for fragment in found)
    assert all(a.weight != b.weight for a, b in itertools.pairwise(found))
    kept = "".join(fragment.text for fragment in found)
    letters = [c for c in prompt if c.isalpha()]
    assert [c for c in kept if c.isalpha()] == letters


@given(WORDS)
def test_text_without_brackets_is_itself(text):
    assert fragments(text) == ([Fragment(text, 1)] if text else [])


@given(st.text(st.sampled_from("ab ()[]\\"), min_size=1, max_size=40))
def test_escaped_text_is_itself(text):
    escaped = "".join(f"\\{c}" if c in "()[]\\" else c for c in text)
    assert fragments(escaped) == [Fragment(text, 1)]


@given(st.lists(st.lists(st.integers(0, 5), max_size=80), min_size=1, max_size=3), st.integers(1, 30))
def test_chunks_hold_every_token_once_in_order(parts, length):
    written = [[Fragment(" ".join(map(str, part)), 1)] for part in parts]
    made = in_chunks(written, lambda text: list(map(int, text.split())), Chunking(length, comma=0))
    assert [token.id for chunk in made for token in chunk] == list(itertools.chain(*parts))
    assert all(len(chunk) <= length for chunk in made)
    assert len(made) >= len(parts)
    if len(parts) == 1:
        assert all(len(chunk) == length or chunk[-1].id == 0 for chunk in made[:-1])


def test_a_chunk_ends_after_a_comma_that_is_near_its_end():
    def sizes(commas):
        tokens = [0 if i in commas else 1 for i in range(100)]
        made = in_chunks([[Fragment("x", 1)]], lambda _: tokens, Chunking(75, comma=0))
        return [len(chunk) for chunk in made]

    assert sizes([]) == [75, 25]
    assert sizes([60]) == [61, 39]
    assert sizes([55, 54]) == [56, 44]
    assert sizes([54]) == [75, 25]
    assert sizes([60, 75]) == [75, 25]  # A1111 looks back only when no comma is next


def test_vectors_of_one_word_are_in_one_chunk_where_they_fit():
    def sizes(before, vectors, commas=()):
        tokens = [0 if i in commas else 1 for i in range(before)] + [8] + [9] * (vectors - 1) + [1] * 10
        made = in_chunks([[Fragment("x", 1)]], lambda _: tokens, Chunking(75, comma=0, inner={9}))
        assert [token.id for chunk in made for token in chunk] == tokens
        return [len(chunk) for chunk in made]

    assert sizes(8, 70) == [8, 75, 5]
    assert sizes(8, 70, commas=[2]) == [8, 75, 5]  # A1111 looks for no comma there
    assert sizes(75, 3) == [75, 13]
    assert sizes(75, 3, commas=[70]) == [71, 17]
    assert sizes(0, 75) == [75, 10]
    assert sizes(0, 80) == [75, 15]
    assert sizes(1, 80) == [1, 75, 15]


@pytest.fixture(scope="module")
def spec(tiny):
    return Spec(tiny)


RUNS = st.builds(
    str.__mul__,
    st.sampled_from(["+", "-", "(", ")", "[", "]", '"', "9", " ", "(a", "(a:99)", ")+"]),
    st.integers(1, 900),
)
PIECES = st.sampled_from(
    ["a", " ", ", ", "(", ")9", ":1.5)", '"', '"a"', "\\", ".blend(", ".and(", " AND ", "BREAK", "0", "1.3"]
)


@example(prompt="cat" + "+" * 8000, language="compel")
@example(prompt="(" * 4990 + "a" + ")" * 4990, language="a1111")
@example(prompt="(a)" + "9" * 400, language="compel")
@example(prompt=f'("a").and({"9" * 400})', language="compel")
@example(prompt=f'("a", "b").blend({"9" * 400}, -{"9" * 400})', language="compel")
@example(prompt=f'("(a){"9" * 30}").and({"9" * 30})', language="compel")
@given(
    prompt=st.lists(RUNS | PIECES, min_size=1, max_size=8).map("".join),
    language=st.sampled_from(["a1111", "compel"]),
)
@settings(deadline=None)
def test_any_prompt_has_finite_weights_or_is_refused(spec, prompt, language):
    try:
        text = spec.text(spec.resolve(Request(prompt=prompt, prompt_language=language)))
    except RequestError as error:
        assert "\n" not in str(error)
        return
    arrays = [text.weights, text.clauses, *((text.variants.weights, text.variants.shares) if text.variants else ())]
    assert all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("(" * 5000 + ")" * 5000, "a1111"),
        ("([a" * 1666 + "])" * 1666, "a1111"),
        ("(a " * 2500 + ")" * 2500, "compel"),
        ("(a " * 2000 + ")-" * 2000, "compel"),
        ("(" * 3300 + '"" ' * 2200, "compel"),
        ("(" + '"a"  ' * 1999, "compel"),
    ],
)
def test_no_prompt_takes_long_to_read(spec, prompt, language):
    started = time.process_time()
    with contextlib.suppress(RequestError):
        spec.text(Request(prompt=prompt, prompt_language=language))
    assert time.process_time() - started < 1.5


@given(text=st.text(st.sampled_from("red cat,:.É!é"), min_size=1, max_size=70).filter(str.strip))
def test_plain_prompts_are_tokenized_as_diffusers_does(spec, text):
    request = Request(prompt=text, negative_prompt=text[::-1])
    ours, plain = spec.text(request), spec.text(dataclasses.replace(request, prompt_language="plain"))
    expected = TOKENIZER([text, text[::-1]], padding="max_length", max_length=77)["input_ids"]
    assert np.array_equal(ours.ids[0, :, 0], expected)
    assert all(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert np.all(ours.weights == 1)


def test_long_prompts_take_chunks_and_say_when_they_are_cut(spec):
    def shape(**fields):
        text = spec.text(Request(prompt="red", **fields))
        return text.ids.shape[1:3], text.truncated

    assert shape() == ((2, 1), False)
    assert shape(negative_prompt="cat " * 76) == ((2, 2), False)
    assert shape(negative_prompt="cat " * 700) == ((2, 8), True)
    assert shape(negative_prompt="cat " * 76, prompt_language="plain") == ((2, 1), True)
    long = spec.text(Request(prompt="red " * 80))
    assert np.array_equal(long.ids[0, 1, 1], spec.text(Request(prompt="red")).ids[0, 1, 0])  # an empty chunk
    assert spec.program(spec.resolve(Request(prompt="red AND cat BREAK")))[2:4] == (3, 1)
    with pytest.raises(RequestError, match="prompt joins 9 prompts by AND; allowed are 8"):
        spec.resolve(Request(prompt=" AND ".join("abcdefghi")))


def reference(encoder, ids, weights):
    """Chunks of weighted states, as A1111 computes them, by torch."""
    chunks = []
    for row, factors in zip(torch.tensor(ids).long(), torch.tensor(weights), strict=True):
        state = encoder(row[None]).last_hidden_state
        weighted = state * factors[None, :, None]
        chunks.append(weighted * (state.mean() / weighted.mean()))
    return torch.cat(chunks, 1)


@torch.no_grad()
def test_weights_chunks_and_joined_prompts_make_the_reference_image(tiny):
    pipe = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1])
    words = "a (red:1.5) [circle] BREAK cat"
    request = Request(
        prompt=f"{words}:.3 AND {words}:.7", seed=3, num_inference_steps=4, width=48, height=32, noise="torch"
    )
    assert pipe.spec.program(pipe.spec.resolve(request))[:4] == (48, 32, 3, 2)
    result = pipe.generate([request])[0]

    pipeline = checkpoints.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_pretrained(tiny / "scheduler")
    text = pipe.spec.text(request)
    assert np.array_equal(text.ids[0, 0], text.ids[0, 1])
    assert sorted(set(np.round(text.weights[0, 0].ravel(), 3))) == [0.909, 1, 1.5]
    positive, negative = (reference(pipeline.text_encoder, text.ids[0, i], text.weights[0, i]) for i in (0, 2))
    expected = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        num_inference_steps=4,
        width=48,
        height=32,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    assert np.abs(result.pixels - (expected * 255).round()).max() <= 2
    plain = reference(pipeline.text_encoder, text.ids[0, 0], np.ones_like(text.weights[0, 0]))
    assert (plain - positive).abs().max() > 0.1
