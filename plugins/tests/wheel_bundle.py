"""Writes a tiny bundle with two adapters, for check_wheel.sh: `wheel_bundle.py FOLDER`. Needs torch, transformers."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

from sdct_export import SdctConfig, export_multi, get_sdct_model


def base() -> BertModel:
    """The same small model each time, with weights large enough for errors to show."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=60
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def main(output: str) -> None:
    """Train nothing: the coefficients are random."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for seed, name in enumerate(("a", "b")):
            model = get_sdct_model(base(), SdctConfig(["query", "value"], n_coefficients=60 + seed, seed=seed))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=0.5)
            adapters[name] = Path(folder, name)
            model.save_adapter(adapters[name])
        export_multi(base(), adapters, output)
    write_tokenizer(Path(output))


def write_tokenizer(folder: Path) -> None:
    """Of a word a number, so that the bundle reads text."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    main(*sys.argv[1:])
