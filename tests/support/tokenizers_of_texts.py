"""Small tokenizers of every kind that language models come with, trained on the spot."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "the stop comes after the stopper, and the last topper stops it all.",
    "naïve café, 東京の天気は晴れ。 Привет, мир! 😀 👩‍👩‍👧 done",
    "a line\nand another line\n\nUser: what is it?\nAssistant: it is  two  spaces.",
    "don't we'll it's (brackets) [and] {others} , . ! ?",
] * 3
SPECIAL = ["<s>", "</s>", "<|end|>"]


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@functools.cache
def byte_level() -> Tokenizer:
    """As GPT-2's, LLaMA 3's and Qwen's: a token is any piece of UTF-8 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, max_token_length=9
        ),
    )


@functools.cache
def byte_fallback() -> Tokenizer:
    """As LLaMA 2's, Mistral's and Gemma's: characters that are no token are one token a byte."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, limit_alphabet=40, max_token_length=9,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
    )  # fmt: skip
    ascii_texts = ["".join(c for c in text if " " <= c < "\x7f") for text in TEXTS]
    tokenizer.train_from_iterator(ascii_texts, letters)
    # bytes are no special tokens, which decoding would leave out
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(described))


@functools.cache
def unigram() -> Tokenizer:
    """As T5's and XLNet's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
        ),
    )


@functools.cache
def word_piece() -> Tokenizer:
    """As BERT's, which joins with spaces and mends those before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(
        tokenizer, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    )


@functools.cache
def words_end() -> Tokenizer:
    """As the first GPT's: the end of a word is part of its last token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=150, special_tokens=["<unk>", *SPECIAL], end_of_word_suffix="</w>", show_progress=False
        ),
    )


@functools.cache
def plain_words() -> Tokenizer:
    """Words without a decoder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(tokenizer, trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL], show_progress=False))


KINDS = {f.__name__: f for f in (byte_level, byte_fallback, unigram, word_piece, words_end, plain_words)}
