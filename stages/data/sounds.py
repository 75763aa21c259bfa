"""Recordings (.wav) as int16 arrays: one channel, one rate, one length. scipy reads them: PCM of any width, floats."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import numpy as np

from stages.artifacts.records import Array
from stages.data.samples import Notes
from stages.errors import DataError, require

SUFFIXES = frozenset({".wav"})
LOUDEST = 2.0
"""Floats reach from -1 to 1; what is over is cut off up to here, and beyond it they are not meant so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundForm:
    """What every recording is brought to."""

    rate_hz: int | None = None
    """Samples per second; recordings at another rate are resampled. None: the first recording's, others refused."""
    seconds: float | None = None
    """Length: longer recordings are cut, shorter ones end in silence. None: the first recording's, others refused."""
    resample: bool = True

    def __post_init__(self) -> None:
        require(self.rate_hz is None or self.rate_hz > 0, "--rate", str(self.rate_hz), "a positive rate in Hz")
        require(self.seconds is None or self.seconds > 0, "--seconds", str(self.seconds), "a positive length")

    @property
    def samples(self) -> int | None:
        """Length in samples."""
        return None if self.seconds is None or self.rate_hz is None else max(1, round(self.seconds * self.rate_hz))


def resolve_rate(paths: Sequence[Path], form: SoundForm) -> SoundForm:
    """A form without rate takes that of the first recording that can be read, and then refuses others.

    Raises `DataError`, the first one's, where none can be read.
    """
    if form.rate_hz is not None:
        return form
    first: DataError | None = None
    for path in paths:
        try:
            return replace(form, rate_hz=_load(path)[1], resample=False)
        except DataError as error:
            first = first or error
    raise first or DataError("recordings", "none", "at least one")


def read_sound(path: Path, form: SoundForm, notes: Notes | None = None) -> Array:
    """One recording as int16 (T,); `form.rate_hz` must be definite.

    Other widths become 16 bits, floats from -1 to 1 too; several channels are averaged. Raises `DataError`, naming the
    file, for what is damaged or cut off, and for another rate where `form.resample` is false.
    """
    sound, rate_hz = _load(path, notes)
    if rate_hz != form.rate_hz:
        if not form.resample or form.rate_hz is None:
            raise DataError(
                str(path),
                f"{rate_hz} samples per second",
                f"{form.rate_hz} as in the first recording",
                "state the rate that all should have with `--rate`",
            )
        sound = _resampled(sound, rate_hz, form.rate_hz)
    if form.samples is None:
        return sound
    return np.pad(sound[: form.samples], (0, max(0, form.samples - len(sound))))


def _load(path: Path, notes: Notes | None = None) -> tuple[Array, int]:
    """Samples as int16 (T,), and their rate."""
    from scipy.io import wavfile

    try:
        _check_whole(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", wavfile.WavFileWarning)
            warnings.filterwarnings("ignore", "Chunk", wavfile.WavFileWarning)  # it skips cues, labels, pictures
            rate_hz, data = wavfile.read(path)
    except FileNotFoundError as error:
        raise DataError(str(path), "there is no such file") from error
    except DataError:
        raise
    except Exception as error:  # a damaged header raises almost anything
        reason = " ".join(str(error).split()) or "it ends early"
        found = f"cannot be read as a recording ({reason[:120]})"
        raise DataError(str(path), found, "PCM or floats in a .wav file") from error
    if not data.size or rate_hz <= 0:
        raise DataError(str(path), f"{data.nbytes} bytes of sound at {rate_hz} Hz", "a recording")
    channels = _sixteen_bit(data.reshape(len(data), -1), path, notes)
    sound = np.rint(channels.mean(axis=1)).astype(np.int16)
    if channels.any() and not sound.any():
        raise DataError(str(path), "channels that cancel each other out", "what can be heard in their mean", "keep one")
    return sound, rate_hz


def _check_whole(path: Path) -> None:
    """Raise `DataError` for a file that is shorter than one of its parts says: scipy takes what there is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if not size:
            raise DataError(str(path), "0 bytes of sound", "a recording")
        if file.read(4) not in (b"RIFF", b"RIFX"):  # RF64 has its sizes elsewhere
            return
        order = ">" if file.seek(0) == 0 and file.read(4) == b"RIFX" else "<"
        at = 12
        while at + 8 <= size:
            file.seek(at)
            name, length = struct.unpack(f"{order}4sI", file.read(8))
            at += 8 + length
            if at > size:
                found = f"{length - (at - size)} of the {length} bytes of its {name.decode('latin-1').strip()!r} part"
                raise DataError(str(path), found, "a whole recording", "its writer was cut off, or wrote to a pipe")
            at += length % 2


def _sixteen_bit(data: Array, path: Path, notes: Notes | None) -> Array:
    """PCM of any width as int16: its upper 16 bits, or 8 bits (which are unsigned) shifted up; floats by 32768."""
    if data.dtype.kind == "f":
        return _from_floats(data, path, notes)
    if data.dtype == np.uint8:
        return (data.astype(np.int16) - 128) << 8
    return (data >> (8 * data.dtype.itemsize - 16)).astype(np.int16)


def _from_floats(data: Array, path: Path, notes: Notes | None) -> Array:
    peak = float(np.abs(data).max()) if np.isfinite(data).all() else float("nan")
    if not peak <= LOUDEST:
        raise DataError(str(path), f"floating-point values up to {peak:g}", "values from -1 to 1", "normalise it")
    if peak > 1 and notes is not None:
        notes.count("cut off what is louder than full scale in {} recordings", path.name)
    return np.clip(np.rint(data.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)


def _resampled(sound: Array, rate_hz: int, wanted_hz: int) -> Array:
    from scipy.signal import resample_poly

    common = gcd(rate_hz, wanted_hz)
    moved = resample_poly(sound.astype(np.float64), wanted_hz // common, rate_hz // common)
    return np.asarray(np.clip(np.rint(moved), -32768, 32767), np.int16)
