"""A tokenizer's files are read as transformers reads them, and by transformers only once."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sdjax import vocabulary
from sdjax.text import Tokenizer
from sdjax.weights.safetensors import CheckpointError
from tests import checkpoints

TEXT = "a photo of <red> a red!! circle,  ÉCLAIR 3.5's ⭕\n!"
MADE = {
    "of Stable Diffusion 1": {},
    "of Stable Diffusion 2": {"pad_token": "!"},
    "with tokens that were added": {"added": ["<red>", "photo"]},
}
SAVED = "as saved", "in separate files"


@pytest.fixture(scope="module", params=[(made, saved) for made in MADE for saved in SAVED], ids=" ".join)
def folder(request, tmp_path_factory):
    """A tokenizer's folder: what transformers saves now, or saved before tokenizer.json."""
    made, saved = request.param
    special = dict(MADE[made])
    added = special.pop("added", [])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = checkpoints.tokenizer(**special)
    assert tokenizer.add_tokens(added) == len(added)
    tokenizer.save_pretrained(folder)
    if saved == "in separate files":
        whole = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        own = {each["content"]: each["id"] for each in whole["added_tokens"] if each["content"] in added}
        (folder / "added_tokens.json").write_text(json.dumps(own))
    return folder


@given(st.text() | st.text("a redcircl!'s<>|startofex 3,."))
@settings(deadline=None)
def test_ids_are_those_of_transformers(folder, text):
    theirs, ours = CLIPTokenizer.from_pretrained(folder), vocabulary.read(folder)
    for each in (text, TEXT):
        expected = theirs(each, add_special_tokens=False).input_ids
        assert ours.encoder.encode(each, add_special_tokens=False).ids == expected
    assert ours[1:] == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.encoder.get_vocab_size() == len(theirs)


def test_files_seen_before_need_no_transformers(folder):
    expected = vocabulary.read(folder).encoder.encode(TEXT).ids
    code = f"""import sys; from pathlib import Path; from sdjax import vocabulary
from sdjax.text import Tokenizer
from sdjax.weights.safetensors import CheckpointError
print(vocabulary.read(Path({str(folder)!r})).encoder.encode({TEXT!r}).ids, "transformers" in sys.modules)"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == f"{expected} False"


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert vocabulary.read(folder).encoder.encode("a red circle").ids


@pytest.mark.parametrize("value", ["7", "null", "[]", '["a"]', "[" * 3000 + "]" * 3000], ids=lambda value: value[:5])
@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
def test_special_tokens_that_are_none_are_refused_in_a_line(tmp_path, key, value):
    checkpoints.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(f'{{"{key}": {value}}}')
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer cannot be read: \w+") as refused:
        Tokenizer(tmp_path, vocab_size=10**6, length=77)
    assert "\n" not in str(refused.value)


def test_changed_files_are_read_anew(tmp_path):
    checkpoints.tokenizer().save_pretrained(tmp_path)
    before = vocabulary.read(tmp_path)
    checkpoints.tokenizer(pad_token="!").save_pretrained(tmp_path)
    assert vocabulary.read(tmp_path).padding != before.padding
