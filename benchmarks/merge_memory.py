"""How much memory does merging a checkpoint take? Peak resident set of `merge_checkpoint` on LLaMA-3.1-8B shapes.

    python benchmarks/merge_memory.py [--layers 4] [--targets q_proj v_proj] [--folder DIR] [--json FILE]

Writes a synthetic bfloat16 checkpoint with the matrices of LLaMA-3.1-8B (4096 x 4096 attention, 14336 x 4096 MLP,
128256 x 4096 embeddings and head) in shards of about 5 GB, merges a random adapter of n = 700 into it in a process
of its own, and reports that process's peak resident set (ru_maxrss) after the imports and after the merge. Memory
depends on the largest merged matrix, not on the number of layers, so the default of 4 layers (4 GB) speaks for all 32
(16 GB); `--layers 32` checks that, where the disk has room for twice that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
SHARD_BYTES = 5 << 30
N = 700


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= {
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def build(folder: Path, layers: int, targets: list[str]) -> int:
    """Write the checkpoint and the adapter; returns the checkpoint's size."""
    from transformers import LlamaConfig

    from sdct_export import SdctAdapter, SdctConfig
    from sdct_export.adapter.entries import SdctEntries
    from sdct_export.base.checkpoint import NewTensor, write_safetensors

    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 22).astype(np.float32) * 0.02).view(np.uint32) >> 16  # bfloat16 bits
    block = memoryview(noise.astype(np.uint16).view(np.uint8)).cast("B")

    def content(nbytes: int) -> Iterator[memoryview]:
        for at in range(0, nbytes, len(block)):
            yield block[: min(len(block), nbytes - at)]

    base = folder / "base"
    base.mkdir()
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(base)
    shards: list[list[NewTensor]] = [[]]
    for name, shape in shapes(layers).items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(NewTensor(name, "BF16", shape, nbytes, lambda nbytes=nbytes: content(nbytes)))
    placed = {}
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(base / file, tensors, {"format": "pt"})
        placed |= {t.name: file for t in tensors}
    size = sum(t.nbytes for tensors in shards for t in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    modules = {}
    for name, shape in shapes(layers).items():
        path = name.removesuffix(".weight")
        if path.rsplit(".", 1)[-1] in targets:
            flat = rng.choice(shape[0] * shape[1], N, replace=False)
            indices = np.stack(np.divmod(flat, shape[1]), axis=1).astype(np.int32)
            modules[path] = SdctEntries(rng.standard_normal(N).astype(np.float32), indices, (shape[0], shape[1]))
    SdctAdapter(SdctConfig(target_modules=targets), modules).save(folder / "adapter")
    return size


MERGE = """
import json, resource, sys, time
import transformers, torch
from sdct_export.merging import merge_checkpoint
start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_checkpoint(*sys.argv[1:4], progress=None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - start, "imports_kib": before, "peak_kib": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (removed at the end)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="merge_memory.", dir=options.folder))
    try:
        size = build(folder, options.layers, options.targets)
        command = [sys.executable, "-c", MERGE, folder / "base", folder / "adapter", folder / "merged"]
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        assert sum(p.stat().st_size for p in (folder / "merged").glob("*.safetensors")) > size
    finally:
        shutil.rmtree(folder)
    raw = json.loads(done.stdout)
    result = {
        "checkpoint_gib": round(size / 2**30, 2),
        "layers": options.layers,
        "targets": options.targets,
        "n": N,
        "rss_after_imports_mib": round(raw["imports_kib"] / 1024),
        "peak_rss_mib": round(raw["peak_kib"] / 1024),
        "seconds": round(raw["seconds"], 1),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
