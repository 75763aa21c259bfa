"""Exported C programs: they train to the bits of training in Python, say what is wrong, and lose nothing."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, Head, Plan, Run
from stages.artifacts.stream import open_records
from stages.bare_metal.live_file import marks_of, read_live, trained
from stages.bare_metal.program import Programming, Source, make_program, ram_of, source_of
from stages.bare_metal.samples import Batched, batches, made_up, model_input
from stages.bare_metal.trial import try_program
from stages.engines.native.library import aligned_bytes, inspect
from stages.engines.native.lowering import NotCovered
from stages.errors import DataError, UsageError
from stages.graphs.updates import every_layer
from stages.models.deploy import deploy
from stages.planning.baselines import named_plan
from stages.training.optimizers import Optimizing
from tests.test_exporting import record, with_head

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("make") is None or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="no C compiler or no make",
)


def run_of(arch: str, plan: str | None = None, kind: str = "linear", keep_bits: int = 32) -> Run:
    """A run of a small architecture with a head of three classes and a named plan, or every layer."""
    model = with_head(record(arch, "deploy"), kind)
    graph = deploy(model).graph
    if plan is None:
        return Run(model)
    updates = every_layer(graph) if plan == "full" else named_plan(plan, graph)
    return Run(model, plan=Plan(plan, tuple(updates), 0, "saved", 0, {"keep_bits": keep_bits}))


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of(run_of("mcunet-5fps", "last-3"), same_bits=True)


# ------------------------------------------------------------------------------------------------------ the same bits

CASES: dict[str, tuple[str, str | None, Programming]] = {
    "pictures, in place": ("mcunet-5fps", "last-4", Programming()),
    "Adam in place": (
        "mobilenetv2",
        "last-3",
        Programming(optimizing=Optimizing(optimizer="adam", learning_rate=1e-3)),
    ),
    "batches of more than a lot, limited": (
        "proxyless-w0.3",
        "last-2",
        Programming(batch=6, optimizing=Optimizing(momentum=0.9, weight_decay=0.01, clip_norm=0.5, learning_rate=0.01)),
    ),
    "sound, batches within a lot": ("ds-cnn", "full", Programming(batch=3)),
    "signals, the head alone": ("cnn1d", None, Programming()),
    "features": ("mlp", "last-1", Programming(optimizing=Optimizing(optimizer="adamw", weight_decay=0.1))),
}


@NEEDS_COMPILER
@pytest.mark.parametrize("case", CASES)
def test_a_program_ends_with_the_bits_of_training_in_python(case: str) -> None:
    arch, plan, how = CASES[case]
    made_from = source_of(run_of(arch, plan), same_bits=True)
    lots = list(made_up(made_from, 3 * how.batch + how.batch // 2, how.batch, np.random.default_rng(1)))
    trial = try_program(make_program(made_from, how).files, made_from, how.optimizing, lots)
    assert trial.largest_difference == 0
    assert trial.right == trial.samples == sum(len(lot.rows) for lot in lots)
    assert trial.updates == len(lots) >= 3


@NEEDS_COMPILER
@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_in_8_bits_are_drawn_as_in_python(batch: int) -> None:
    made_from = source_of(run_of("ds-cnn", "full", keep_bits=8), same_bits=True)
    assert any(step.kind == "pack" for step in made_from.lowering.suffix)
    how = Programming(batch=batch)
    lots = list(made_up(made_from, 3 * batch, batch, np.random.default_rng(1)))
    assert try_program(make_program(made_from, how).files, made_from, how.optimizing, lots).largest_difference == 0


@NEEDS_COMPILER
def test_the_comparison_sees_another_learning_rate(source: Source) -> None:
    how = Programming()
    other = replace(how.optimizing, learning_rate=how.optimizing.learning_rate * 1.0001)
    lots = list(made_up(source, 3, 1, np.random.default_rng(1)))
    assert try_program(make_program(source, how).files, source, other, lots).largest_difference > 0


@pytest.mark.parametrize("arch", ["mcunet-5fps", "ds-cnn", "cnn1d", "mlp", "resnet18", "mobilenetv3-small"])
@pytest.mark.parametrize("plan", ["full", "last-1"])
def test_the_room_for_a_piece_of_the_gradient_is_what_the_library_asks_for(arch: str, plan: str) -> None:
    made_from = source_of(run_of(arch, plan))
    sizes = inspect(aligned_bytes(made_from.image))
    assert made_from.lowering.piece_floats == sizes.piece > 0


def test_memory_is_said_by_part(source: Source) -> None:
    lowering, head = source.lowering, source.head_values.size
    small, large = (
        ram_of(source, how) for how in (Programming(), Programming(batch=8, optimizing=Optimizing(optimizer="adam")))
    )
    assert small["arena"] == large["arena"] == lowering.arena_bytes
    assert small["gradient"] == 4 * lowering.piece_floats < large["gradient"] == 8 * lowering.live_floats
    assert (small["optimiser"], large["optimiser"]) == (0, 8 * lowering.live_floats)
    assert (small["head"], large["head"]) == (8 * head, 16 * head)


# ------------------------------------------------------------------------------------------------------------ samples


def test_samples_are_bytes_of_the_models_size_with_weights_and_ends(source: Source) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    block = Block(x, np.array([0, 1, 2, 1, 0]), "NHWC", columns={"weight": np.arange(5, dtype=np.float32)})
    lots = list(batches([block], source, 3))
    assert [lot.rows.tolist() for lot in lots] == [[0, 1, 2], [1, 0]]
    data = b"".join(lot.encode() for lot in lots)
    size = 12 + 32 * 32 * 3
    assert len(data) == 5 * size
    heads = [struct.unpack_from("<ifi", data, number * size) for number in range(5)]
    assert heads == [(0, 0.0, 0), (1, 1.0, 0), (2, 2.0, 1), (1, 3.0, 0), (0, 4.0, 1)]
    assert data[12:size] == x[0].tobytes()
    np.testing.assert_array_equal(model_input(lots[0].values, source.backbone.input), lots[0].batch(source).x)


def test_samples_without_weights_share_them_and_larger_pictures_shrink_to_bytes(source: Source) -> None:
    block = Block(np.full((2, 64, 64, 3), 7, np.uint8), np.array([0, 1]), "NHWC")
    (lot,) = batches([block], source, 8)
    assert lot.weights.tolist() == [0.5, 0.5]
    assert lot.values.shape == (2, 32, 32, 3)
    assert (lot.values == 7).all()


def test_what_the_program_makes_of_bytes_is_the_models_input(source: Source) -> None:
    from stages.models.inputs import adapt

    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model_input(x, source.backbone.input), adapt(x, "NHWC", source.backbone.input))


def test_pictures_of_floats_are_refused(source: Source) -> None:
    block = Block(np.zeros((1, 32, 32, 3), np.float32), np.array([0]), "NHWC")
    with pytest.raises(DataError, match="pictures of float32, expected uint8"):
        list(batches([block], source, 1))


# ------------------------------------------------------------------------------------------------------- what is left


def slot(source: Source, number: int, values: np.ndarray[Any, Any]) -> bytes:
    """A save, written here on its own."""
    words = struct.pack("<7I", *marks_of(source), number, 0)
    data = values.astype("<f4").tobytes()
    return words + struct.pack("<I", zlib.crc32(words + data)) + data


@pytest.fixture(scope="module")
def saved(source: Source) -> bytes:
    """Two saves: the second, in the first slot, is the last."""
    count = source.lowering.live_floats + source.head_values.size
    return slot(source, 2, np.full(count, 2.0)) + slot(source, 1, np.full(count, 1.0))


def test_the_last_save_counts(source: Source, saved: bytes) -> None:
    found = read_live(saved, source, "live.bin")
    assert found.number == 2
    assert (found.live == 2).all()
    assert found.head.size == source.head_values.size


def test_a_save_that_power_cut_leaves_the_one_before(source: Source, saved: bytes) -> None:
    half = len(saved) // 2
    for kept in (0, 20, 40, half - 4):
        torn = saved[:kept] + bytes(half - kept) + saved[half:]
        assert read_live(torn, source, "live.bin").number == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "nothing saved by an exported program"),
        (lambda data: b"RIFF" + data[4:], "nothing saved"),
        (lambda data: data[:4] + b"\0\0\0\0" + data[8:], "live values of another plan"),
        (lambda data: data[:8] + b"\0\0\0\0" + data[12:], "of another model"),
        (lambda data: data[:16] + b"\0\0\0\0" + data[20:], "a head of other classes"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[:400] + bytes([data[400] ^ 16]) + data[401:], "damaged"),
        (lambda data: data[:20] + b"\7" + data[21:], "damaged"),
    ],
)
def test_other_files_are_refused_by_what_is_wrong(
    source: Source, saved: bytes, change: Callable[[bytes], bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_live(change(saved[: len(saved) // 2]), source, "live.bin")


def test_values_go_back_where_they_came_from(source: Source) -> None:
    run = run_of("mcunet-5fps", "last-3")
    live = np.random.default_rng(0).standard_normal(source.lowering.live_floats).astype(np.float32)
    head = np.arange(source.head_values.size, dtype=np.float32)
    count = source.lowering.live_floats
    found = read_live(slot(source, 5, np.concatenate([live, head])), source, "live.bin")
    back = trained(run, source, found)
    again = source_of(back)
    assert back.model.version == run.model.version + 5
    changed = [name for name, value in back.model.tensors.items() if not np.array_equal(value, run.model.tensors[name])]
    assert {name.rpartition(".")[0] for name in changed} == {update.layer for update in source.updates}
    recipes = source.lowering.live  # what lies where among the live values
    for at, recipe in recipes:
        values = np.ravel(recipe(back.model.tensors))
        mine = live[at : at + values.size]
        assert (np.isin(values, mine) | (values == 0)).all()
    assert again.head_values.tolist() == head.tolist()
    assert count > 0


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_a_head_must_know_its_classes() -> None:
    run = run_of("mlp", "last-1")
    head = run.model.head
    assert isinstance(head, Head)
    with pytest.raises(UsageError, match="no head, expected the classes"):
        source_of(replace(run, model=replace(run.model, head=None)))
    known = np.array([True, False, True])
    with pytest.raises(UsageError, match="class b was never seen"):
        source_of(replace(run, model=replace(run.model, head=replace(head, known=known))))


def test_prototypes_become_rows_that_decide_alike() -> None:
    run = run_of("mlp", "last-1", kind="prototypes")
    made_from = source_of(run)
    x = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    features = made_from.backbone.features(x)
    from stages.models.heads import logits

    assert run.model.head is not None
    np.testing.assert_array_equal(
        logits(made_from.head, features).argmax(1), logits(run.model.head, features).argmax(1)
    )


def test_a_board_that_is_too_small_is_refused_with_the_figures(source: Source) -> None:
    need = sum(ram_of(source, Programming()).values()) + 16384
    assert make_program(source, Programming(ram_bytes=need)).ram_bytes == need - 16384
    with pytest.raises(UsageError, match=rf"--ram: {need:,} bytes .*arena .*, expected at most {need - 1:,}"):
        make_program(source, Programming(ram_bytes=need - 1))
    with pytest.raises(UsageError, match=r"--flash: .* of constant data, expected at most 1,000"):
        make_program(source, Programming(flash_bytes=1000))


def test_a_model_without_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.engines.native import lowering

    monkeypatch.setattr(lowering, "uncovered", lambda graph: "operator here: kind 'there'")
    with pytest.raises((NotCovered, UsageError), match="here"):
        source_of(run_of("mlp", "last-1"))


def test_rates_that_change_are_refused() -> None:
    with pytest.raises(UsageError, match="a constant one"):
        Programming(optimizing=Optimizing(schedule="step"))


# ---------------------------------------------------------------------------------------------- as a user would use it


def edgetrain(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "edgetrain_cli", *words], cwd=folder, capture_output=True, check=False)
    said = done.stderr.decode()
    assert done.returncode == code, said
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a stream of single samples, and the exported and built program in `program`."""
    folder = tmp_path_factory.mktemp("bare")
    run = run_of("mcunet-5fps", "last-3")
    x = np.random.default_rng(3).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    y = np.arange(7) % 3
    (folder / "run.h5").write_bytes(encode(run))
    names = ("a", "b", "c")
    blocks = [Block(x[i : i + 1], y[i : i + 1], "NHWC", names=names) for i in range(7)]
    (folder / "stream.h5").write_bytes(encode(run) + b"".join(encode(block) for block in blocks))
    (folder / "samples.h5").write_bytes(b"".join(encode(block) for block in blocks))
    edgetrain(folder, "export", "run.h5", "--format", "c", "--samples", "samples.h5", "-o", "program")
    if shutil.which("make"):
        subprocess.run(["make", "-s", "-j2", "-C", folder / "program", "BITS=same", "CFLAGS=-O0"], check=True)
    return folder


def network(folder: Path, *words: str, stdin: bytes | None = None, code: int = 0) -> tuple[str, str]:
    program = folder / "program"
    data = (program / "samples.bin").read_bytes() if stdin is None else stdin
    done = subprocess.run([program / "network", *words], input=data, capture_output=True, cwd=program, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout.decode(), done.stderr.decode()


@NEEDS_COMPILER
def test_there_and_back_gives_the_run_that_training_in_python_gives(folder: Path) -> None:
    out, _ = network(folder, "train", "there.bin")
    assert [line.split(":")[0] for line in out.splitlines()] == [f"update {n}" for n in range(1, 8)]
    said = edgetrain(folder, "import", "--trained", "program/there.bin", "run.h5", "-o", "back.h5")
    assert "live values of save 1, and the head's 3 classes" in said
    edgetrain(folder, "train-sparse", "stream.h5", "--same-bits", "--clip", "0", "-q", "-o", "python.h5")
    back, python = (next(open_records(folder / name)) for name in ("back.h5", "python.h5"))
    assert isinstance(back, Run)
    assert isinstance(python, Run)
    for name, value in python.model.tensors.items():
        np.testing.assert_array_equal(value, back.model.tensors[name])
    assert back.model.head is not None
    assert python.model.head is not None
    np.testing.assert_array_equal(back.model.head.weight, python.model.head.weight)
    np.testing.assert_array_equal(back.model.head.bias, python.model.head.bias)
    assert back.history[-1].command == "import"


@NEEDS_COMPILER
def test_training_in_two_goes_is_training_in_one(folder: Path) -> None:
    samples = (folder / "program" / "samples.bin").read_bytes()
    cut = 3 * len(samples) // 7
    network(folder, "train", "one.bin")
    network(folder, "train", "two.bin", stdin=samples[:cut])
    network(folder, "train", "two.bin", stdin=samples[cut:])
    network(folder, "train", "often.bin", "2")
    made_from = source_of(next(open_records(folder / "run.h5")))  # type: ignore[arg-type]
    one, two, often = (
        read_live((folder / "program" / name).read_bytes(), made_from, name)
        for name in ("one.bin", "two.bin", "often.bin")
    )
    assert (one.number, two.number, often.number) == (1, 2, 4)
    for other in (two, often):
        np.testing.assert_array_equal(one.live, other.live)
        np.testing.assert_array_equal(one.head, other.head)


@NEEDS_COMPILER
def test_the_program_says_what_is_wrong_and_keeps_what_was_saved(folder: Path) -> None:
    samples = (folder / "program" / "samples.bin").read_bytes()
    one = len(samples) // 7
    network(folder, "train", "kept.bin")
    before = (folder / "program" / "kept.bin").read_bytes()
    wrong = struct.pack("<i", 3) + samples[4:one]
    unfinished = samples[:8] + struct.pack("<i", 0) + samples[12:one]
    for stdin, message in (
        (samples[: one - 5], "the last one is cut off"),
        (samples[: one + 5], "the last one is cut off"),
        (wrong, "a class that this network does not have"),
        (unfinished, "a batch larger than ET_NET_BATCH"),
    ):
        _, said = network(folder, "train", "kept.bin", stdin=stdin, code=65)
        assert message in said
        assert (folder / "program" / "kept.bin").read_bytes() == before
    (folder / "program" / "bad.bin").write_bytes(before[:-50] + b"?" * 50)
    _, said = network(folder, "train", "bad.bin", code=65)
    assert "of another network, head or plan, or damaged" in said
    _, said = network(folder, "predict", "missing.bin", code=66)
    assert "no such file" in said
    _, said = network(folder, "fly", code=2)
    assert "usage: predict" in said
    _, said = network(folder, "train", "missing/live.bin", code=74)
    assert "cannot be written" in said


@NEEDS_COMPILER
def test_a_save_that_was_torn_leaves_the_one_before(folder: Path) -> None:
    program = folder / "program"
    network(folder, "train", "torn.bin", "4")  # saves 1 (slot 1) and 2 (slot 0)
    data = (program / "torn.bin").read_bytes()
    half = len(data) // 2
    (program / "torn.bin").write_bytes(data[: half - 100] + bytes(100) + data[half:])
    made_from = source_of(next(open_records(folder / "run.h5")))  # type: ignore[arg-type]
    assert read_live((program / "torn.bin").read_bytes(), made_from, "torn.bin").number == 1
    network(folder, "predict", "torn.bin")
    network(folder, "train", "torn.bin")
    assert read_live((program / "torn.bin").read_bytes(), made_from, "torn.bin").number == 2


def test_export_takes_only_folders_of_its_own(folder: Path) -> None:
    assert "a folder for the sources" in edgetrain(folder, "export", "run.h5", "--format", "c", code=2)
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "thesis.tex").write_text("")
    assert "a folder with other files" in edgetrain(folder, "export", "run.h5", "--format", "c", "-o", "mine", code=73)
    assert "run.h5: a file" in edgetrain(folder, "export", "run.h5", "--format", "c", "-o", "run.h5", code=73)
    assert [path.name for path in (folder / "mine").iterdir()] == ["thesis.tex"]
    said = edgetrain(folder, "export", "run.h5", "--format", "c", "-o", "program")
    assert "RAM" in said
    said = edgetrain(folder, "export", "run.h5", "--format", "c", "-o", "small", "--ram", "64KB", code=2)
    assert "of RAM are needed: arena" in said
    assert not (folder / "small").exists()
    assert "with another format" in edgetrain(folder, "export", "run.h5", "--check", "-o", "model.pth", code=2)


def test_import_takes_only_what_this_runs_program_left(folder: Path) -> None:
    (folder / "other.bin").write_bytes(bytes(100))
    said = edgetrain(folder, "import", "--trained", "other.bin", "run.h5", "-o", "no.h5", code=65)
    assert "other.bin: nothing saved by an exported program, expected what this run's exported program left" in said
    assert "without a run" in edgetrain(folder, "import", "--trained", "other.bin", "-o", "no.h5", code=2)
    assert not (folder / "no.h5").exists()


def test_batched_is_what_it_says() -> None:
    lot = Batched(np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert lot.encode() == b""
