"""A small byte-pair tokenizer in the files of transformers' CLIPTokenizer, trained on captions.

The vocabulary is laid out as CLIP's: 256 byte symbols, the same ending a word, the merges, then the two marks. Any text
can be tokenized; the more often a word is in the captions, the fewer tokens it takes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def train_tokenizer(captions: Iterable[str], merges: int, max_length: int, folder: str | Path) -> int:
    """Learn up to `merges` merges from the captions and write the tokenizer's files into `folder`.

    Returns the size of the vocabulary. `max_length` is the number of ids a prompt is padded or cut to, marks included.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    # The trainer numbers symbols that end a word in the order of a hash map, and numbers decide between merges of equal
    # counts: named before, they are always numbered alike, and the same captions make the same tokenizer.
    endings = [symbol + WORD_END for symbol in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        special_tokens=endings,
        end_of_word_suffix=WORD_END,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:merges]
    symbols = [*alphabet, *endings, *(a + b for a, b in pairs), START, END]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}

    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **marks}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in {"vocab": vocabulary, "special_tokens_map": marks, "tokenizer_config": settings}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return len(vocabulary)
