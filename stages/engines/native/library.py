"""The C library: found beside this file, loaded by ctypes, called with the interpreter's lock released."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.engines.native.program import ALIGN, VERSION
from stages.errors import DataError, PartMissing

HERE = Path(__file__).parent
NAMES = {False: "libedgetrain.so", True: "libedgetrain_same_bits.so"}
"""By whether every machine must give the same bits."""
MISSING = "install a C compiler and EdgeTrain again, or use --engine torch"

_SIZE, _INT, _FLOAT, _POINTER = ctypes.c_size_t, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_U64, _U32 = ctypes.c_uint64, ctypes.c_uint32
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "et_version": (_INT, ()),
    "et_width": (_INT, ()),
    "et_same_bits": (_INT, ()),
    "et_message": (ctypes.c_char_p, (_INT,)),
    "et_inspect": (_INT, (_POINTER, _U64, _POINTER)),
    "et_open": (_INT, (_POINTER, _POINTER, _U64, _POINTER, _U64, _POINTER, _U64, _POINTER, _POINTER, _INT)),
    "et_reset": (None, (_POINTER,)),
    "et_set_input": (_INT, (_POINTER, _INT, _POINTER, _POINTER)),
    "et_prefix": (_INT, (_POINTER, _POINTER, _POINTER)),
    "et_suffix": (_INT, (_POINTER, _POINTER, _POINTER)),
    "et_forward": (_INT, (_POINTER, _POINTER, _POINTER)),
    "et_backward": (_INT, (_POINTER, _POINTER)),
    "et_set_turn": (_INT, (_POINTER, _INT)),
    "et_set_seed": (None, (_POINTER, _U32)),
    "et_set_pager": (_INT, (_POINTER, _POINTER, _POINTER)),
    "et_run": (_INT, (_POINTER, _U32, _U32)),
    "et_keep": (None, (_POINTER, _POINTER)),
    "et_restore": (None, (_POINTER, _POINTER)),
    "et_set_rows": (_INT, (_POINTER, _POINTER, _POINTER)),
    "et_set_update": (_INT, (_POINTER, _POINTER, _POINTER)),
    "et_sgd": (None, (_POINTER, _POINTER, _POINTER, _SIZE, _FLOAT, _FLOAT, _FLOAT)),
    "et_adam": (None, (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _FLOAT, _FLOAT, _INT, _U32)),
    "et_square_sum": (ctypes.c_double, (_POINTER, _SIZE)),
    "et_clip_factor": (_FLOAT, (ctypes.c_double, _FLOAT)),
    "et_linear": (None, (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE)),
    "et_softmax_loss": (_FLOAT, (_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE)),
    "et_linear_gradients": (None, (_POINTER,) * 6 + (_SIZE,) * 3),
    "et_prototype_loss": (_INT, (_POINTER,) * 4 + (_SIZE,) * 3 + (_FLOAT, _POINTER)),
    "et_last_layer_importance": (None, (_POINTER,) * 4 + (_SIZE,) * 3),
    "et_squared_sums": (None, (_POINTER,) * 3 + (_SIZE,) * 2),
    "et_exp": (_FLOAT, (_FLOAT,)),
    "et_log": (_FLOAT, (_FLOAT,)),
    "et_slot": (None, (_POINTER, _POINTER, _SIZE, _U32, _POINTER)),
}
"""Every function of edgetrain.h: what it returns and takes."""


class Sizes(ctypes.Structure):
    """`struct et_sizes`."""

    _fields_ = [
        *[(name, _U64) for name in ("context_bytes", "arena_bytes", "kept_bytes", "constant_bytes", "image_bytes")],
        *[
            (name, _U32)
            for name in ("input", "boundary", "features", "live", "steps", "plan", "sums", "piece", "pages")
        ],
    ]


def is_built() -> bool:
    """Whether the library is there."""
    return all((HERE / name).is_file() for name in NAMES.values())


@cache
def library(same_bits: bool = False) -> Any:
    """The loaded library. Raises `PartMissing` where it was not built or cannot be loaded."""
    path = HERE / NAMES[same_bits]
    if not path.is_file():
        raise PartMissing("native engine", "not built on this machine", path.name, MISSING)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise PartMissing(
            "native engine", f"{path.name} cannot be loaded ({error})", "one of this machine", MISSING
        ) from None
    if not hasattr(loaded, "et_version") or loaded.et_version() != VERSION:
        found = f"{path.name} is of another version of EdgeTrain"
        raise PartMissing("native engine", found, f"version {VERSION} of the format", "install EdgeTrain again")
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def check(code: int, where: str, same_bits: bool = False) -> None:
    """Raise `DataError` with the library's message for any code but 0."""
    if code:
        raise DataError(where, library(same_bits).et_message(code).decode(), "a whole one", "lower the graph again")


def inspect(image: NDArray[np.uint8], same_bits: bool = False) -> Sizes:
    """What an image asks for. Raises `DataError` for one that is damaged or would leave its buffers."""
    sizes = Sizes()
    code = library(same_bits).et_inspect(image.ctypes.data, image.nbytes, ctypes.byref(sizes))
    check(code, "program image", same_bits)
    return sizes


def aligned(count: int, dtype: type = np.float32) -> NDArray[Any]:
    """A zeroed array that begins at a multiple of 64 bytes, as the library asks."""
    bytes_wanted = max(1, count) * np.dtype(dtype).itemsize
    raw = np.zeros(bytes_wanted + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + bytes_wanted].view(dtype)[:count]


def aligned_bytes(data: bytes) -> NDArray[np.uint8]:
    """A copy of these bytes in an array as `aligned` makes it."""
    copy: NDArray[np.uint8] = aligned(len(data), np.uint8)
    copy[:] = np.frombuffer(data, np.uint8)
    return copy
