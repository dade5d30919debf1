"""A torch model as an onnx_ir graph with dynamic batch and sequence."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ..base.reference import run_model, sample_inputs
from ..contract import BATCH
from ..errors import UnsupportedError
from .match import SCOPES
from .tidy import Tidy

SEQUENCE = "sequence"
_NOISY = ("transformers", "torch", "torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")


def trace(model: nn.Module) -> ir.Model:
    """Export `model` (eval mode, cache off) to an ONNX graph that shares its weights.

    Raises:
        UnsupportedError: torch cannot trace or convert the model; names the module and the reason.
    """
    inputs = sample_inputs(model, batch=2, sequence=7)
    text = "input_ids" in inputs
    dims = {0: torch.export.Dim(BATCH)} | ({1: torch.export.Dim(SEQUENCE)} if text else {})
    dynamic = {name: dict(dims) for name in inputs}

    def convert() -> torch.onnx.ONNXProgram | None:
        outputs = run_model(model, inputs)
        return torch.onnx.export(
            model,
            (),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )

    with _without_cache(model):
        return converted(model, convert)


def converted(model: nn.Module, convert: Callable[[], torch.onnx.ONNXProgram | None]) -> ir.Model:
    """The graph that `convert` makes of `model`, without what the exporter noted about its own machine.

    Raises:
        UnsupportedError: `convert` failed; names the module of `model` that was being traced and the reason.
    """
    stack: list[str] = []
    with quiet(), _tracked(model, stack):
        try:
            onnx = convert()
        except UnsupportedError:
            raise
        except Exception as error:  # model and exporter raises many kinds; all of them mean the same to the user
            raise UnsupportedError(_problem(model, stack, error)) from error
    assert onnx is not None
    _strip(onnx.model)
    Tidy()(onnx.model)
    return onnx.model


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Decoders return no key-value cache inside the block."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@contextlib.contextmanager
def _tracked(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep in `stack` the paths of the modules being traced; a failure leaves the path down to the culprit."""

    def leave(*_: object) -> None:
        stack.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _problem(model: nn.Module, stack: list[str], error: Exception) -> str:
    """Which module stopped the export, and the reason torch gives at the root of its chain of errors."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if stack:  # tracing stopped inside a module; what follows a second root is torch's next attempt
        first = stack[: stack.index("", 1)] if "" in stack[1:] else stack
        path = first[-1]
    else:
        path = next((found for cause in chain if (found := _module_of_node(cause))), "")
    reason = next((line.strip() for line in str(chain[-1]).splitlines() if line.strip()), "no reason given")
    where = f"module {path!r}" if path else "the model as a whole"
    return (
        f"{type(model).__name__} cannot be exported to ONNX: {where} failed with {type(chain[-1]).__name__}: {reason}"
    )


def _module_of_node(error: BaseException) -> str | None:
    """The module of the traced node that `error` names (`translating node %linear_3`), found where it was raised."""
    named = re.search(r"translating node %(\w+)", str(error))
    traceback = error.__traceback__
    while named and traceback is not None:
        for value in traceback.tb_frame.f_locals.values():
            if isinstance(value, torch.fx.Node) and value.name == named[1]:
                paths = [path for path, _ in value.meta.get("nn_module_stack", {}).values() if path]
                return paths[-1] if paths else None
        traceback = traceback.tb_next
    return None


def _strip(model: ir.Model) -> None:
    """Drop what the exporter noted about its own machine (stack traces, file names); keep the module scopes."""
    for node in model.graph:
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and no log lines of the libraries that make a graph."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
