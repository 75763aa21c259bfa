"""Vision transformers on the device: BSR and Tri-Level E-ViT's tokens, costs and accuracy: docs/results/vit.md.

    python examples/reproduce/vit.py            # everything, about half an hour on 2 cores
    python examples/reproduce/vit.py --quick    # a small net, few tasks: does it still run?

Costs are those of DeiT-tiny (random weights: they do not depend on them) at 224 x 224 and batch 8, the contestants in
turn within each repeat; ratios are medians of the ratios within a repeat. Accuracy is that of a small transformer which
`pretrain-fsl` has trained on glyphs, on few-shot tasks of Omniglot from the folder that EDGETRAIN_DATA names, or
`shared` beside the repository; else of glyphs.
"""

# ruff: noqa: E402 - what a command sets up comes before numpy
from __future__ import annotations

from edgetrain_cli.libraries import import_numpy, keep_freed_memory

import_numpy()

import argparse
import platform
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from related import LETTERS, ROOT, in_turns, interval, ratio, tasks

from stages.artifacts.files import atomic_write
from stages.artifacts.records import Block, LayerUpdate, Model, Run
from stages.cost.model import forward_macs
from stages.cost.training import plan_backward_macs, saved_activation_bytes
from stages.data.synthetic import Glyphs, glyphs
from stages.dropping import with_drops
from stages.engines.choice import Engine, make_net
from stages.engines.parameter import Floats
from stages.errors import UsageError
from stages.fsl.protonet import cosine_logits
from stages.graphs.tokens import Drops
from stages.importing import Importing, import_model
from stages.methods.plans import TinyTrain
from stages.methods.scheduling import schedule_within, scheduling
from stages.methods.task import Task
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt_block
from stages.models.modules import Net, trainable
from stages.planning.baselines import named_plan
from stages.planning.schedules import kept_bytes
from stages.planning.shortcuts import residual_entries, with_detached
from stages.pretraining import STAGE, Pretraining, pretrain
from stages.training.adaptation import Adapting, adapt
from stages.training.optimizers import Optimizing
from stages.training.updates import features_of

BSR = Drops(blocks=(3, 6, 9), keep=0.5, fuse=True)
"""As published, with the plan `bsr` (blocks 3, 7 and 11)."""
TRI_LEVEL = Drops(blocks=(3, 6, 9), keep=0.7, fuse=False)
RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    side: int
    batch: int
    repeats: int
    epochs: int
    steps: int
    tasks: int
    tuning: int
    """Tasks on which each method's rate is chosen."""
    iterations: int = 40
    """Of adapting."""


FULL, QUICK = Size(224, 8, 7, 12, 100, 24, 6), Size(32, 1, 1, 1, 2, 2, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small net, few tasks and repeats")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone, to the terminal")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "results" / "vit.md")
    options = parser.parse_args()
    keep_freed_memory()  # as commands do
    size = QUICK if options.quick else FULL
    began = time.perf_counter()
    parts = [section(size) for name, section in SECTIONS.items() if options.only in (None, name)]
    minutes = (time.perf_counter() - began) / 60
    text = "\n\n".join([heading(size, minutes), *parts]) + "\n"
    if options.quick or options.only:
        print(text)
    else:
        atomic_write(options.out, text.encode())


def heading(size: Size, minutes: float) -> str:
    return f"""# Vision transformers: which blocks train, and how many tokens pass

Written by `make reproduce-vit`. {platform.machine()}, {torch.get_num_threads()} threads; {minutes:.0f} minutes. Times \
are ratios within one run. How it works: [planning.md](../planning.md)."""


# ------------------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Contestant:
    """A net and its plan."""

    backbone: Backbone
    updates: tuple[LayerUpdate, ...]
    module: Net
    """The same net in torch, in which what the plan names requires gradients."""
    per_sample_bytes: int | None = None
    """What a schedule of memory keeps; None where everything is kept."""

    def kept_bytes(self, batch: int) -> int:
        """Predicted."""
        if self.per_sample_bytes is not None:
            return batch * self.per_sample_bytes
        return saved_activation_bytes(self.backbone.graph, self.updates, batch)


SHARE = 0.65
"""Of what keeping everything takes: the budget of the rows with `--ram`."""


def within(one: Contestant) -> Contestant:
    """The same step in less memory: what is too much is made again."""
    made = scheduling(one.backbone, one.updates)
    schedule = schedule_within(made, int(SHARE * made.allocated({})))
    engine = replace(one.backbone.engine, how=tuple(sorted(schedule.how.items())))
    kept = kept_bytes(made.chain, schedule.how)
    return replace(one, backbone=replace(one.backbone, engine=engine), per_sample_bytes=kept)


def costs(size: Size) -> str:
    """Time, bytes and MACs of a step: full training, BSR's blocks, its drops, both; a constant share of tokens."""
    plain = import_model(Importing(arch="vit-tiny", arch_args={"size": size.side}))
    runs = {"": plain, "BSR's drops": with_drops(plain, BSR), "0.7 of the tokens": with_drops(plain, TRI_LEVEL)}
    named = {
        "everything": ("", "full", "exact"),
        "blocks 3, 7, 11": ("", "bsr", "exact"),
        "everything, BSR's drops": ("BSR's drops", "full", "exact"),
        "**BSR**: both": ("BSR's drops", "bsr", "exact"),
        "BSR, gradients past frozen blocks": ("BSR's drops", "bsr", "shortcut"),
        "everything, 0.7 of the tokens": ("0.7 of the tokens", "full", "exact"),
    }
    who = {name: contestant(runs[model], plan, gradient) for name, (model, plan, gradient) in named.items()}
    who |= {f"{name}, `--ram`": within(who[name]) for name in ("everything", "**BSR**: both")}
    x = np.random.default_rng(0).standard_normal((size.batch, 3, size.side, size.side)).astype(np.float32)
    bodies: dict[str, Callable[[], object]] = {}
    for name, one in who.items():
        bodies[f"{name}/engine"] = engine_step(one, x)
        if "past" not in name and "ram" not in name:
            bodies[f"{name}/stock"] = stock_step(one, x)
    seconds = in_turns(bodies, size.repeats, time.process_time)
    rows = [
        "| a step | time, engine | kept | forward MACs | backward MACs | engine over stock autograd: time, bytes |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    most = saved_activation_bytes(plain_graph(who), who["everything"].updates, size.batch)
    for name, one in who.items():
        graph = one.backbone.graph
        predicted = one.kept_bytes(size.batch)
        measured = engine_bytes(one, x)
        if measured != predicted:
            raise AssertionError(f"{name}: {measured} bytes kept, {predicted} predicted")
        beside, plain_name = "-", name.removesuffix(", `--ram`")
        if f"{plain_name}/stock" in bodies:
            share = predicted / stock_bytes(one, x)
            beside = f"{ratio(seconds, f'{name}/engine', f'{plain_name}/stock'):.2f}, {share:.2f}"
        rows.append(
            f"| {name} | {ratio(seconds, f'{name}/engine', 'everything/engine'):.2f} "
            f"| {predicted / 2**20:.1f} MiB, 1/{most / predicted:.1f} | {forward_macs(graph) / 1e9:.2f} G "
            f"| {plan_backward_macs(graph, one.updates) / 1e9:.2f} G | {beside} |"
        )
    return "\n".join(
        [
            f"## What a step costs (DeiT-tiny, {size.side} x {size.side}, batch {size.batch}, torch's engine)",
            "",
            *rows,
            "",
            "Processor time of prefix, forward and backward pass. Bytes kept between the forward and the backward pass "
            "are equal to the prediction, to the byte (the run ends otherwise); stock autograd's are all storages that "
            "it saves, parameters aside. Stock: the same graph and live layers through torch's autograd. `--ram`: at "
            f"{SHARE} of what keeping everything takes; gradients are the same, bit for bit.",
            "",
            native_line(plain, who, size),
        ]
    )


def plain_graph(who: Mapping[str, Contestant]) -> Any:
    return who["everything"].backbone.graph


def contestant(run: Run, plan: str, gradient: str) -> Contestant:
    backbone = replace(deploy(run.model), engine=Engine("torch"))
    updates = named_plan(plan, backbone.graph)
    if gradient == "shortcut":
        updates = with_detached(backbone.graph, updates, residual_entries(backbone.graph))
    module = trainable(run.model)
    live = {f"{update.layer}.{what}" for update in updates if update.trains for what in ("weight", "bias")}
    for name, value in module.values().items():
        value.requires_grad_(name in live)
    return Contestant(backbone, tuple(updates), module)


def engine_step(one: Contestant, x: Floats) -> Callable[[], None]:
    net = make_net(one.backbone, one.updates)

    def step() -> None:
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.full_like(features, 1e-3))

    return step


def stock_step(one: Contestant, x: Floats) -> Callable[[], None]:
    inputs = torch.from_numpy(x)

    def step() -> None:
        features = one.module(inputs)
        features.backward(torch.full_like(features, 1e-3))

    return step


def engine_bytes(one: Contestant, x: Floats) -> int:
    """What the engine keeps between the passes: every storage once, parameters aside."""
    net = make_net(one.backbone, one.updates)
    own = {parameter.value.ctypes.data for parameter in net.parameters()}
    boundary = net.prefix(x)
    return saved_bytes(lambda: net.forward(boundary), own)


def stock_bytes(one: Contestant, x: Floats) -> int:
    """What autograd saves: every storage once, parameters and the input aside."""
    inputs = torch.from_numpy(x)
    own = {value.untyped_storage().data_ptr() for value in (*one.module.state_dict().values(), inputs)}
    return saved_bytes(lambda: one.module(inputs), own)


def saved_bytes(forward: Callable[[], object], known: Set[int]) -> int:
    saved: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        forward()
    return sum(saved.values())


def native_line(run: Run, who: Mapping[str, Contestant], size: Size) -> str:
    """The native engine beside torch's at batch 1, where it is installed and covers the graph."""
    one = who["blocks 3, 7, 11"]
    try:
        native = deploy(run.model, engine="native")
    except UsageError:
        return "The native engine is not installed here."
    x = np.random.default_rng(1).standard_normal((1, 3, size.side, size.side)).astype(np.float32)
    bodies = {
        "native": engine_step(replace(one, backbone=native), x),
        "torch": engine_step(one, x),
    }
    seconds = in_turns(bodies, size.repeats, time.perf_counter)
    return (
        f"At batch 1 the native engine's step with blocks 3, 7, 11 live takes {ratio(seconds, 'native', 'torch'):.2f} "
        "of torch's. Nets that drop tokens run in torch's engine."
    )


# ---------------------------------------------------------------------------------------------------------- accuracy

SMALL = {"size": 28, "patch": 4, "width": 48, "heads": 3, "depth": 12, "channels": 1}


def accuracy(size: Size) -> str:
    """Few-shot tasks from a pretrained small ViT: BSR, the same blocks without drops, Fisher's blocks at BSR's cost."""
    run = pretrained(size)
    dropping = with_drops(run, BSR)
    nets = {"plain": deployed(run.model), "drops": deployed(dropping.model)}
    bsr_macs = plan_backward_macs(nets["drops"].graph, named_plan("bsr", nets["drops"].graph))
    by_fisher = TinyTrain(
        criterion="fisher", select="knapsack", unit="blocks", blocks=12, memory="1GB", macs=str(bsr_macs), bias=True
    )
    methods: dict[str, tuple[str, Planner]] = {
        "no training": ("plain", lambda backbone, task: ()),
        "no training, drops": ("drops", lambda backbone, task: ()),
        "everything": ("plain", named("full")),
        "everything, drops": ("drops", named("full")),
        "blocks 3, 7, 11": ("plain", named("bsr")),
        "BSR: both": ("drops", named("bsr")),
        "Fisher's blocks, drops, at BSR's cost": (
            "drops",
            lambda backbone, task: by_fisher(backbone, task, adapting(RATES[0]), np.random.default_rng(0)),
        ),
    }
    drawn = list(tasks(size.tasks + size.tuning))
    hits: dict[str, list[float]] = {}
    rates: dict[str, float] = {}
    shares: dict[str, list[float]] = {}
    for name, (which, planner) in methods.items():
        backbone = nets[which]
        scores = {
            rate: np.mean([one_task(backbone, planner, each, rate, size.iterations)[0] for each in drawn[size.tasks :]])
            for rate in (RATES if "no" not in name.split() else RATES[:1])
        }
        rates[name] = max(scores, key=lambda rate: scores[rate])
        done = [one_task(backbone, planner, each, rates[name], size.iterations) for each in drawn[: size.tasks]]
        hits[name], shares[name] = [hit for hit, _ in done], [macs for _, macs in done]
    whole = plan_backward_macs(nets["plain"].graph, named_plan("full", nets["plain"].graph))
    rows = [
        "| method | accuracy, % | minus everything | minus BSR | backward MACs | rate |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in methods:
        against = {
            other: interval([100 * (a - b) for a, b in zip(hits[name], hits[other], strict=True)])
            for other in ("everything", "BSR: both")
        }
        rows.append(
            f"| {name} | {100 * np.mean(hits[name]):.1f} | {against['everything']} | {against['BSR: both']} "
            f"| {np.mean(shares[name]) / whole:.2f} | {rates[name] if shares[name][0] else 0:g} |"
        )
    metrics = run.metrics[STAGE]["validation_accuracy"]
    source = "Omniglot" if LETTERS.is_file() else "glyphs"
    return "\n".join(
        [
            f"## Accuracy ({size.tasks} paired tasks of {source}, 5 classes, 5 shots)",
            "",
            f"The net: `vit-tiny` of width {SMALL['width']}, {SMALL['depth']} blocks, {SMALL['patch']} x "
            f"{SMALL['patch']} patches at {SMALL['size']} x {SMALL['size']}, trained by `pretrain-fsl --optimizer "
            f"adamw` on glyphs, {size.epochs} epochs of {size.steps} tasks ({100 * float(np.nanmax(metrics)):.1f} % on "
            "validation tasks). "
            f"Adapted in {size.iterations} iterations; the rate is the best of three on {size.tuning} other tasks, by "
            "method. Drops: half of the tokens at blocks 3, 6, 9, the others fused. Differences in points, with 95 % "
            "intervals.",
            "",
            *rows,
        ]
    )


Planner = Callable[[Backbone, Task], Sequence[LayerUpdate]]


def named(name: str) -> Planner:
    return lambda backbone, task: named_plan(name, backbone.graph)


def deployed(model: Model) -> Backbone:
    return replace(deploy(model), engine=Engine("torch"))


def pretrained(size: Size) -> Run:
    """A small ViT, meta-trained on glyphs."""
    run = import_model(Importing(arch="vit-tiny", arch_args=SMALL))
    data: Block = glyphs(Glyphs(size=SMALL["size"]))
    config = Pretraining(
        epochs=size.epochs, steps=size.steps, optimizer="adamw", weight_decay=0.05, lr=1e-3, warmup_epochs=0,
        ways=10, shots=3, queries=5, validation_tasks=40, validation_shots=3, validation_queries=3,
    )  # fmt: skip
    return pretrain(run, [data], config, seed=0)


def adapting(rate: float, iterations: int = 40) -> Adapting:
    return Adapting(iterations=iterations, learning_rates=(rate,), optimizing=Optimizing(optimizer="adam"))


def one_task(
    backbone: Backbone, planner: Planner, blocks: tuple[Block, Block], rate: float, iterations: int
) -> tuple[float, float]:
    """Share of right answers, and the plan's backward MACs."""
    support, query = blocks
    x, queries = (adapt_block(block, backbone.input) for block in (support, query))
    task = Task(support, x, support.y, queries, 5)
    updates = planner(backbone, task)
    how = adapting(rate if updates else 0.0, iterations)
    result = adapt(backbone, updates, x, support.y, how, np.random.default_rng(1))
    predicted = cosine_logits(features_of(result.net, queries), result.prototypes, how.scale).argmax(1)
    return float((predicted == query.y).mean()), float(plan_backward_macs(backbone.graph, updates)) if updates else 0.0


SECTIONS: Mapping[str, Callable[[Size], str]] = {"costs": costs, "accuracy": accuracy}


if __name__ == "__main__":
    main()
