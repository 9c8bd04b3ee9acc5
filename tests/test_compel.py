"""compel's prompt language: what compel's own parser and embeddings make of the same text."""

import math
import random

import jax
import numpy as np
import pytest
import torch
from compel import Compel
from compel.prompt_parser import Blend, PromptParser

from sdjax import Request, RequestError, StableDiffusion, compel
from sdjax.prompts import Chunking
from sdjax.spec import Spec
from tests import checkpoints

PROMPTS = [
    "a red+ cat",
    "red++, blue-",
    "(red cat)1.3 on (a (mat)+)-",
    "(a)0.5(b)1.2",
    "red-haired c++ x+1, a+b - c +",
    "(unclosed red closed)) red+ ",
    "foo(bar)1.2 (a)1.2.3 (a)-0.5",
    '\\(lit\\) a \\"b\\" c+',
    '"quoted (phrase)0.9"++ what\'s up++.',
    '("a red cat+", "a dog").blend(0.3,0.7)',
    '("a","b-","c").blend(1, 1, 1, no_normalize)',
    '("a+","b").and(1,0.5)',
    '("a", "b").and()',
    "(-5 degrees) outside, x (-y)1.2",
    "a cat,-dog",
    "(+1)",
]
WORDS = ["red", "cat+", "blue-", "(a b)1.3", "(c)++", "(d (e)0.5 f)1.2", ", ", "x-y", '"q r"-', "\\(z\\)", "tree---"]


def written(fragments):
    """Text apart from spaces, and weights."""
    return [(fragment.text.replace(" ", ""), pytest.approx(fragment.weight)) for fragment in fragments]


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_means_what_it_means_to_compel():
    parser, choose = PromptParser(), random.Random(0)
    made = [" ".join(choose.choices(WORDS, k=choose.randint(1, 6))) for _ in range(60)]
    for prompt in PROMPTS + made:
        theirs = parser.parse_conjunction(prompt)
        for part, text, weight in zip(compel.parse(prompt), theirs.prompts, theirs.weights, strict=True):
            blended = text.prompts if isinstance(text, Blend) else [text]
            assert part.weight == weight, prompt
            for (share, fragments), other in zip(part.blends, blended, strict=True):
                assert written(fragments) == written(other.children), prompt
                assert isinstance(text, Blend) or share == 1
    shares = [share for share, _ in compel.parse(PROMPTS[9])[0].blends]
    assert shares == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat).swap(dog)", r"prompt has \.swap\(...\), which of compel's language is not supported"),
        ("withLora(x, 0.5) a", r"prompt has withLora\("),
        ('("a", "b").blend(1)', r"prompt joins 2 texts by \.blend with 1 weights"),
        ('("a", "b").blend(1, -1)', r"whose sum is 0"),
        ('("a", "b").and(1, 2.3.4)', r"which are no weights"),
        ("a- b " * 40, r"lowers phrases 41 times; allowed are 31"),
    ],
)
def test_what_cannot_be_had_is_refused(tiny, prompt, message):
    with pytest.raises(RequestError, match=message):
        Spec(tiny).resolve(Request(prompt=prompt, prompt_language="compel"))


@pytest.mark.parametrize("weight", ["0", "0.000001", "0.00001"])
def test_a_phrase_of_no_weight_is_pulled_no_further_than_one_of_a_hundred_thousandth(weight):
    chunk = compel.encodings(f"a (b){weight}", lambda text: [ord(c) for c in text.strip()], Chunking(7, 0))[0]
    floor = math.tan((1 - 1e-5) * math.pi / 2)
    assert [one.share for one in chunk] == pytest.approx([1 / (1 + floor), floor / (1 + floor)], rel=1e-9)


def test_without_weights_it_is_a_plain_prompt(tiny):
    spec = Spec(tiny)
    ours, plain = (spec.text(Request(prompt="a (red) cat", prompt_language=name)) for name in ("compel", "plain"))
    assert ours.variants is None
    assert np.array_equal(ours.ids, spec.text(Request(prompt="a red cat", prompt_language="plain")).ids)
    assert not np.array_equal(ours.ids, plain.ids)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_embeddings_are_compel_s(tiny):
    pipe = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1])
    pipeline = checkpoints.pipeline()
    embed = Compel(pipeline.tokenizer, pipeline.text_encoder, truncate_long_prompts=False)
    pairs = [
        ("a red++ (cat)0.4 circle- red", "(circle)0.7"),
        ('("a red cat-", "circle").blend(0.3, 0.7)', ""),
        ('("red circle+", "cat").and(1, 0.5)', "red-"),
    ]
    for prompt, negative in pairs:
        request = pipe.spec.resolve(Request(prompt=prompt, negative_prompt=negative, prompt_language="compel"))
        context = pipe._denoiser._conditions([request], [pipe.spec.text(request)]).context
        theirs = embed.pad_conditioning_tensors_to_same_length([embed(prompt), embed(negative)])
        np.testing.assert_allclose(np.asarray(context)[0, 0], torch.cat(theirs), atol=2e-5)
    assert (embed(pairs[0][0]) - embed("a red cat circle red")).abs().max() > 0.1


def test_a_blend_of_an_xl_model_is_one_of_its_pooled_vectors_too(tmp_path):
    checkpoints.saved(tmp_path / "model", checkpoints.pipeline_xl)
    pipe = StableDiffusion.from_pretrained(tmp_path / "model", devices=jax.devices()[:1])

    def pooled(prompt):
        request = pipe.spec.resolve(Request(prompt=prompt, prompt_language="compel"))
        return np.asarray(pipe._denoiser._conditions([request], [pipe.spec.text(request)]).pooled)[0, 0, 0]

    circle, cat = pooled("a red circle"), pooled("cat")
    blend = pooled('("a red circle", "cat").blend(0.3, 0.7)')
    np.testing.assert_allclose(blend, 0.3 * circle + 0.7 * cat, atol=1e-5)
    assert np.abs(circle - cat).max() > 0.1
