"""Where LoRAs and textual inversions may lie: folders, the hub, addresses; and that no more than they is fetched."""

import functools
import http.server
import threading

import huggingface_hub
import pytest
import safetensors.torch
import torch

from sdjax.weights import hub
from sdjax.weights.addon_file import AddonFile
from sdjax.weights.safetensors import CheckpointError
from sdjax.weights.single_file import is_single_file
from tests.weights import fake_hub

NAMES = ("named.safetensors", "other.safetensors")
TENSORS = {"w": torch.ones(2)}


def stem(source, **options) -> str:
    file = AddonFile(source, NAMES, **options)
    assert [*file.entries] == ["w"]
    return file.stem


def test_a_folders_file_is_the_named_one_or_the_only_one(tmp_path):
    def refused(message: str, **options) -> None:
        with pytest.raises(CheckpointError, match=message):
            stem(tmp_path, **options)

    refused("has 0 safetensors files; name one, or named.safetensors or other.safetensors")
    torch.save(TENSORS, tmp_path / "any.bin")
    refused("has 0 safetensors files", allow_pickle=True)
    torch.save(TENSORS, tmp_path / "other.bin")
    refused("has no safetensors file but other.bin; a pickle is read with allow_pickle only")
    assert stem(tmp_path, allow_pickle=True) == "other"
    torch.save(TENSORS, tmp_path / "named.bin")
    assert stem(tmp_path, allow_pickle=True) == "named"
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors")
    assert stem(tmp_path, allow_pickle=True) == "a"
    safetensors.torch.save_file(TENSORS, tmp_path / "b.safetensors")
    refused("has 2 safetensors files", allow_pickle=True)
    safetensors.torch.save_file(TENSORS, tmp_path / "other.safetensors")
    assert stem(tmp_path) == "other"


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lora").mkdir()
    safetensors.torch.save_file(TENSORS, tmp_path / "lora" / "named.safetensors")
    assert stem("~/lora") == stem("~/lora/named.safetensors") == "named"


def test_of_a_repository_one_file_is_fetched(tmp_path):
    files = {
        "some/lora": [
            "other.safetensors",
            "big.safetensors",
            "deep/named.safetensors",
            "adapter_config.json",
            "x.json",
        ],
        "some/concept": ["named.bin", "token_identifier.txt", "other.bin"],
        "some/many": ["a.safetensors", "b.safetensors"],
        "some/odd": ["[1] a*.safetensors", "1 ab.bin"],
    }
    for name, paths in files.items():
        for path in (tmp_path / name / each for each in paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                safetensors.torch.save_file(TENSORS, path)
            elif path.suffix == ".bin":
                torch.save(TENSORS, path)
            else:
                path.write_text("{}")
    code = (
        "import sys\n"
        "from sdjax.weights.addon_file import AddonFile, CheckpointError\n"
        f"for source in {[*files]}:\n"
        "    for allowed in (False, True):\n"
        "        try:\n"
        f"            print(AddonFile(source, {NAMES}, allow_pickle=allowed).stem)\n"
        "        except CheckpointError as error:\n"
        "            print(error)\n"
    )
    with fake_hub.serve({name: tmp_path / name for name in files}) as (address, fetched):
        lines = fake_hub.run(code, tmp_path / "cache", address).splitlines()
    assert lines == [
        "other",
        "other",
        "some/concept has no safetensors file but named.bin; a pickle is read with allow_pickle only (--allow-ckpt, or "
        "allow_ckpt in a training configuration)",
        "named",
        *["some/many has 2 safetensors files; name one, or named.safetensors or other.safetensors"] * 2,
        *["[1] a*"] * 2,
    ]
    assert {*fetched} == {
        "some/lora/other.safetensors",
        "some/lora/adapter_config.json",
        "some/concept/named.bin",
        "some/odd/[1] a*.safetensors",
    }


HUB = "https://huggingface.co/some/name"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"{HUB}/resolve/main/x.safetensors", ("main", "x.safetensors")),
        (f"{HUB}/blob/main/deep/x.safetensors", ("main", "deep/x.safetensors")),
        (f"{HUB}/resolve/main/x.safetensors?download=true", ("main", "x.safetensors")),
        (f"{HUB}/resolve/main/My%20Model%20v2.safetensors", ("main", "My Model v2.safetensors")),
        (f"{HUB}/blob/refs%2Fpr%2F3/100%25%3F.ckpt?download=true#top", ("refs/pr/3", "100%?.ckpt")),
    ],
)
def test_an_address_on_the_hub_is_a_file_of_its_cache(source, expected, monkeypatch):
    asked = []

    def download(repo_id, path, *, revision):
        asked.append((repo_id, revision, path))
        return "there"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.file(source) == "there"
    assert asked == [("some/name", *expected)]
    assert is_single_file(source)


@pytest.mark.parametrize(
    "source", ["a?b.safetensors", f"{HUB}/x", f"{HUB}/resolve/main", "https://a.b/c/resolve/d/e.pt"]
)
def test_another_source_is_left_as_it_is(source):
    assert hub.file(source) == source


def test_a_urls_query_is_no_part_of_its_name(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            pass

    torch.save(TENSORS, tmp_path / "a.pt")
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a"
        file = AddonFile(f"{address}.safetensors?download=1.0&by=x/y", NAMES)
        assert (file.stem, file.beside("adapter_config.json")) == ("a", b"{}")
        with pytest.raises(CheckpointError, match="is no safetensors file; a pickle is read with"):
            stem(f"{address}.pt?name=a.safetensors")
        server.shutdown()
    assert is_single_file("https://host/a.ckpt?download=true")
    assert not is_single_file("https://host/a?name=b.ckpt")
    assert is_single_file("what?.safetensors")
