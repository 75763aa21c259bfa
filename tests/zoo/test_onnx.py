"""The zoo through PyTorch's own ONNX exporter and back by `import`."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache

import pytest
import torch

from stages.artifacts.records import InputSpec
from stages.errors import DataError, UsageError
from stages.importing import Importing, import_onnx
from tests.zoo import FAST, ZOO, Specimen

KINDS = {1: "features", 2: "signal", 3: "image"}
REFUSED = {
    "swin": "cannot be computed",  # samples and windows are one axis, counted when the file was written
    "swin-v2": "onnxruntime refuses it",
    "matchboxnet": "onnxruntime cannot run it",
    "tied-autoencoder": "operator SequenceConstruct",
}
"""Files that are refused, and with what words."""


@cache
def exported(name: str) -> bytes | None:
    """The specimen for one sample, opset 12; None where the exporter has no form of it."""
    specimen = ZOO[name]
    buffer = io.BytesIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                specimen.build(), (specimen.example(1),), buffer, opset_version=12, dynamo=False, input_names=["x"]
            )
    except (RuntimeError, ValueError):  # the exporter's own
        return None
    finally:
        logging.disable(logging.NOTSET)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "specimen",
    [pytest.param(specimen, id=name, marks=() if name in FAST else pytest.mark.zoo) for name, specimen in ZOO.items()],
)
def test_what_pytorch_exports_is_read(specimen: Specimen) -> None:
    """`import_onnx` itself compares all outputs with onnxruntime's and every layer with its operators."""
    data = exported(specimen.name)
    if data is None:
        pytest.skip("PyTorch's exporter has no form of it")
    spec = InputSpec(KINDS[len(specimen.input_shape)], specimen.input_shape)
    settings = Importing(input=spec, result=0)
    if specimen.name in REFUSED:
        with pytest.raises((DataError, UsageError), match=REFUSED[specimen.name]):
            import_onnx(settings, data, "model.onnx")
        return
    assert import_onnx(settings, data, "model.onnx").run.model.arch == "onnx"


@pytest.mark.zoo
def test_few_are_left_out() -> None:
    assert sum(exported(name) is None for name in ZOO) <= 14
