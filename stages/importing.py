"""`import`: an ONNX model, weights from .h5, .safetensors or .pth, or a random initialisation, as a run record."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stages.artifacts import hdf5
from stages.artifacts.records import Array, Block, Group, Head, InputSpec, Model, Run
from stages.errors import DataError, SchemaError, UsageError, require
from stages.graphs.capture import Captured, capture
from stages.graphs.folding import fold
from stages.graphs.onnx_patterns import put_together
from stages.graphs.onnx_reader import Parsed, compare, module_of, parse, sample_shape
from stages.graphs.record import graph_tree
from stages.models import registry
from stages.models.calibration import calibrated
from stages.models.deploy import deploy
from stages.models.inputs import adapt_block
from stages.models.matching import Matched, match
from stages.models.modules import final_linear, without_last
from stages.models.presets import PRESETS
from stages.models.state import arrays_of, from_state, state_rows

CLASSIFIERS = ("keep", "drop", "features")
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints keep their state dict."""


@dataclass(frozen=True, kw_only=True)
class Importing:
    """What to make of the weights."""

    arch: str = ""
    """A registry name, or `package.module:factory`: naming it here permits its import. Empty for a file that holds its
    own graph."""
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    """Needed for user models; registry names know their own."""
    preset: str = ""
    """How the weights want their pictures: a name of `models.presets`; empty for the architecture's own scaling."""
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    """Input scaling other than the architecture's, one entry or one per channel."""
    classifier: str = "drop"
    """What becomes of a linear classifier: the record's head, nothing, or a part of the features."""
    classes: tuple[str, ...] | None = None
    """Names of the classifier's rows."""
    seed: int = 0
    """Initialises what no weights are given for."""
    result: int | None = None
    """Which of the model's outputs counts, from 0; None where it has one."""

    def __post_init__(self) -> None:
        require(self.classifier in CLASSIFIERS, "--classifier", repr(self.classifier), ", ".join(CLASSIFIERS))
        require(
            self.classes is None or self.classifier == "keep",
            "--classes",
            f"--classifier {self.classifier}",
            "--classifier keep",
        )
        require(
            self.input is None or not self.arch or ":" in self.arch,
            "--input",
            f"an input shape for {self.arch}",
            "one for user models only",
            "use --size or --arg",
        )
        require(
            self.classes is None or len(set(self.classes)) == len(self.classes),
            "--classes",
            "a name twice",
            "different names",
        )


@dataclass(frozen=True)
class Weights:
    """A file's tensors under its own names."""

    tensors: dict[str, Array]
    """float32."""
    ordered: bool
    """Whether the file keeps the order in which layers were registered."""


@dataclass(frozen=True)
class Imported:
    """A run record, and what its user should know about the model."""

    run: Run
    notes: tuple[str, ...] = ()


def import_model(settings: Importing, weights: Weights | None = None) -> Run:
    """A run record of the architecture with these weights, or initialised from the seed. Raises as `import_noting`."""
    return import_noting(settings, weights).run


def import_noting(settings: Importing, weights: Weights | None = None, start: Block | None = None) -> Imported:
    """`import_model`, with what its user should know. Random weights are normalised by the samples `start`, if any.

    Raises `DataError` when the weights do not fit, `UsageError` for settings that cannot be honoured and for a model
    that cannot be captured.
    """
    require(bool(settings.arch), "--arch", "missing", "the architecture of these weights")
    spec = _scaled(settings, settings.input or registry.input_spec(settings.arch, settings.arch_args))
    if weights is None:
        module = registry.build(settings.arch, settings.arch_args, allow=settings.arch, seed=settings.seed)
        if start is not None:
            module = calibrated(module, adapt_block(start, spec))
        return _record(settings, spec, capture(module, spec.shape, result=settings.result), module, None, given=False)
    settings, module, initial, matched = _fitted(settings, spec, weights)
    if matched.form == "batchnorm":
        values = {name: torch.from_numpy(np.array(value)) for name, value in matched.tensors.items()}
        module.load_state_dict(values, strict=False)  # what is missing are BatchNorm's counters
        captured = capture(module, spec.shape, result=settings.result)  # hooks and checks see the loaded weights
    else:
        captured = initial()
    found = _record(settings, spec, captured, module, matched, given=True)
    return replace(found, notes=(*found.notes, *_on_scaling(settings, spec)))


def _fitted(
    settings: Importing, spec: InputSpec, weights: Weights
) -> tuple[Importing, Any, Callable[[], Captured], Matched]:
    """The architecture with the arguments under which the weights fit, and how. Raises `DataError` where none does."""
    misfits = []
    for arguments in registry.arguments_for(settings.arch, settings.arch_args, weights.tensors):
        module = registry.build(settings.arch, arguments, allow=settings.arch, seed=settings.seed)

        @cache
        def initial(module: Any = module) -> Captured:
            return capture(module, spec.shape, result=settings.result)

        try:
            matched = match(module, initial, weights.tensors, ordered=weights.ordered)
        except DataError as error:
            misfits.append(error)
        else:
            return replace(settings, arch_args=arguments), module, initial, matched
    raise misfits[0]


def _on_scaling(settings: Importing, spec: InputSpec) -> tuple[str, ...]:
    """What is said where nobody said how pictures are scaled."""
    if spec.kind != "image" or settings.preset or settings.scale or settings.offset:
        return ()
    scale, offset = (", ".join(f"{number:.4g}" for number in numbers) for numbers in (spec.scale, spec.offset))
    return (f"pixels are scaled by {scale}, offset {offset}; what the weights want is said by --preset",)


def import_file(settings: Importing, path: Path | None, start: Block | None = None) -> Imported:
    """The run record of a file, whatever it is: an ONNX model, or weights of the architecture that the settings name.

    Without a file random weights, normalised by the samples `start` where there are any.

    Raises as `import_noting` and `import_onnx`.
    """
    if path is None:
        return import_noting(settings, start=start)
    require(start is None, "--calibrate", f"samples beside {path.name}", "random weights", "leave it out")
    with path.open("rb") as file:
        first = file.read(8)
    if first[4:8] == TFLITE:
        raise DataError(path.name, "a .tflite file", "an .onnx file, or weights", "export the model to .onnx")
    named = path.suffix == ".onnx" or (first[:1] == ONNX_START and not settings.arch)
    if named and not settings.arch:
        return import_onnx(settings, path.read_bytes(), path.name)
    require(not named, "--arch", f"{settings.arch} for an .onnx file, which holds its own graph", "the file alone")
    return import_noting(settings, read_weights(path))


TFLITE, ONNX_START = b"TFL3", b"\x08"
"""What tells files apart: the identifier of a flatbuffer, the tag of ONNX's first field."""


def import_onnx(settings: Importing, data: bytes, where: str) -> Imported:
    """A run record of a serialised ONNX model, compared with onnxruntime where that is installed.

    Raises `DataError` for what is no ONNX model or computes something else here, `UsageError` for what cannot be read
    or captured, `PartMissing` without the package onnx.
    """
    require(not settings.arch_args, "--arg", "an argument for a file that holds its own graph", "none")
    parsed = put_together(parse(data, where))
    own = _own_metadata(parsed)
    spec = _scaled(settings, settings.input or own or _guessed(parsed, where))
    module = module_of(parsed, spec.shape, where).eval()
    result = settings.result
    if result is None and own is not None and "features" in parsed.outputs:
        result = parsed.outputs.index("features")
    captured = capture(module, spec.shape, result=result)
    difference = compare(data, module, spec.shape, where, captured.entries)
    found = _record(settings, spec, captured, module, None, given=True)
    note = "onnxruntime is not installed: not compared with it"
    if difference is not None:
        note = f"outputs differ from onnxruntime's by at most {difference:.2g} of their size"
    scaling = () if own is not None else _on_scaling(settings, spec)
    return replace(found, notes=(*found.notes, note, *scaling))


def _own_metadata(parsed: Parsed) -> InputSpec | None:
    """How samples are prepared for a model that `export` wrote; None where the file says no such thing.

    How they had been packed before that is not read back.
    """
    try:
        facts = json.loads(parsed.metadata["edgetrain"])["input"]
        return InputSpec(
            kind=str(facts["kind"]),
            shape=tuple(map(int, facts["shape"])),
            scale=tuple(map(float, facts["scale"])),
            offset=tuple(map(float, facts["offset"])),
            sample_rate_hz=int(facts["sample_rate_hz"]),
            window_samples=int(facts["window_samples"]),
            hop_samples=int(facts["hop_samples"]),
            crop=float(facts.get("crop", 0)),
            interpolation=str(facts.get("interpolation", "bilinear")),
        )
    except (KeyError, ValueError, TypeError, AttributeError, SchemaError):
        return None


def _guessed(parsed: Parsed, where: str) -> InputSpec:
    shape = sample_shape(parsed, where)
    if len(shape) > 3:
        raise UsageError(where, f"samples of shape {shape}", "vectors, signals or images")
    return input_from_text("x".join(map(str, shape)))


def _record(
    settings: Importing, spec: InputSpec, captured: Captured, module: Any, matched: Matched | None, *, given: bool
) -> Imported:
    """The run record of a captured module; `given` where its weights are not random."""
    if spec.kind == "features" and captured.reads_tokens:
        spec = replace(spec, kind="tokens")
    last = final_linear(captured)
    if settings.classifier == "features" and not last:
        found = f"features, but {settings.arch or 'the model'} ends before its classifier"
        raise UsageError("--classifier", found, "keep or drop")
    cut = "" if settings.classifier == "features" else last
    if [cut] == [op.name for op in captured.graph.layers]:
        raise UsageError(cut, "the classifier is the only layer", "layers that give features", "--classifier features")
    classifier = matched.classifier if matched is not None else None
    model, own = _model(settings, spec, captured, module, matched, cut)
    head = None
    if settings.classifier == "keep":
        rows = own if own is not None and given else classifier
        if rows is None:
            raise UsageError("--classifier", "keep, but there are no weights of a classifier", "drop or features")
        head = _head(*rows, settings.classes)
    model = replace(model, head=head)
    deploy(model)  # what is not finite is found here, not three stages later
    return Imported(Run(model), captured.notes)


def _model(
    settings: Importing, spec: InputSpec, captured: Captured, module: Any, matched: Matched | None, cut: str
) -> tuple[Model, tuple[Array, Array] | None]:
    """The record's model, and the weight and bias of the layer that was cut off."""
    state = arrays_of(module)
    rows, rest = state_rows(module, state, captured, cut)
    graph, tensors, form = captured.graph, from_state(captured, state), "batchnorm"
    if matched is not None and matched.form == "deploy":
        graph, tensors = fold(graph, tensors)
        form, tensors = "deploy", dict(matched.tensors)
    own = None
    if cut:
        weight = tensors[f"{cut}.weight"]
        own = (weight, tensors.get(f"{cut}.bias", np.zeros(len(weight), np.float32)))
        graph, tensors = without_last(graph, tensors)
    model = Model(
        settings.arch or "onnx",
        dict(settings.arch_args),
        spec,
        form,
        tensors,
        graph=graph_tree(graph),
        state=rows,
        rest=rest,
    )
    return model, own


def _scaled(settings: Importing, spec: InputSpec) -> InputSpec:
    if settings.preset:
        require(settings.preset in PRESETS, "--preset", repr(settings.preset), ", ".join(PRESETS))
        spec = PRESETS[settings.preset].of(settings.arch).applied(spec)
    channels = spec.shape[0]
    for option, values in (("--scale", settings.scale), ("--offset", settings.offset)):
        require(len(values) in (0, 1, channels), option, f"{len(values)} values", f"1 or {channels}")
        require(all(np.isfinite(values)), option, str(values), "finite numbers")
    return replace(spec, scale=settings.scale or spec.scale, offset=settings.offset or spec.offset)


def _head(weight: Array, bias: Array, names: tuple[str, ...] | None) -> Head:
    count = len(weight)
    if names is not None and len(names) != count:
        raise DataError("--classes", f"{len(names)} names", f"{count}, one per row of the classifier")
    return Head("linear", np.arange(count), weight, bias, np.ones(count, bool), names)


def arguments(pairs: Sequence[str], size: int | None = None) -> dict[str, Any]:
    """Architecture arguments from `key=value` texts; values are JSON where they can be, else text.

    >>> arguments(["mix=true", "width=0.5", "name=a"], 96)
    {'mix': True, 'width': 0.5, 'name': 'a', 'size': 96}
    """
    found: dict[str, Any] = {}
    for pair in (*pairs, *([] if size is None else [f"size={size}"])):
        key, equals, value = pair.partition("=")
        require(bool(key and equals), "--arg", repr(pair), "key=value")
        require(key not in found, "--arg", f"{key} twice", "each argument once")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    """Comma-separated numbers; none for None.

    >>> numbers("0.5,1", "--scale")
    (0.5, 1.0)
    """
    try:
        return () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(option, repr(text), "numbers joined by commas") from None


def class_list(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one per line. Raises `DataError` for an empty line or file."""
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(path.name, "not UTF-8 text", "one class name per line") from error
    if not names or not all(names):
        raise DataError(path.name, "an empty line" if names else "no names", "one class name per line")
    return names


def input_from_text(text: str) -> InputSpec:
    """The input of a user model: `3x32x32` (image), `9x128` (signals x steps), `900` (features), `49x40@16000` (log-mel
    frames, bands, Hz).

    Images are scaled to 2 * (pixel / 255) - 1.

    >>> input_from_text("3x32x32").shape
    (3, 32, 32)
    """
    if re.fullmatch(r"\d+", text):
        return InputSpec("features", (int(text),))
    if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text):
        return registry.image_input(int(found[1]), int(found[2]), int(found[3]))
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        return registry.signal_input(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(\d+)x(\d+)@(\d+)", text):
        return registry.sound_input(int(found[1]), int(found[2]), int(found[3]))
    forms = "3x32x32 (image), 9x128 (signals x steps), 900 (features) or 49x40@16000 (frames, bands, Hz)"
    raise UsageError("--input", repr(text), forms)


# ------------------------------------------------------------------------------------------------------------- files


def read_weights(path: Path) -> Weights:
    """The tensors of an .h5, .safetensors or .pth file, told apart by content. Nothing in it is executed.

    Raises `DataError` for anything else, and for what only unpickling code could read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(hdf5.SIGNATURE):
        return _read_hdf5(path)
    if start.startswith((b"PK", b"\x80")):
        return _read_torch(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise DataError(path.name, "not a file of weights", ".h5, .safetensors or a state dict saved by torch")


def _read_hdf5(path: Path) -> Weights:
    with path.open("rb") as file:
        tree = hdf5.read_tree(file, path.name)
        if "edgetrain" in tree.attrs:
            raise DataError(
                path.name, f"an EdgeTrain {tree.attrs['edgetrain']}", "weights alone", "it is imported already"
            )
        found = _flat(tree, "")
        return Weights({name: _float32(np.asarray(value[...]), path, name) for name, value in found.items()}, False)


def _flat(tree: Group, prefix: str) -> dict[str, Any]:
    found = {f"{prefix}{name}": array for name, array in tree.arrays.items()}
    for name, child in tree.groups.items():
        found |= _flat(child, f"{prefix}{name}.")
    return found


def _read_safetensors(path: Path) -> Weights:
    try:
        found = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DataError(path.name, f"broken: {error}", "a .safetensors file") from error
    return Weights(_named(found, path), False)


def _read_torch(path: Path) -> Weights:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storage formats: of no concern to users of the weights
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            path.name,
            "not a plain state dict",
            "tensors by name, saved by torch.save",
            "save model.state_dict(), not the model",
        ) from error
    for key in WRAPPERS:
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not found:
        raise DataError(path.name, f"a {type(found).__name__}", "a state dict", "save model.state_dict()")
    return Weights(_named(found, path), True)


def _named(found: Mapping[str, Any], path: Path) -> dict[str, Array]:
    """Tensors as float32 arrays; without BatchNorm's counters, and without the prefix of torch's DataParallel."""
    odd = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise DataError(f"{path.name}: {odd}", f"a {type(found[odd]).__name__}", "a tensor", "save model.state_dict()")
    for name, value in found.items():
        kind = _no_plain_numbers(value)
        if kind:
            raise DataError(f"{path.name}: {name}", f"a {kind} tensor", "plain real numbers", "save the float model")
    parallel = all(name.startswith("module.") for name in found)
    arrays = {name.removeprefix("module.") if parallel else name: value for name, value in found.items()}
    return {
        name: _float32(value.detach().to(torch.float32).numpy(), path, name)
        for name, value in arrays.items()
        if not name.endswith("num_batches_tracked")
    }


def _no_plain_numbers(value: Tensor) -> str:
    """What a tensor is that holds something else; empty for plain numbers."""
    if value.is_quantized:
        return "quantised"
    return "complex" if value.is_complex() else "sparse" if value.layout != torch.strided else ""


def _float32(array: Array, path: Path, name: str) -> Array:
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path.name}: {name}", f"dtype {array.dtype}", "numbers")
    if not np.isfinite(array).all():
        raise DataError(f"{path.name}: {name}", "a value that is not finite", "finite weights")
    return np.array(array, dtype=np.float32)
