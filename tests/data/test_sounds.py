"""Recordings of every PCM width come out as int16, one channel, one rate, one length."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from stages.data.sounds import SoundForm, read_sound, resolve_rate
from stages.errors import DataError, UsageError


def record(path: Path, frames: bytes, *, rate: int = 8000, width: int = 2, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames)
    return path


FORM = SoundForm(rate_hz=8000)


def test_sixteen_bits_pass_unchanged(tmp_path: Path) -> None:
    sound = np.array([0, 1, -1, 32767, -32768], "<i2")
    assert np.array_equal(read_sound(record(tmp_path / "a.wav", sound.tobytes()), FORM), sound)


@pytest.mark.parametrize(
    ("width", "frames", "expected"),
    [
        (1, bytes([0, 128, 255]), [-32768, 0, 127 << 8]),
        (3, (0x123456).to_bytes(3, "little") + (-256).to_bytes(3, "little", signed=True), [0x1234, -1]),
        (4, (0x12345678).to_bytes(4, "little") + (-65536).to_bytes(4, "little", signed=True), [0x1234, -1]),
    ],
)
def test_other_widths_keep_their_upper_bits(tmp_path: Path, width: int, frames: bytes, expected: list[int]) -> None:
    sound = read_sound(record(tmp_path / "a.wav", frames, width=width), FORM)
    assert sound.dtype == np.int16
    assert sound.tolist() == expected


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.array([[100, 300], [-32768, -32768], [32767, 32767]], "<i2")
    sound = read_sound(record(tmp_path / "a.wav", both.tobytes(), channels=2), FORM)
    assert sound.tolist() == [200, -32768, 32767]


def test_length_is_cut_or_filled_with_silence(tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav", np.arange(1, 11, dtype="<i2").tobytes(), rate=10)
    assert read_sound(path, SoundForm(rate_hz=10, seconds=0.5)).tolist() == [1, 2, 3, 4, 5]
    assert read_sound(path, SoundForm(rate_hz=10, seconds=1.2)).tolist() == [*range(1, 11), 0, 0]


def test_a_tone_keeps_its_pitch_when_resampled(tmp_path: Path) -> None:
    time = np.arange(16000) / 16000
    tone = (10000 * np.sin(2 * np.pi * 440 * time)).astype("<i2")
    sound = read_sound(record(tmp_path / "a.wav", tone.tobytes(), rate=16000), SoundForm(rate_hz=8000))
    assert len(sound) == 8000
    assert np.argmax(np.abs(np.fft.rfft(sound))) == 440
    assert abs(np.abs(sound[1000:7000]).max() - 10000) < 150


def test_without_a_rate_the_first_recording_sets_it_and_others_are_refused(tmp_path: Path) -> None:
    first = record(tmp_path / "a.wav", bytes(20), rate=8000)
    other = record(tmp_path / "b.wav", bytes(20), rate=16000)
    form = resolve_rate(first, SoundForm())
    assert form.rate_hz == 8000
    with pytest.raises(DataError, match=r"b\.wav: 16000 samples per second.*--rate"):
        read_sound(other, form)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\xff\xd8\xff\xe0 a picture"], ids=["empty", "cut", "jpeg"])
def test_what_is_no_recording_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.wav"):
        read_sound(path, FORM)


def test_a_missing_a_silent_and_a_float_recording(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_sound(tmp_path / "none.wav", FORM)
    with pytest.raises(DataError, match="0 bytes of sound"):
        read_sound(record(tmp_path / "empty.wav", b""), FORM)
    header = bytearray(record(tmp_path / "float.wav", bytes(8), width=4).read_bytes())
    header[20:22] = (3).to_bytes(2, "little")  # WAVE_FORMAT_IEEE_FLOAT
    (tmp_path / "float.wav").write_bytes(header)
    with pytest.raises(DataError, match="PCM"):
        read_sound(tmp_path / "float.wav", FORM)


def test_forms_check_themselves() -> None:
    for wrong in ({"rate_hz": 0}, {"seconds": -1.0}):
        with pytest.raises(UsageError):
            SoundForm(**wrong)
