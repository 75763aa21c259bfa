"""The graph in an artifact: what was written is read, and whatever else lies there is refused, by name and at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.artifacts.codec import text_array
from stages.artifacts.records import Array, Group, InputSpec, Model
from stages.errors import DataError, SchemaError
from stages.graphs.graph import Graph
from stages.graphs.record import MOST_OPERATORS, graph_tree, read_graph
from stages.models.deploy import deploy
from stages.operators import TABLE, Op
from tests.operators.examples import EXAMPLES, alone

Row = dict[str, Any]

ROWS: tuple[Row, ...] = (
    {"name": "input", "kind": "input", "inputs": [], "shape": [3, 8, 8]},
    {
        "name": "conv", "kind": "conv", "inputs": ["input"], "shape": [4, 8, 8], "kernel": [3, 3], "stride": [1, 1],
        "padding": [1, 1], "dilation": [1, 1], "bias": True, "block": 0,
    },
    {"name": "relu", "kind": "relu", "inputs": ["conv"], "shape": [4, 8, 8]},
    {"name": "sum", "kind": "add", "inputs": ["relu", "conv"], "shape": [4, 8, 8]},
    {"name": "norm", "kind": "groupnorm", "inputs": ["sum"], "shape": [4, 8, 8], "groups": 2, "eps": 1e-5},
    {"name": "pool", "kind": "mean", "inputs": ["norm"], "shape": [4], "axes": [1, 2], "keepdim": False},
    {"name": "fc", "kind": "linear", "inputs": ["pool"], "shape": [4], "bias": True},
    {"name": "again", "kind": "linear", "inputs": ["fc"], "shape": [4], "bias": True, "shares": "fc"},
)  # fmt: skip
"""A small graph as its rows."""


def tree(rows: Any, blocks: tuple[str, ...] = ("blocks.00",)) -> Group:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return Group(arrays={"operator": text_array(texts), "block": text_array(list(blocks))})


def changed(number: int, **facts: Any) -> list[Row]:
    """The rows with some facts of one changed; `...` takes a fact away."""
    rows = [dict(row) for row in ROWS]
    rows[number] = {key: value for key, value in {**rows[number], **facts}.items() if value is not ...}
    return rows


@contextmanager
def at_once() -> Iterator[None]:
    """Within a second of the processor's time, whatever else the machine does."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 1


def refused(rows: Any, found: str = "") -> None:
    read = tree(rows)
    with at_once(), pytest.raises(SchemaError, match=found) as caught:
        read_graph(read)
    assert caught.value.exit_code == 65
    assert "/model/graph" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_the_rows_are_a_graph() -> None:
    graph = read_graph(tree(ROWS))
    assert [op.name for op in graph.ops] == [row["name"] for row in ROWS]
    assert graph["conv"].in_shapes == ((3, 8, 8),)
    assert graph.blocks == ("blocks.00",)
    assert read_graph(graph_tree(graph)) == graph


BEFORE = "operators that stand before it"

HOSTILE: dict[str, tuple[Any, str]] = {
    "a forward reference": (changed(2, inputs=["sum"]), BEFORE),
    "itself": (changed(2, inputs=["relu"]), BEFORE),
    "an unknown input": (changed(2, inputs=["nothing"]), BEFORE),
    "inputs that are no list": (changed(2, inputs="conv"), BEFORE),
    "an input that is no name": (changed(2, inputs=[["conv"]]), BEFORE),
    "an input too many": (changed(2, inputs=["conv", "conv"]), "2 inputs"),
    "an input too few": (changed(3, inputs=["conv"]), "1 inputs"),
    "an unknown kind": (changed(2, kind="relu7"), "relu7.*docs/operators.md.*newer"),
    "a kind that is no name": (changed(2, kind=["relu"]), "kind"),
    "a name twice": (changed(2, name="conv"), "name 'conv'"),
    "no name": (changed(2, name=""), "name ''"),
    "a name with a slash": (changed(2, name="a/b"), "name 'a/b'"),
    "a long name": (changed(2, name="x" * 201), "name"),
    "a name that is no text": (changed(2, name=7), "name 7"),
    "a shape that lies": (changed(2, shape=[4, 8, 7]), r"relu: shape \(4, 8, 7\), expected \(4, 8, 8\)"),
    "a shape of another rank": (changed(5, shape=[4, 1]), "shape"),
    "a size of zero": (changed(2, shape=[4, 0, 8]), "sizes above 0"),
    "a negative size": (changed(0, shape=[3, -8, 8]), "sizes above 0"),
    "a size that is no number": (changed(2, shape=["4", 8, 8]), "sizes above 0"),
    "a size that is true": (changed(2, shape=[True, 8, 8]), "sizes above 0"),
    "a shape that is no list": (changed(2, shape=4), "sizes above 0"),
    "a huge input": (changed(0, shape=[3, 2**20, 2**20]), "at most"),
    "a size beyond all numbers": (changed(0, shape=[10**400, 8, 8]), "at most"),
    "very many axes": (changed(0, shape=[1] * 9), "sizes above 0"),
    "a huge weight": (changed(6, shape=[2**31 - 1]), "1 to"),
    "a huge kernel": (changed(1, kernel=[10**9, 10**9]), "conv"),
    "a huge padding": (changed(1, padding=[10**12, 1]), "whole numbers"),
    "a stride of zero": (changed(1, stride=[0, 1]), "stride"),
    "a negative stride": (changed(1, stride=[-1, 1]), "stride"),
    "a stride that is true": (changed(1, stride=[True, 1]), "whole numbers"),
    "no stride": (changed(1, stride=...), "conv"),
    "groups that do not divide": (changed(1, groups=3), "groups"),
    "groups of zero": (changed(1, groups=0), "groups"),
    "an attribute of another kind": (changed(2, kernel=[3, 3]), "'kernel', expected an attribute of relu"),
    "an unknown attribute": (changed(2, wanted=1), "'wanted'"),
    "an attribute missing": (changed(4, eps=...), "eps"),
    "an attribute that is not finite": (changed(4, eps=float("nan")), "eps"),
    "an infinite attribute": (changed(4, eps=float("inf")), "eps"),
    "a negative eps": (changed(4, eps=-1.0), "eps"),
    "a block that is not there": (changed(2, block=1), "block 1"),
    "a block that is no number": (changed(2, block=0.0), "block"),
    "tensors of nobody": (changed(7, shares="nobody"), "nobody"),
    "tensors of a later one": (changed(6, shares="again"), "again"),
    "tensors of itself": (changed(7, shares="again"), "again"),
    "tensors of another kind": (changed(7, shares="conv"), "conv"),
    "tensors of another shape": (changed(7, bias=False), "shares"),
    "tensors shared by what has none": (changed(4, shares="norm"), "shares"),
    "two inputs": (changed(2, kind="input", inputs=[], shape=[4, 8, 8]), "one input"),
    "no input first": (ROWS[1:], BEFORE),
    "a map at the end": (ROWS[:4], "feature vector"),
    "one operator": (ROWS[:1], "1 operators"),
    "none": ([], "operator"),
    "no JSON": ([ROWS[0], "{"], "as JSON"),
    "a list": ([ROWS[0], "[1, 2]"], "as JSON"),
    "a number": ([ROWS[0], "7"], "as JSON"),
    "nothing": ([ROWS[0], "null"], "as JSON"),
    "deep JSON": ([ROWS[0], "[" * 100_000], "as JSON"),
    "a deep value": ([ROWS[0], '{"name": ' + "[" * 100_000 + "]" * 100_000 + "}"], "as JSON"),
    "a number of many digits": ([ROWS[0], '{"name": ' + "9" * 5000 + "}"], "as JSON"),
    "very many operators": (["{}"] * 1_000_000, "at most"),
    "a long attribute": (changed(5, axes=[1] * 100_000), "axes"),
    "very long rows": ([ROWS[0], {"name": "x" * 10_000_000}, *[{}] * 3], "at most"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_graph_is_refused(case: str) -> None:
    rows, found = HOSTILE[case]
    refused(rows, found)


def test_features_that_no_input_changes_are_refused() -> None:
    constant = {"name": "c", "kind": "constant", "inputs": [], "shape": [4]}
    relu = {"name": "r", "kind": "relu", "inputs": ["c"], "shape": [4]}
    refused([ROWS[0], constant, relu], "r does not depend on the input")
    refused([ROWS[0], constant], "c does not depend on the input")


@pytest.mark.parametrize("array", [np.zeros(3), np.array([[b"{}"]]), np.array("x", "U4"), np.zeros(0, "S1")], ids=str)
def test_rows_that_are_no_texts_are_refused(array: Array) -> None:
    with pytest.raises(SchemaError):
        read_graph(Group(arrays={"operator": array}))
    with pytest.raises(SchemaError):
        read_graph(Group())


def test_ten_thousand_operators_are_read() -> None:
    long = [
        {"name": f"r{i}", "kind": "relu", "inputs": [f"r{i - 1}" if i else "input"], "shape": [4]}
        for i in range(10_000)
    ]
    assert MOST_OPERATORS > 10_000
    assert len(read_graph(tree([{**ROWS[0], "shape": [4]}, *long])).ops) == 10_001


WORDS: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 0.5, "", "x", [], [0], [-1, 2], [1.5], ["a"], [[1]], {}, {"a": 1}, [True], float("nan"),
)  # fmt: skip
"""Values of every wrong type."""


@pytest.mark.parametrize("kind", TABLE)
def test_an_attribute_of_a_wrong_type_is_refused(kind: str) -> None:
    """Each attribute of each kind, with values of all types: read and equal to a valid graph, or refused."""
    example = next(example for example in EXAMPLES if example.op.kind == kind)
    graph = alone(example, 1, scales=False).graph if example.op.inputs else read_graph(tree(ROWS))
    rows = [json.loads(bytes(row)) for row in graph_tree(graph).arrays["operator"]]
    number = next((i for i, op in enumerate(graph.ops) if op.kind == kind), 0)
    tried = 0
    for key in {*rows[number], *TABLE[kind].fields, *TABLE[kind].args, "shares", "frozen", "block"}:
        for word in WORDS:
            mutated = [dict(row) for row in rows]
            mutated[number][key] = word
            tried += outcome(lambda mutated=mutated: read_graph(tree(mutated)))
    assert tried > 10


def outcome(call: Callable[[], Any]) -> bool:
    """Whether a call was refused as it should; another exception is none of that."""
    try:
        call()
    except DataError:  # and SchemaError, which is one: exit code 65
        return True
    return False


def test_both_errors_exit_with_65() -> None:
    assert SchemaError.exit_code == DataError.exit_code == 65
    assert issubclass(SchemaError, DataError)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([*TABLE, "conv"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
keys = st.sampled_from(
    ["name", "kind", "inputs", "shape", "kernel", "stride", "padding", "dilation", "groups", "bias", "eps", "axes",
     "keepdim", "shares", "block", "frozen", "other"]
)  # fmt: skip
shapes = st.lists(st.integers(-1, 2**33), max_size=4)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(ROWS) - 1), keys, junk | shapes), min_size=1, max_size=4), st.data())
def test_mutated_rows_are_read_or_refused(mutations: list[tuple[int, str, Any]], data: st.DataObject) -> None:
    rows = [dict(row) for row in ROWS]
    for number, key, value in mutations:
        rows[number][key] = value
    order = data.draw(st.permutations(rows)) if data.draw(st.booleans()) else rows
    with at_once():
        outcome(lambda: graph_tree(read_graph(tree(order))))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, len(ROWS) - 1), st.integers(0, 200), st.binary(max_size=3))
def test_mutated_bytes_are_read_or_refused(number: int, at: int, bytes_in: bytes) -> None:
    texts = [json.dumps(row).encode() for row in ROWS]
    texts[number] = texts[number][:at] + bytes_in + texts[number][at + 1 :]
    outcome(lambda: read_graph(Group(arrays={"operator": np.array(texts), "block": text_array(["b"])})))


# ------------------------------------------------------------------------------------------------------------- tensors


def model(graph: Graph, tensors: dict[str, Array], shape: tuple[int, ...] = (3, 8, 8)) -> Model:
    return Model("x:y", {}, InputSpec("image", shape), "deploy", tensors, graph=graph_tree(graph))


def small() -> tuple[Graph, dict[str, Array]]:
    graph = read_graph(tree(ROWS))
    rng = np.random.default_rng(0)
    return graph, {
        f"{op.name}.{what}": rng.normal(size=shape).astype(np.float32)
        for op in graph.ops
        for what, shape in op.tensors.items()
    }


def test_tensors_that_fit_are_deployed() -> None:
    graph, tensors = small()
    assert set(tensors) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    assert deploy(model(graph, tensors)).graph == graph


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"fc.bias": None}, "fc.bias: missing"),
    "another shape": ({"conv.weight": np.zeros((4, 3, 3), np.float32)}, r"conv.weight: shape \(4, 3, 3\)"),
    "unknown": ({"more.weight": np.zeros(3, np.float32)}, "more.weight: not a tensor"),
    "another's": ({"again.weight": np.zeros((4, 4), np.float32)}, "again.weight: not a tensor"),
    "not a number": ({"fc.weight": np.full((4, 4), np.nan, np.float32)}, "fc.weight: a value that is not finite"),
    "infinite": ({"fc.weight": np.full((4, 4), np.inf, np.float32)}, "fc.weight: a value that is not finite"),
    "texts": ({"fc.weight": np.full((4, 4), b"x")}, "fc.weight"),
    "complex": ({"fc.weight": np.full((4, 4), 1j)}, "fc.weight"),
    "objects": ({"fc.weight": np.full((4, 4), None)}, "fc.weight"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_refused(case: str) -> None:
    graph, tensors = small()
    new, found = MISFITS[case]
    tensors = {name: value for name, value in {**tensors, **new}.items() if value is not None}
    with pytest.raises(DataError, match=found) as caught:
        deploy(model(graph, tensors))
    assert caught.value.exit_code == 65


def test_a_constant_may_be_infinite_but_not_undefined() -> None:
    graph, tensors = small()
    rows = [json.loads(bytes(row)) for row in graph_tree(graph).arrays["operator"]]
    rows.insert(2, {"name": "mask", "kind": "constant", "inputs": [], "shape": [8]})
    rows[4]["inputs"] = ["relu", "mask"]
    masked = read_graph(tree(rows))
    for value, fits in ((np.inf, True), (np.nan, False)):
        held = tensors | {"mask.value": np.full(8, value, np.float32)}
        assert outcome(lambda held=held: deploy(model(masked, held))) is not fits


def test_an_input_of_another_shape_is_refused() -> None:
    graph, tensors = small()
    with pytest.raises(DataError, match=r"\(3, 8, 8\).*\(3, 9, 9\)") as caught:
        deploy(model(graph, tensors, (3, 9, 9)))
    assert caught.value.exit_code == 65


def test_what_is_not_in_deploy_form_is_folded_or_refused() -> None:
    """A graph may hold a BatchNorm with statistics of any sign: a root of a negative one is not a number."""
    first = Op("input", "input", (), (4,))
    norm = Op("bn", "batchnorm", ("input",), (4,), ((4,),), args=(("axis", 0), ("eps", 1e-5)))
    graph = Graph((first, norm))
    tensors = {f"bn.{what}": np.full(4, -1.0, np.float32) for what in norm.tensors}
    record = replace(model(graph, tensors), form="batchnorm", input=InputSpec("features", (4,)))
    assert outcome(lambda: deploy(record))
    with pytest.raises(DataError):
        deploy(replace(record, form="deploy"))
