"""docs/operators.md equals what the table says. `python tests/operators/test_page.py` writes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stages.engines.native.rules import refused, rule_of
from stages.operators import FAMILIES, TABLE, Op, Operator

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"
HEAD = """# Operators

Every kind of operator that a graph may hold, generated from the table (`python tests/operators/test_page.py`). `import`
turns the ATen calls of a model, or the nodes of an ONNX file, into these. A call that has no kind of its own and is a
pure function of each sample is `opaque`; what draws random numbers, mixes the samples of a batch or gives sizes that
depend on values is refused by name. How to add a kind: [CONTRIBUTING](../CONTRIBUTING.md). What the words mean:

* **MACs** of one forward pass of one sample; the gradient of each input that is needed costs as many, and so does that
  of a layer's weight. Where there are none, the reason.
* **Kept** for the backward pass where gradients pass, beside what live layers keep of their inputs (whole for output
  channels, the live channels for input channels, depthwise layers and scales; biases nothing). A whole value is kept
  once, however many operators need it; constants and views are not kept.
* **Layer**: its weights may train by a plan, by output or input channels; recurrent layers and embeddings by output
  channels alone (hidden units, features).
* **Native**: the native engine has it. A part: not along every axis or of every mode; the note of `--engine auto` names
  what it lacks. All kinds run and train in the torch engine.
* **ONNX** is what `export` writes (opset 17), **from ONNX** which nodes `import` reads so (opsets 11 to 21). GELU,
  SiLU, Mish, hardswish, LayerNorm and attention that a file holds in pieces are put together again.
"""


def first_sentence(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def macs(operator: Operator) -> str:
    if isinstance(operator.macs, str):
        return f"none: {operator.macs}"
    return first_sentence(inspect.getdoc(operator.macs))


class Recorder:
    """Notes the ONNX operators that a kind's rule writes."""

    def __init__(self, op: Op) -> None:
        self.found: list[str] = []
        self.tensors = {what: np.ones(shape, np.float32) for what, shape in op.tensors.items()}

    def node(self, kind: str, inputs: Any, output: Any, **attributes: Any) -> None:
        self.found.append(kind)

    def inputs(self, op: Any) -> list[str]:
        return [str(i) for i in range(len(op.inputs))]

    ranked_inputs = batched_inputs = inputs

    def array(self, key: str) -> Any:
        return self.tensors[key.rpartition(".")[2]]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **more: ["w"] if name == "weights" else name


def onnx(operator: Operator) -> str:
    from tests.operators.examples import EXAMPLES

    if operator.onnx is None:
        return "-"
    op = next(example.op for example in EXAMPLES if example.op.kind == operator.kind)
    recorder = Recorder(op)
    operator.onnx(op, recorder)
    return ", ".join(dict.fromkeys(recorder.found)) or "an initialiser"


def native(operator: Operator) -> str:
    """Whether the native engine runs all examples of a kind."""
    from tests.operators.examples import EXAMPLES

    refusals = []
    for example in EXAMPLES:
        if example.op.kind == operator.kind:
            rule = rule_of(example.op)
            refusals.append(rule is None or bool(refused(rule, example.op)))
    return "-" if all(refusals) else "a part" if any(refusals) else "yes"


def row(operator: Operator) -> str:
    calls = ", ".join(sorted({name.partition(".")[0] for name in operator.aten})) or "-"
    kept = first_sentence(inspect.getdoc(operator.keeps))
    layer = "layer" if operator.trains else ""
    read = ", ".join(operator.from_onnx) or "-"
    start = (f"`{operator.kind}`", operator.doc, macs(operator), kept, layer, native(operator))
    cells = (*start, onnx(operator), read, calls)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    lines = [HEAD]
    for module in FAMILIES:
        name = module.__name__.rpartition(".")[2]
        source = inspect.getsource(module)
        kinds = [operator for operator in TABLE.values() if registers(source, operator.kind)]
        lines += [
            f"## {name.capitalize()}",
            "",
            "| kind | computes | MACs | kept | plan | native | ONNX | from ONNX | from ATen |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|", *map(row, kinds), ""]
    return "\n".join(lines)


def registers(source: str, kind: str) -> bool:
    """Whether a module's source registers this kind."""
    return (
        f'(kind="{kind}"' in source
        or f'kind="{kind}",' in source
        or f'_unary(\n        "{kind}"' in source
        or f'_unary("{kind}"' in source
    )


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run `python tests/operators/test_page.py`"


def test_every_kind_is_on_the_page_once():
    text = page()
    assert all(text.count(f"| `{kind}` |") == 1 for kind in TABLE)
    assert len(TABLE) > 40


if __name__ == "__main__":
    PAGE.write_text(page())
