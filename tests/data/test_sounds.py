"""Recordings of every PCM width come out as int16, one channel, one rate, one length."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from stages.data.samples import Notes
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


def test_channels_that_cancel_each_other_out_are_refused(tmp_path: Path) -> None:
    both = np.array([[500, -500], [-300, 300]], "<i2")
    with pytest.raises(DataError, match=r"a\.wav: channels that cancel each other out"):
        read_sound(record(tmp_path / "a.wav", both.tobytes(), channels=2), FORM)
    assert not read_sound(record(tmp_path / "b.wav", bytes(8), channels=2), FORM).any()


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
    empty = tmp_path / "0.wav"
    empty.touch()
    form = resolve_rate([empty, first, other], SoundForm())
    assert form.rate_hz == 8000
    with pytest.raises(DataError, match=r"b\.wav: 16000 samples per second.*--rate"):
        read_sound(other, form)
    with pytest.raises(DataError, match=r"0\.wav: 0 bytes of sound"):
        resolve_rate([empty], SoundForm())


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\xff\xd8\xff\xe0 a picture"], ids=["empty", "cut", "jpeg"])
def test_what_is_no_recording_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.wav"):
        read_sound(path, FORM)


def riff(path: Path, tag: int, bits: int, data: bytes, more: bytes = b"", stated: int | None = None) -> Path:
    """A .wav file of one channel at 8000 Hz; `stated` is how many bytes of sound its header promises."""
    kind = struct.pack("<HHIIHH", tag, 1, 8000, 8000 * bits // 8, bits // 8, bits) + more
    stated = len(data) if stated is None else stated
    body = b"WAVEfmt " + struct.pack("<I", len(kind)) + kind + b"data" + struct.pack("<I", stated) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


PCM, FLOAT, EXTENSIBLE = 1, 3, 65534


def test_extensible_pcm_is_pcm(tmp_path: Path) -> None:
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    data = (0x123456).to_bytes(3, "little") + (-256).to_bytes(3, "little", signed=True)
    path = riff(tmp_path / "a.wav", EXTENSIBLE, 24, data, struct.pack("<HHI", 22, 24, 4) + guid)
    assert read_sound(path, FORM).tolist() == [0x1234, -1]


def test_floats_are_shares_of_full_scale(tmp_path: Path) -> None:
    notes = Notes()
    path = riff(tmp_path / "a.wav", FLOAT, 32, np.array([0.5, -1.0, 1.0, 1.25], "<f4").tobytes())
    assert read_sound(path, FORM, notes).tolist() == [16384, -32768, 32767, 32767]
    assert notes.lines() == ["cut off what is louder than full scale in 1 recordings: a.wav"]
    for wrong in (30000.0, np.nan, np.inf):
        path = riff(tmp_path / "b.wav", FLOAT, 64, np.array([0.5, wrong], "<f8").tobytes())
        with pytest.raises(DataError, match=r"b\.wav: floating-point values up to .*, expected values from -1 to 1"):
            read_sound(path, FORM)


@pytest.mark.parametrize("keep", [46, 44 + 999])
def test_what_was_cut_off_is_no_recording(tmp_path: Path, keep: int) -> None:
    path = record(tmp_path / "a.wav", bytes(2000))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"of the 2000 bytes of its 'data' part"):
        read_sound(path, FORM)
    promised = riff(tmp_path / "pipe.wav", PCM, 16, bytes(100), stated=0xFFFFFFFF)
    with pytest.raises(DataError, match="wrote to a pipe"):
        read_sound(promised, FORM)


def test_parts_that_are_no_sound_are_passed_over(tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav", np.array([1, 2], "<i2").tobytes())
    whole = path.read_bytes() + b"cue " + struct.pack("<I", 3) + b"abc\0"
    path.write_bytes(whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:])
    assert read_sound(path, FORM).tolist() == [1, 2]


def test_a_missing_a_silent_and_a_compressed_recording(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_sound(tmp_path / "none.wav", FORM)
    with pytest.raises(DataError, match="0 bytes of sound"):
        read_sound(record(tmp_path / "empty.wav", b""), FORM)
    with pytest.raises(DataError, match=r"law\.wav: cannot be read as a recording \(Unknown wave file format: MULAW"):
        read_sound(riff(tmp_path / "law.wav", 7, 8, bytes(10)), FORM)


def test_forms_check_themselves() -> None:
    for wrong in ({"rate_hz": 0}, {"seconds": -1.0}):
        with pytest.raises(UsageError):
            SoundForm(**wrong)
