"""`.onnx_adapter` files: an adapter in ONNX Runtime's own format, for users of its adapter API in any language."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import native
from ..adapter.adapter import SdctAdapter
from ..errors import OutputError
from ..files import check_text, new_file
from .description import Bundle
from .packing import bank_layout, pack

SUFFIX = ".onnx_adapter"


def write_onnx_adapter(bundle: Bundle, adapter: SdctAdapter, path: str | Path, *, label: str = "the adapter") -> None:
    """Write `adapter` as a bank of two slots, slot 0 the base and slot 1 the adapter, complete or not at all.

    With the file active, a session on the bundle's `model.onnx` takes `adapter_ids` of 0 or 1 and no bank inputs.

    Raises:
        BaseMismatchError: the adapter does not fit the bundle.
        OutputError: the file exists already or cannot be written. UnsupportedError: ONNX Runtime is not installed.
    """
    onnxruntime = native.onnxruntime()
    check_text(path, "ONNX Runtime")
    rows = pack(bundle, adapter, label=label)
    bank = {name: np.zeros((2, *shape), dtype) for name, (dtype, shape) in bank_layout(bundle).items()}
    for name, row in rows.items():
        bank[name][1] = row
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in bank.items()})
    with new_file(path, overwrite=False) as target:
        try:
            file.export_adapter(str(target.absolute()))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise OutputError(f"writing {path} failed: {error}; nothing was left there") from error
