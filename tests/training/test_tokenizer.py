"""The small tokenizer: transformers' own class reads its files, and its ids are CLIP's layout."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sdjax.training import scenes
from sdjax.training.tokenizer import END, START, train_tokenizer

CAPTIONS = [scenes.caption(scenes.scene(i), np.random.default_rng(i)) for i in range(1500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    size = train_tokenizer(CAPTIONS, 400, 32, folder)
    assert size == len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder)


def test_the_vocabulary_is_laid_out_as_clips(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    symbols = sorted(vocabulary, key=vocabulary.__getitem__)
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    assert all(a + "</w>" == b for a, b in zip(symbols[:256], symbols[256:512], strict=True))
    assert symbols[-2:] == [START, END]


def test_words_of_captions_are_single_tokens(tokenizer):
    words = {word.strip(",") for caption in CAPTIONS for word in caption.split()}
    assert {len(tokenizer.tokenize(word)) for word in words} == {1}


def test_captions_fit_and_are_padded_with_the_end(tokenizer):
    ids = tokenizer(CAPTIONS, padding="max_length")["input_ids"]
    assert {len(row) for row in ids} == {32}
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    assert all(row[0] == start and row[-1] == end for row in ids)


@pytest.mark.parametrize(("captions", "merges"), [(1500, 400), (11, 100)], ids=["many", "few, with ties"])
def test_training_is_deterministic(tmp_path, captions, merges):
    for run in range(4):
        train_tokenizer(CAPTIONS[:captions], merges, 32, tmp_path / str(run))
        for file in (tmp_path / "0").iterdir():
            assert file.read_bytes() == (tmp_path / str(run) / file.name).read_bytes()


@given(st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), max_size=40))
def test_any_text_has_ids_that_give_it_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < len(tokenizer)
    said = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(said.split()) == "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(text).split())


def test_it_loads_without_torch(folder):
    code = (
        "import sys; sys.modules['torch'] = None\nfrom transformers import CLIPTokenizer\n"
        f"print(CLIPTokenizer.from_pretrained({str(folder)!r})('a red circle').input_ids)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == CLIPTokenizer.from_pretrained(folder)("a red circle")["input_ids"]
