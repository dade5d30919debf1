"""Tiny SentenceTransformer folders, written by the library itself or by hand as older versions wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from sdct_export import SdctConfig, SdctModel, get_sdct_model

WIDTH = 30
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh", "Big", "big", "query:"]
TEXTS = ["a b c", "h g f e d c b a a b", "Big d", "e"]


def body_folder(folder: Path, **more: Any) -> Path:
    """A BERT with its pooler and a tokenizer that tells upper from lower case."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **more)
    model = transformers.BertModel(config)
    with torch.no_grad():  # an initialiser's weights are small, and so would be every error
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter *= 10
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder


def sentence_folder(folder: Path, parts: Sequence[nn.Module], **more: Any) -> Path:
    """What `SentenceTransformer.save` writes for the tiny BERT with `parts` behind it."""
    body = body_folder(folder.with_name(f"{folder.name}-body"))
    SentenceTransformer(modules=[Transformer(str(body)), *parts], device="cpu", **more).save(str(folder))
    shutil.rmtree(body)
    return folder


def old_folder(folder: Path, pooling: dict[str, Any], settings: dict[str, Any], path: str = "0_Transformer") -> Path:
    """The layout of older versions: `models.*` classes, a flag for each pooling mode, lengths in a file."""
    body_folder(folder / path)
    names = {"Transformer": path, "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    listed = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{name}"}
        for i, (name, place) in enumerate(names.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / path / "sentence_bert_config.json").write_text(json.dumps(settings))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH} | pooling))
    return folder


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def train(folder: Path, seed: int, steps: int = 3) -> tuple[SentenceTransformer, SdctModel]:
    """The SentenceTransformer of `folder` with an adapter inside, trained contrastively on pairs of texts."""
    whole = load(folder)
    model = get_sdct_model(whole[0].auto_model, SdctConfig(["query", "value"], n_coefficients=40, seed=seed))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.5)
    torch.manual_seed(seed)
    for _ in range(steps):
        pairs = [torch.randint(4, len(WORDS), (2, 6)) for _ in range(2)]
        one, two = (
            whole({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"] for ids in pairs
        )
        cosines = nn.functional.cosine_similarity(one[:, None], two[None], dim=-1)
        nn.functional.cross_entropy(5 * cosines, torch.arange(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole.eval(), model
