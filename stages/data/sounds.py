"""Recordings (.wav) as int16 arrays: one channel, one rate, one length. The standard library's `wave` reads them."""

from __future__ import annotations

import wave
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import numpy as np

from stages.artifacts.records import Array
from stages.errors import DataError, require

SUFFIXES = frozenset({".wav"})


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


def resolve_rate(path: Path, form: SoundForm) -> SoundForm:
    """A form without rate takes the rate of this recording, and then refuses others."""
    if form.rate_hz is not None:
        return form
    return replace(form, rate_hz=_load(path)[1], resample=False)


def read_sound(path: Path, form: SoundForm) -> Array:
    """One recording as int16 (T,); `form.rate_hz` must be definite.

    8, 24 and 32 bits become 16; several channels are averaged. Raises `DataError`, naming the file, for anything but
    PCM, and for another rate where `form.resample` is false.
    """
    sound, rate_hz = _load(path)
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


def _load(path: Path) -> tuple[Array, int]:
    """Samples as int16 (T,), and their rate."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate_hz = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except FileNotFoundError as error:
        raise DataError(str(path), "there is no such file") from error
    except (wave.Error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            str(path), f"cannot be read as a recording ({error or 'it ends early'})", "uncompressed PCM in a .wav file"
        ) from error
    frame_bytes = channels * width
    if not data or len(data) % frame_bytes or rate_hz <= 0:
        raise DataError(str(path), f"{len(data)} bytes of sound", f"a positive multiple of {frame_bytes}")
    sound = _sixteen_bit(data, width).reshape(-1, channels)
    return np.rint(sound.mean(axis=1)).astype(np.int16), rate_hz


def _sixteen_bit(data: bytes, width: int) -> Array:
    """Little-endian PCM of `width` bytes as int16: the upper 16 bits, or 8 bits (which are unsigned) shifted up."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.int16) - 128) << 8
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    return np.ascontiguousarray(raw[:, width - 2 :]).view("<i2")[:, 0].astype(np.int16)


def _resampled(sound: Array, rate_hz: int, wanted_hz: int) -> Array:
    from scipy.signal import resample_poly

    common = gcd(rate_hz, wanted_hz)
    moved = resample_poly(sound.astype(np.float64), wanted_hz // common, rate_hz // common)
    return np.asarray(np.clip(np.rint(moved), -32768, 32767), np.int16)
