"""Templates: the product of the lists, any row on demand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.templates import Template, TemplateError

TEXT = """
images_per_prompt = 2
prompts = ["a photo of a {animal} in {place}", "a {{plain}} {animal}"]

[lists]
animal = ["cat", "dog", "owl"]
place = ["Paris", "snow"]

[request]
seed = 10
num_inference_steps = 20
"""


def test_the_rows_are_the_product_of_the_lists():
    template = Template.parse(TEXT)
    rows = [template[i] for i in range(len(template))]
    pairs = itertools.product(["cat", "dog", "owl"], ["Paris", "snow"])
    prompts = [f"a photo of a {a} in {p}" for a, p in pairs] + [f"a {{plain}} {a}" for a in ("cat", "dog", "owl")]
    assert [row["prompt"] for row in rows] == [p for p in prompts for _ in range(2)]
    assert [row["seed"] for row in rows] == [10, 11] * 9
    assert rows[1] == {
        "animal": "cat",
        "place": "Paris",
        "num_inference_steps": 20,
        "seed": 11,
        "prompt": "a photo of a cat in Paris",
    }
    assert "place" not in rows[-1]
    with pytest.raises(IndexError):
        template[len(template)]


def test_a_list_named_as_a_field_sets_that_field():
    template = Template.parse('prompts = ["a cat{sampler}"]\n[lists]\nsampler = ["ddim", "euler"]')
    assert template[1]["sampler"] == "euler"
    swept = Template.parse('prompts = ["a {x}", "b"]\n[lists]\nx = [1, 2]\nguidance_scale = [1, 3]')
    rows = [(row["prompt"], row["guidance_scale"]) for row in (swept[i] for i in range(len(swept)))]
    assert rows == [("a 1", 1), ("a 1", 3), ("a 2", 1), ("a 2", 3), ("b", 1), ("b", 3)]


@pytest.mark.parametrize("text", ['[request]\nseed = "5"', "[request]\nseed = 5.0", '[lists]\nseed = ["5"]'])
def test_images_per_prompt_count_from_a_seed_however_it_is_written(text):
    template = Template.parse(f'images_per_prompt = 3\nprompts = ["a{"{seed}" if "lists" in text else ""}"]\n{text}')
    assert [template[i]["seed"] for i in range(len(template))] == [5, 6, 7]


name = st.text(st.characters(codec="utf-8", exclude_characters="{}[!:"), min_size=1, max_size=6)


@given(name=name, value=st.integers() | st.booleans() | st.dates() | st.text(), around=st.text(max_size=4))
def test_a_list_of_any_name_and_values_goes_in_as_it_is(name, value, around):
    prompt = around.replace("{", "{{").replace("}", "}}") + f"{{{name}}}"
    template = Template((prompt,), {name: (value,)}, {}, 1)
    assert template[0]["prompt"] == f"{around}{value}"


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), images=st.integers(1, 3))
def test_every_row_is_another(sizes, images):
    names = [f"l{i}" for i in range(len(sizes))]
    lists = {name: tuple(f"{name}v{j}" for j in range(size)) for name, size in zip(names, sizes, strict=True)}
    template = Template((" ".join(f"{{{name}}}" for name in names),), lists, {}, images)
    rows = {(template[i]["prompt"], template[i]["seed"]) for i in range(len(template))}
    product = {" ".join(values) for values in itertools.product(*lists.values())}
    assert rows == {(prompt, seed) for prompt in product for seed in range(images)}
    assert len(template) == len(rows)


def test_a_template_of_a_million_rows_makes_any_of_them_at_once():
    lists = {name: tuple(range(1000)) for name in ("a", "b")}
    template = Template(("{a} {b}",), lists, {}, 1)
    assert len(template) == 10**6
    assert template[999_999]["prompt"] == "999 999"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts = [", "not TOML"),
        ("prompts = []", "prompts must be a list"),
        ('prompts = ["a {b}"]', "uses {b}, and there is no list"),
        ('prompts = ["a {"]', "write {{ and }} for braces"),
        ('prompts = ["a {b:d}"]\n[lists]\nb = [1, "c"]', "formats {b}; a list's value goes in as it is"),
        ('prompts = ["a {b:{c}}"]\n[lists]\nb = [1]', "formats {b}"),
        ('prompts = ["a {b!r}"]\n[lists]\nb = [1]', "formats {b}"),
        ('prompts = ["a {b.real}"]\n[lists]\nb = [1]', "uses {b.real}, and there is no list"),
        ('prompts = ["a"]\nlists = [1]', "lists must be a table"),
        ('prompts = ["a"]\nrequest = 3', "request must be a table"),
        ('prompts = ["a"]\n[request]\nseed = "x"', "seed='x' is not a whole number"),
        ('prompts = ["a{seed}"]\n[lists]\nseed = [1, true]', "seed=True is not a whole number"),
        ('prompts = ["a"]\nimages = 3', "unknown key 'images'"),
        ('prompts = ["a"]\nimages_per_prompt = 0', "images_per_prompt=0"),
        ('prompts = ["a"]\n[lists]\nb = [1]', "lists.b is in no prompt, and no Request field"),
        ('prompts = ["a"]\n[lists]\nb = []', "lists.b must be a list"),
        ('prompts = ["a"]\n[request]\nseed = 0x' + "f" * 5000, "a whole number of more than 64 bits"),
        ('prompts = ["a{b}"]\n[lists]\nb = [[{c = 0x8000000000000000}]]', "more than 64 bits"),
        ('prompts = ["a"]\n[request]\nseed = ' + "9" * 5000, "not TOML"),
        ("prompts = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ('images_per_prompt = 9223372036854775807\nprompts = ["a", "b"]', "more than 1,000,000,000 rows"),
        (
            f'prompts = ["{"".join(f"{{l{i}}}" for i in range(10))}"]\n[lists]\n'
            + "\n".join(f"l{i} = {[*range(100)]}" for i in range(10)),
            "more than 1,000,000,000 rows; shorten its lists",
        ),
        ('prompts = ["a"]\n[lists]\nSeed = [1]\n[request]\nseed = 2', "seed is given twice"),
        ('prompts = ["a"]\n[lists]\neta = [0, 1]\nEta = [0.5]', "eta is given twice"),
        ('prompts = ["a"]\n[request]\nsteps = 3', "request.steps is not a Request field"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(TemplateError) as error:
        Template.parse(text)
    assert message in str(error.value)
