"""Streams: images back to back, whole or broken, from pipes and from files."""

import io
import os
import threading

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts import hdf5, stream
from stages.artifacts.records import Block, End, Run
from stages.errors import DataError, InputMissing, StreamBroken


def block_of(n: int, value: int = 0) -> Block:
    return Block(np.full((n, 3), value, np.float32), np.zeros(n, np.int64), "ND")


def piped(data: bytes, **options):
    """Read records through a real pipe, fed by a thread as another process would."""
    reading, writing = os.pipe()

    def feed():
        with os.fdopen(writing, "wb", buffering=0) as sink:
            view = memoryview(data)
            while view:
                try:
                    view = view[sink.write(view) :]
                except BrokenPipeError:
                    return

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(reading, "rb") as source:
        try:
            yield from stream.records(source, "stdin", **options)
        finally:
            source.close()
            thread.join()


READERS = {"pipe": piped, "file": lambda data, **options: stream.records(io.BytesIO(data), "stdin", **options)}


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_what_is_written_back_to_back_is_read_one_by_one(reader, sizes):
    data = b"".join(hdf5.encode(block_of(n, n)) for n in sizes) + hdf5.encode(End(len(sizes)))
    records = list(READERS[reader](data))
    assert [len(block) for block in records[:-1]] == sizes
    assert [float(np.asarray(block.x[:1])[0, 0]) for block in records[:-1]] == sizes
    assert records[-1] == End(len(sizes))


@pytest.mark.parametrize("reader", READERS)
def test_other_tools_images_stand_beside_ours(reader, run):
    foreign = []
    for libver in ("earliest", ("v108", "v108"), "latest"):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w", libver=libver) as file:
            file["x"], file["y"] = np.ones((2, 5), np.float32), np.array([0, 1], np.int32)
        foreign.append(buffer.getvalue())
    records = list(READERS[reader](hdf5.encode(run) + b"".join(foreign)))
    assert isinstance(records[0], Run)
    assert [len(block) for block in records[1:]] == [2, 2, 2]
    assert records[1].y.dtype == np.int64


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("missing", [1, 100, 1500])
def test_a_cut_stream_yields_what_was_whole_and_then_says_so(reader, missing):
    data = hdf5.encode(block_of(3)) + hdf5.encode(block_of(4))
    records = READERS[reader](data[:-missing])
    assert len(next(records)) == 3
    with pytest.raises(StreamBroken):
        next(records)


@pytest.mark.parametrize("reader", READERS)
def test_garbage_is_named(reader):
    for start, word in [(b"\xff\xd8\xff\xe0" + b"0" * 99, "JPEG"), (b"hello " * 20, "68 65 6c"), (b"", "empty")]:
        with pytest.raises(DataError, match=word):
            next(READERS[reader](start))


def test_a_pipes_record_is_bounded_before_it_is_read():
    data = hdf5.encode(block_of(4000))
    with pytest.raises(DataError, match="max-record"):
        next(piped(data, max_record_bytes=1000))
    promise = bytearray(data[:64])
    promise[28:36] = (1 << 50).to_bytes(8, "little")
    with pytest.raises(DataError, match=str(1 << 50)):
        next(piped(bytes(promise)))


def test_a_files_block_stays_on_disk_until_it_is_sliced(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(hdf5.encode(block_of(3, 1)) + hdf5.encode(block_of(500, 2)))
    first, second = stream.open_records(path)
    assert not isinstance(second.x, np.ndarray)
    pieces = list(second.slices(200))
    assert [len(piece) for piece in pieces] == [200, 200, 100]
    assert isinstance(pieces[0].x, np.ndarray)
    assert float(pieces[2].x[0, 0]) == 2
    assert float(first.x[0][0]) == 1
    assert second.take(np.array([5, 1, 5])).x.shape == (3, 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputMissing, match=r"nothing\.h5"):
        stream.open_records(tmp_path / "nothing.h5")
