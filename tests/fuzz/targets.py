"""What is fuzzed: for each parser of a stranger's input its valid files, and what is done with changed ones.

Only `SdctError` (and on the command line click's own errors) may come out. A target returns whether its input was
taken, so that a test can tell that the valid files reach all of the parser.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.testing import CliRunner

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.folder import encode_safetensors, read_training
from sdct_export.adapter.training import TrainingProbe, TrainingRecord
from sdct_export.bundle.description import Bundle
from sdct_export.bundle.packing import bank_layout, most_bytes
from sdct_export.bundle.probe import Case, Probe
from sdct_export.cli import _named, main
from sdct_export.cli.build import RangeType
from sdct_export.cli.generate import _adapters_of, _prompt
from sdct_export.cli.generate import _read_lines as generate_lines
from sdct_export.cli.run import _parse_adapters, _parse_input
from sdct_export.engine.build import EngineManifest
from sdct_export.errors import SdctError
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.chat import ChatTemplate
from sdct_export.runtime.prompts import read_defaults
from sdct_export.runtime.request import encode_text, read_arrays
from sdct_export.verify import _against_probe, _effects

Files = list[bytes]
GOLDEN = Path(__file__).parents[1] / "golden" / "adapter"


@dataclasses.dataclass(frozen=True)
class Target:
    """A parser: the names of its files, valid contents for them, and what reads a folder that holds them.

    An empty content is no file.
    """

    names: Sequence[str]
    seeds: Callable[[], list[Files]]
    read: Callable[[Path], None]

    def __call__(self, files: Files) -> bool:
        place = folder() / f"of-{id(self)}"
        place.mkdir(exist_ok=True)
        for name, content in zip(self.names, files, strict=False):
            path = place / name
            if content:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)
        try:
            self.read(place)
        except SdctError:
            return False
        return True


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sdct-fuzz-")


def folder() -> Path:
    """A folder of this process."""
    return Path(_kept().name)


def _inspect(path: Path) -> None:
    """What was read can be shown, and the terminal is not controlled by it."""
    done = CliRunner().invoke(main, ["inspect", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert all(c.isprintable() or c in "\n\t" for c in done.output), done.output
    json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"], catch_exceptions=False).stdout)


def _record() -> TrainingRecord:
    ids = np.arange(6).reshape(2, 3)
    probe = TrainingProbe(
        "float32", {"input_ids": ids, "pixel_values": np.zeros((1, 2))}, {"logits": np.ones(4, np.float32)},
        {"logits": (2, 2)},
    )  # fmt: skip
    return TrainingRecord("transformers:BertModel", ("classifier.weight",), ("no", "yes"), probe)


def _adapter_seeds() -> list[Files]:
    adapter = SdctAdapter.load(GOLDEN)
    made = []
    for number, given in enumerate((adapter, dataclasses.replace(adapter, trained_on=_record()))):
        place = folder() / f"seed{number}"
        given.save(place)
        made.append([(place / name).read_bytes() if (place / name).exists() else b"" for name in ADAPTER.names])
    return made


def _read_adapter(path: Path) -> None:
    SdctAdapter.load(path)
    _inspect(path)


ADAPTER = Target(
    ("adapter_config.json", "adapter_model.safetensors", "training_probe.safetensors"), _adapter_seeds, _read_adapter
)


def _training_seeds() -> list[Files]:
    record = _record()
    return [[json.dumps(record.to_dict()).encode(), encode_safetensors(record.tensors())]]


def _read_training(path: Path) -> None:
    record = read_training(path)
    if record is not None and record.probe is not None:
        record.probe.difference({name: np.zeros(1) for name in record.probe.outputs})


def _tiny() -> Path:
    from tiny_bundle import make_adapter, write_bundle, write_tokenizer

    place = folder() / "tiny"
    if not place.exists():
        write_tokenizer(write_bundle(place, {"a": make_adapter(0, labels=3), "b": make_adapter(1)}))
    return place


def _read_bundle(path: Path) -> None:
    bundle = Bundle.load(path)
    bank_layout(bundle)
    most_bytes(bundle)
    _inspect(path)


def _probe_seeds() -> list[Files]:
    inputs = {name: np.array(rows) for name, rows in INPUTS.items()}
    outputs = {"hidden": np.ones(3, np.float32), "logits": np.ones(2, np.float32)}
    rows = {"base": ((), ()), "mixed": ((("a", 0.5),), ())}
    probe = Probe(
        inputs,
        tuple(Case(name, case, outputs) for name, case in rows.items()),
        {"hidden": np.array([0, 2, 3]), "logits": np.array([1, 6])},
        {"hidden": (2, 3, 9), "logits": (2, 4)},
    )
    probe.write(folder() / "seed.safetensors")
    return [[(folder() / "seed.safetensors").read_bytes()]]


def _read_probe(path: Path) -> None:
    """What `verify` does with it, on a bundle that is right."""
    probe = Probe.read(path / "probe.safetensors")
    list(_against_probe(_described(), _model(), probe))
    list(_effects(_described(), _model(), probe))


@functools.cache
def _base() -> Path:
    import torch
    import transformers

    place = folder() / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=11, max_position_embeddings=8)).save_pretrained(
        place
    )
    return place


def _peft_seeds() -> list[Files]:
    raw = {
        "peft_type": "LORA", "task_type": None, "auto_mapping": {"base_model_class": "BertModel"}, "r": 2,
        "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {"query": 3}, "modules_to_save": None,
        "target_modules": ["query"], "base_model_name_or_path": "a/base", "use_rslora": False,
    }  # fmt: skip
    stem = "base_model.model.encoder.layer.0.attention.self.query.lora_"
    rng = np.random.default_rng(0)
    tensors = {
        f"{stem}A.weight": rng.normal(size=(2, 8)).astype(np.float32),
        f"{stem}B.weight": rng.normal(size=(8, 2)).astype(np.float32),
    }
    kinds = [raw, raw | {"use_dora": True}]
    weights = [tensors, tensors | {f"{stem}magnitude_vector": np.ones(8, np.float32)}]
    return [[json.dumps(kind).encode(), encode_safetensors(t)] for kind, t in zip(kinds, weights, strict=True)]


def _read_peft(path: Path) -> None:
    from sdct_export.base.checkpoint import Checkpoint
    from sdct_export.weights.changes import from_peft

    change = from_peft(Checkpoint(_base()), path)
    for module in change.shapes:
        change.spectrum(module)


def _checkpoint_seeds() -> list[Files]:
    one = encode_safetensors({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, "f4")})
    two = encode_safetensors({"b.weight": np.ones((1, 4), np.float16)})
    index = {
        "metadata": {"total_size": 40},
        "weight_map": {
            "a.weight": "one.safetensors", "a.bias": "one.safetensors", "b.weight": "two.safetensors",
        },
    }  # fmt: skip
    return [[b"{}", json.dumps(index).encode(), one, two, b""], [b"{}", b"", b"", b"", one]]


def _read_checkpoint(path: Path) -> None:
    from sdct_export.base.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    for key in checkpoint.tensors:
        checkpoint.read(key)


def _onnx_seeds() -> list[Files]:
    import foreign_graphs

    made = []
    for external in (True, False):
        graph = foreign_graphs.Graph()
        weights = [layer.weight.detach().numpy() for layer in _layers()]
        x = graph("MatMul", "x", graph.constant(weights[0].T))
        x = foreign_graphs.nbits(graph, x, weights[1], bits=4, block=16, symmetric=False)
        codes = np.rint(weights[2].T / np.abs(weights[2]).max() * 127).astype(np.int8)
        scale = graph.constant(np.float32(np.abs(weights[2]).max() / 127))
        y = graph("Gemm", x, graph("DequantizeLinear", graph.constant(codes), scale), graph.constant(np.ones(3, "f4")))
        model = graph.model({"x": ("float32", ["n", 20])}, {"y": (y, "float32", ["n", 3])})
        path = foreign_graphs.save(model, folder() / "onnx", external=external)
        data = path.with_name("model.onnx.data")
        made.append([path.read_bytes(), data.read_bytes() if external else b""])
    return made


@functools.cache
def _layers() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(*sizes, bias=False) for sizes in ((20, 18), (18, 18), (18, 3))))


def _read_onnx(path: Path) -> None:
    from sdct_export.foreign.file import read_graph
    from sdct_export.foreign.place import place_sites
    from sdct_export.foreign.seen import see
    from sdct_export.foreign.weights import opaque_operators

    model = read_graph(path / "model.onnx")
    found = see(model.graph, _layers())
    opaque_operators(model)
    place_sites(model.graph, found.match, found.match.pieces)
    if found.match.missing:
        raise SdctError("what an export says of a layer that is not there")


@functools.cache
def _model() -> MultiAdapterModel:
    return MultiAdapterModel(_tiny(), device="cpu", threads=1)


INPUTS = {"input_ids": [[1, 2, 3], [4, 5, 6]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}


def _request_seeds() -> list[Files]:
    chosen = [None, "a", ["a", None], [{"a": 0.5, "b": 0.25}, "b"]]
    return [[json.dumps({"inputs": INPUTS, "adapters": adapters}).encode()] for adapters in chosen]


def _read_request(path: Path) -> None:
    """A request that is refused or answered leaves the answers to others as they were, to the bit."""
    raw = _json(path / "request.json")
    if not isinstance(raw, dict) or not isinstance(raw.get("inputs"), dict):
        raise SdctError("no mapping, which the type of `run` excludes")
    try:
        done = _model().run(raw["inputs"], raw.get("adapters"))
        assert len({len(array) for array in done.values()}) == 1
    finally:
        again = _model().run(INPUTS, ["a", {"b": 0.5}])
        first = _first_answer()
        assert all((again[name] == first[name]).all() for name in first)


@functools.cache
def _first_answer() -> dict[str, np.ndarray]:
    fresh = MultiAdapterModel(_tiny(), device="cpu", threads=1)
    return fresh.run(INPUTS, ["a", {"b": 0.5}])


def _read_text(path: Path) -> None:
    bundle = dataclasses.replace(_described(), path=path)
    encode_text(bundle, ["a b c", "g"], None)
    encode_text(bundle, ["a [MASK] \u00e9\u4e00 x"], ["b"])


@functools.cache
def _described() -> Bundle:
    return Bundle.load(_tiny())


def _chat_seeds() -> list[Files]:
    from chat_templates import TEMPLATES

    chat = [{"role": "user", "content": " a b "}, {"role": "assistant", "content": "c"}]
    settings = {"bos_token": {"content": "[CLS]"}, "eos_token": "b", "tokenizer_class": "PreTrainedTokenizerFast"}
    defaults = {"do_sample": True, "top_p": 0.9, "eos_token_id": [2], "stop_strings": ["x"], "max_length": 9}
    files = [json.dumps(one).encode() for one in (settings, {"unk_token": "a"}, defaults, chat)]
    made = [[template.encode(), *files] for template in TEMPLATES.values()]
    inside = settings | {"chat_template": [{"name": "default", "template": TEMPLATES["chatml"]}]}
    return [*made, [b"", json.dumps(inside).encode(), *files[1:]]]


def _read_chat(path: Path) -> None:
    bundle = dataclasses.replace(_described(), path=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_defaults(bundle).sampling({})
    ChatTemplate(bundle).render(_json(path / "messages.json"))


def _lines_seeds() -> list[Files]:
    lines = ["plain", '{"prompt": "a", "adapter": "a=0.5+b=1", "stop": ["x"]}', '{"ids": [1, 2], "temperature": 1}']
    return [["\n".join([*lines, '{"messages": [{"role": "user", "content": "a"}]}', ""]).encode()]]


def _read_lines(path: Path) -> None:
    name = path / "prompts.jsonl"
    content = io.BytesIO(name.read_bytes() if name.exists() else b"")  # an empty file is one, too
    with io.TextIOWrapper(content, encoding="utf-8") as file:
        for i, line in enumerate(generate_lines(file)):
            _adapters_of(line, None, i)
            _prompt(line, True, None)


def _array_seeds() -> list[Files]:
    made = []
    for array in (np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 2), np.float16)), np.array([True])):
        file = io.BytesIO()
        np.save(file, array)
        made.append([file.getvalue()])
    return made


def _manifest_seeds() -> list[Files]:
    shapes = {"input_ids": ((1, 1), (8, 128), (32, 512)), "sdct.g.values": ((2, 5), (256, 5), (4096, 5))}
    EngineManifest("0" * 64, "1" * 64, "10.3.0", "library", True, shapes).write(folder() / "seed.engine")
    return [[(folder() / "seed.engine.json").read_bytes()]]


def _read_command(path: Path) -> None:
    """The small languages of the command line."""
    words = _json(path / "words.json")
    for text in words if isinstance(words, list) else []:
        try:
            os.fsencode(text)  # what no shell can hand over
        except (TypeError, UnicodeEncodeError):
            continue
        for parse in (_parse_adapters, _parse_input, lambda text: _named((text,)), RangeType()):
            with contextlib.suppress(SdctError, OSError, click.ClickException):  # each is one line
                parse(text)


TARGETS = {
    "adapter": ADAPTER,
    "training": Target(("trained_on.json", "training_probe.safetensors"), _training_seeds, _read_training),
    "bundle": Target(("sdct_bundle.json",), lambda: [[(_tiny() / "sdct_bundle.json").read_bytes()]], _read_bundle),
    "probe": Target(("probe.safetensors",), _probe_seeds, _read_probe),
    "peft": Target(("adapter_config.json", "adapter_model.safetensors"), _peft_seeds, _read_peft),
    "checkpoint": Target(
        ("config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors", "model.safetensors"),
        _checkpoint_seeds,
        _read_checkpoint,
    ),
    "request": Target(("request.json",), _request_seeds, _read_request),
    "text": Target(
        ("tokenizer.json", "tokenizer_config.json", "config.json"),
        lambda: [[(_tiny() / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")] + [b"{}"]],
        _read_text,
    ),
    "chat": Target(
        (
            "chat_template.jinja",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "messages.json",
        ),
        _chat_seeds,
        _read_chat,
    ),
    "lines": Target(("prompts.jsonl",), _lines_seeds, _read_lines),
    "onnx": Target(("model.onnx", "model.onnx.data"), _onnx_seeds, _read_onnx),
    "array": Target(("x.npy",), _array_seeds, lambda path: void(read_arrays({"x": path / "x.npy"}))),
    "manifest": Target(
        ("model.engine.json",),
        _manifest_seeds,
        lambda path: void(EngineManifest.load(path / "model.engine").max_slots),
    ),
    "command": Target(
        ("words.json",),
        lambda: [[json.dumps(["none", "a=0.5+b=0.25", "x=f.npy", "name=/a/folder", "1:8:32"]).encode()]],
        _read_command,
    ),
}


def _json(path: Path) -> Any:
    """What stands for a caller's objects; what is no JSON stands for none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        raise SdctError("no JSON") from None


def void(_: object) -> None:
    """For expressions."""


def planted(files: Files) -> None:
    """A parser that breaks on a field that is a list of a negative number: several steps, each of which is seen."""
    try:
        raw = json.loads(files[0])
    except (ValueError, RecursionError, IndexError):
        return
    for value in raw.values() if isinstance(raw, dict) else ():
        if not isinstance(value, list):
            continue
        if not value:
            continue
        if isinstance(value[0], int) and value[0] < 0:
            raise ValueError("planted")
