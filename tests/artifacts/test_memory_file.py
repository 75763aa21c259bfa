"""A file in memory behaves as `io.BytesIO` does."""

import io

from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts.memory_file import MemoryFile

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.binary(max_size=40)),
        st.tuples(st.just("read"), st.integers(0, 40)),
        st.tuples(st.just("seek"), st.integers(0, 120)),
        st.tuples(st.just("truncate"), st.integers(0, 80)),
    ),
    max_size=20,
)


def outcome(file, step):
    what, value = step
    if what == "read":
        buffer = bytearray(value)
        return file.readinto(buffer), bytes(buffer)
    if what == "truncate" and value > file.seek(0, io.SEEK_END):
        return None  # BytesIO does not grow
    return getattr(file, what)(value), file.tell() if what != "truncate" else None


@given(content=st.binary(max_size=60), room=st.integers(0, 100), steps=STEPS)
def test_every_step_ends_as_with_bytesio(content, room, steps):
    mine, oracle = MemoryFile(content, room=len(content) + 1 + room), io.BytesIO(content)
    for step in [*steps, ("seek", 0)]:
        assert outcome(mine, step) == outcome(oracle, step)
        assert bytes(mine.view()) == oracle.getvalue()


def test_growing_fills_with_zeros():
    file = MemoryFile(b"abc", room=64)
    file.seek(10)
    file.write(b"z")
    assert file.view() == b"abc" + bytes(7) + b"z"
    file.truncate(2)
    file.truncate(5)
    assert file.view() == b"ab" + bytes(3)
