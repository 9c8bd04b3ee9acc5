"""A tokenizer's files as transformers reads them, kept on disk, as to import transformers takes two seconds."""

import contextlib
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from sdjax.files import user_cache, write_whole


class Vocabulary(NamedTuple):
    """Byte-pair encoding, and the ids that a text is put between and filled up with."""

    encoder: Tokenizer
    start: int
    end: int
    padding: int


def read(folder: Path) -> Vocabulary:
    """The vocabulary in a folder as transformers writes them; only for files not seen before is transformers imported.

    Raises:
        OSError, ValueError: transformers cannot read it, or one of the ids is not there.
    """
    key = hashlib.sha256(f"format 1 {version('transformers')} {version('tokenizers')}".encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        data = path.read_bytes()
        key.update(f"\n{path.name} {len(data)}\n".encode() + data)
    kept = user_cache("tokenizers") / f"{key.hexdigest()}.json"
    try:
        text = kept.read_text(encoding="utf-8")
    except OSError:
        text = _by_transformers(folder)
        with contextlib.suppress(OSError):  # it is read again then
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, text.encode())
    fields = json.loads(text)
    for mark, token in fields.items():
        if token is None:
            raise ValueError(f"its files name no token for {mark}")
    return Vocabulary(Tokenizer.from_str(fields.pop("encoder")), **fields)


def _by_transformers(folder: Path) -> str:
    from transformers import CLIPTokenizer

    try:
        found = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of files that are not what it expects, anything
        raise ValueError(f"{type(error).__name__}: {error}") from None
    encoder = found.backend_tokenizer
    encoder.no_padding()
    encoder.no_truncation()
    marks = {"start": found.bos_token_id, "end": found.eos_token_id, "padding": found.pad_token_id}
    return json.dumps({"encoder": encoder.to_str(), **marks})
