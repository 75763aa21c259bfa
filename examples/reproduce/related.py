"""The systems named beside TinyTrain, each claim with the number that comes out here: docs/results/related.md.

    python examples/reproduce/related.py            # everything, about 20 minutes on 2 cores
    python examples/reproduce/related.py --quick    # few tasks and seeds: does it still run?

SCoTTi and NEq (settled channels), SliceOut (and turns), POET (schedules of memory), FracTrain (what is kept in 8 bits),
TinyTrain's plan made once against one that is searched for again. Contestants take turns within each repeat; ratios
are medians of the ratios within a repeat. Real weights and drawings come from the folder that EDGETRAIN_DATA names, or
`shared` beside the repository, where they are at hand; else there are glyphs and random weights.
"""

# ruff: noqa: E402 - what a command sets up comes before numpy
from __future__ import annotations

from edgetrain_cli.libraries import import_numpy, keep_freed_memory

import_numpy()

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np

from stages.artifacts.files import atomic_write
from stages.artifacts.records import Block, LayerUpdate, Model, Plan, Run
from stages.artifacts.stream import open_records
from stages.cost.model import full_backward_macs
from stages.cost.ops import macs
from stages.cost.training import live_values, saved_activation_bytes
from stages.data.synthetic import Glyphs, glyphs
from stages.engines.choice import Engine, make_net
from stages.engines.native.memory import memory_of
from stages.engines.native.net import NativeNet
from stages.engines.parameter import Floats
from stages.fsl.episodes import FixedShape, check_pool, draw_episodes, pool_of
from stages.fsl.protonet import cosine_logits, prototypes
from stages.importing import Importing, import_model, read_weights
from stages.methods.plans import TinyTrain, scheme_for
from stages.methods.revision import Revising
from stages.methods.scheduling import schedule_within, scheduling
from stages.methods.task import Task
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt_block
from stages.operators import Op
from stages.planning.baselines import named_plan
from stages.planning.links import chain_of
from stages.planning.policies import parse_policy, room_of, turns_of
from stages.planning.schedules import Costs, best_schedule, kept_bytes
from stages.sparse_training import STAGE, StreamTraining, SupportTraining, train_stream, train_support
from stages.training.adaptation import Adapting, adapt
from stages.training.optimizers import Optimizing, make_optimizer
from stages.training.updates import features_of

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGETRAIN_DATA") or ROOT.parent / "shared")
MCUNET, WEIGHTS = "mcunet-5fps", SHARED / "weights" / "mcunet-5fps.h5"
DRAWINGS = SHARED / "data" / "quickdraw10.h5"
LETTERS = SHARED / "data" / "omniglot.h5"
Row = tuple[str, str, str, str]
"""Claim, the paper's number, ours, and why they differ."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tasks: int
    seeds: int
    repeats: int
    passes: int
    images: int


FULL, QUICK = Size(24, 5, 25, 30, 1000), Size(2, 1, 3, 6, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tasks, seeds and repeats")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone, to the terminal")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "results" / "related.md")
    options = parser.parse_args()
    keep_freed_memory()  # as commands do; not in the fresh processes, whose memory is measured
    size = QUICK if options.quick else FULL
    began, parts = time.perf_counter(), []
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            print(f"{name} ...", file=sys.stderr, flush=True)
            parts.append(section_text(*section(size)))
    minutes = (time.perf_counter() - began) / 60
    page = "\n\n".join([heading(size, minutes), *parts]) + "\n"
    if options.only or options.quick:
        print(page)
    else:
        atomic_write(options.out, page.encode())


# -------------------------------------------------------------------------------------------------------- the nets


def mcunet(side: int) -> Backbone:
    """MCUNet-5fps on the native engine, with ImageNet weights where they are at hand."""
    settings = Importing(arch=MCUNET, arch_args={"size": side})
    return deploy(import_model(settings, read_weights(WEIGHTS) if WEIGHTS.is_file() else None).model, engine="native")


def letters() -> Block:
    """Characters for few-shot tasks: Omniglot's, or glyphs."""
    if LETTERS.is_file():
        (block,) = open_records(LETTERS)
        assert isinstance(block, Block)
        return block
    return glyphs(Glyphs())


def drawings() -> Block:
    """Ten classes: Quick, Draw!'s, or glyphs."""
    if DRAWINGS.is_file():
        (block,) = open_records(DRAWINGS)
        assert isinstance(block, Block)
        return block
    block = glyphs(Glyphs())
    return block.take(np.flatnonzero(block.y < 10))


def in_turns(
    bodies: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, np.ndarray]:
    """Seconds of each body in each repeat (repeats,), one after the other within it."""
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for repeat in range(repeats + 2):
        for name, body in bodies.items():
            start = clock()
            body()
            if repeat > 1:
                seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, np.ndarray], name: str, to: str) -> float:
    return float(np.median(seconds[name] / seconds[to]))


def step_of(net: object, x: Floats, rate: float = 1e-4) -> Callable[[], None]:
    """A training step of a net: frozen layers, forward, backward, Adam."""
    assert isinstance(net, NativeNet)
    optimizer = make_optimizer(net.parameters(), Optimizing(optimizer="adam"))

    def step() -> None:
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.full_like(features, 1e-3))
        optimizer.step(rate)

    return step


def inputs_of(backbone: Backbone, count: int) -> Floats:
    return np.random.default_rng(0).standard_normal((count, *backbone.graph.input_shape)).astype(np.float32)


def interval(values: Sequence[float]) -> str:
    """The mean and the half width of its 95 % interval."""
    spread = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):+.2f} ± {spread:.2f}"


# ----------------------------------------------------------------------------------------------------- velocity


def velocity(size: Size) -> tuple[str, list[Row], str]:
    rows = [recognised(size), *by_itself(size)]
    said = (
        "A channel that settles alone saves nothing: the gradient must pass through it. So the policy turns velocities "
        "into a longer frozen prefix, or into the end of training. NEq's and SCoTTi's own figures count the input "
        "gradients of frozen channels as saved; nothing is skipped in their code, and no time is published."
    )
    return "SCoTTi and NEq: what has settled is trained no more (`--policy velocity`)", rows, said


def recognised(size: Size) -> Row:
    """A net whose first half cannot move."""
    backbone = mcunet(96)
    graph = backbone.graph
    everything = named_plan("full", graph)
    x = inputs_of(backbone, 16)
    still = {update.layer for update in everything[: len(everything) // 2]}
    room = room_of(graph, None, tuple(everything), tuple(op.name for op in graph.layers))
    revising = Revising(parse_policy("velocity:every=1"), backbone, everything, room, probe=x[:2])
    net = revising.begin()
    optimizer = make_optimizer(net.parameters(), Optimizing(optimizer="adam"))
    looks = 0
    while revising.updates[0].layer in still and looks < 10:
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.full_like(features, 1e-3))
        for place in net.places():
            if place.name.rpartition(".")[0] in still:
                place.parameter.gradient.reshape(-1)[place.at] = 0
        optimizer.step(1e-3)
        net = revising.after(optimizer, 1.0)
        looks += 1
    bodies = {"all": step_of(make_net(backbone, everything), x), "rest": step_of(net, x)}
    seconds = in_turns(bodies, size.repeats, time.perf_counter)
    left = len([update for update in revising.updates if update.trains])
    return (
        "layers that cannot move leave the plan (MCUNet, 96 px, batch 16, Adam; the first 21 of 42 held)", "none",
        f"gone after {looks} revisions, {left} left; the step takes {ratio(seconds, 'rest', 'all'):.2f} of before",
        "NEq counts FLOPs only",
    )  # fmt: skip


def by_itself(size: Size) -> list[Row]:
    """Passes over drawings with a rate that decays: where does training end, and how well?"""
    data, each = drawings(), size.images // 50
    policies = [f"velocity:every={each}", f"velocity:every={each},threshold=0.01"]
    shares: dict[str, list[float]] = {name: [] for name in policies}
    points: dict[str, list[float]] = {name: [] for name in policies}
    times: dict[str, list[float]] = {name: [] for name in policies}
    for seed in range(size.seeds):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(data))[: size.images + 2000]
        train, test = data.take(np.sort(rows[: size.images])), data.take(np.sort(rows[size.images :]))
        run = import_model(Importing(arch="cnn4-w32", arch_args={"size": 28}, seed=seed))
        blocks = list(passes(train, size.passes, rng))
        how = Optimizing(learning_rate=0.05, momentum=0.9, schedule="cosine", total_updates=len(blocks), clip_norm=2.0)
        static, static_s = timed(run, blocks, StreamTraining(plan="full", optimizing=how))
        for name in policies:
            found, seconds = timed(run, blocks, StreamTraining(plan="full", optimizing=how, policy=name))
            shares[name].append(float((found.metrics[STAGE]["learning_rate"] > 0).mean()))
            points[name].append(100 * (accuracy(found, test) - accuracy(static, test)))
            times[name].append(seconds / static_s)
    claim = f"training ends by itself (Conv-4, {size.images} drawings, {size.passes} passes, cosine), "
    return [
        (f"{claim} `{name}`", "13 of 30 epochs were idle in a probe of NEq on digits",
         f"{np.mean(shares[name]):.2f} of the updates were made, {interval(points[name])} points, "
         f"{np.mean(times[name]):.2f} of the time",
         f"{size.seeds} paired seeds; a skipped update still takes its loss, to see when it leaves its band")
        for name in policies
    ]  # fmt: skip


def timed(run: Run, blocks: Sequence[Block], config: StreamTraining) -> tuple[Run, float]:
    start = time.perf_counter()
    result = train_stream(run, blocks, config)
    return result, time.perf_counter() - start


def passes(block: Block, count: int, rng: np.random.Generator, batch: int = 50) -> Iterator[Block]:
    for _ in range(count):
        order = rng.permutation(len(block))
        for start in range(0, len(order), batch):
            yield replace(block.take(order[start : start + batch]), columns={})


def accuracy(run: Run, block: Block) -> float:
    backbone = deploy(run.model)
    head = run.model.head
    assert head is not None
    features = backbone.features(adapt_block(block, backbone.input)).astype(np.float64)
    scores = features @ head.weight.T + head.bias
    return float((head.labels[scores.argmax(1)] == block.y).mean())


# -------------------------------------------------------------------------------------------------------- policies


def policies(size: Size) -> tuple[str, list[Row], str]:
    """Every policy against `static` and random revisions, few-shot, equal updates and equal seconds."""
    names = ("static", "rescore:every=10", "velocity:every=10,by=budget", "rescore:every=10,criterion=random",
             "rotate:parts=2")  # fmt: skip
    found = compare(size, names)
    rows: list[Row] = []
    for name in names[1:]:
        gain, patient, chance = (interval(found[name].against(each)) for each in ("static", "patient", RANDOM))
        random = "" if name == RANDOM else f"; {chance} against random revisions"
        rows.append((f"`--policy {name}` against the plan made once, 40 updates", "none", f"{gain} points at equal "
                     f"updates, {found[name].slower:.2f} of the time; {patient} at equal seconds{random}",
                     f"{size.tasks} paired tasks of 5 classes, 5 shots"))  # fmt: skip
    rows.append(rotating(size))
    said = (
        "Equal seconds: the plan made once gets as many updates more (or fewer) as the policy took processor time on "
        "that task. Signs are as they came."
    )
    return "Plans that are revised against TinyTrain's, made once", rows, said


UPDATES = 40
RANDOM = "rescore:every=10,criterion=random"


@dataclass
class Compared:
    """A policy's accuracy by task, and its rivals'."""

    hits: list[float]
    shares: list[float]
    """Of the processor time that the plan made once took."""
    rivals: dict[str, list[float]]

    def against(self, rival: str) -> list[float]:
        """Points won, by task."""
        return [100 * (mine - theirs) for mine, theirs in zip(self.hits, self.rivals[rival], strict=True)]

    @property
    def slower(self) -> float:
        return float(np.median(self.shares))


def compare(size: Size, names: Sequence[str]) -> dict[str, Compared]:
    """`static` first among the names."""
    backbone = mcunet(64)
    hits: dict[str, list[float]] = {name: [] for name in names}
    patient: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def trained(name: str, run: Run, support: Block, query: Block, iterations: int) -> tuple[float, float]:
        config = SupportTraining(adapting=adapting(iterations=iterations), engine="native", policy=name)
        start = time.process_time()
        result = train_support(run, support, config, rng=np.random.default_rng(1))
        return time.process_time() - start, score(result, query)

    for support, query in tasks(size.tasks):
        task = Task(support, adapt_block(support, backbone.input), support.y, adapt_block(query, backbone.input), 5)
        updates = TinyTrain()(backbone, task, adapting(), np.random.default_rng(0))
        run = run_with(backbone, updates)
        for name in names:
            took, hit = trained(name, run, support, query, UPDATES)
            seconds[name].append(took)
            hits[name].append(hit)
            longer = max(1, round(UPDATES * took / seconds["static"][-1]))
            patient[name].append(trained("static", run, support, query, longer)[1])
    shares = {name: (np.array(seconds[name]) / np.array(seconds["static"])).tolist() for name in names}
    common = {"static": hits["static"], RANDOM: hits[RANDOM]}
    return {name: Compared(hits[name], shares[name], {**common, "patient": patient[name]}) for name in names}


def adapting(**more: object) -> Adapting:
    return Adapting(learning_rates=(1e-3,), optimizing=Optimizing(optimizer="adam"), **more)  # type: ignore[arg-type]


def run_with(backbone: Backbone, updates: Sequence[LayerUpdate], **facts: object) -> Run:
    """A run with this plan, whose budgets are TinyTrain's."""
    settings = Importing(arch=MCUNET, arch_args={"size": backbone.input.shape[1]})
    run = import_model(settings, read_weights(WEIGHTS) if WEIGHTS.is_file() else None)
    budget = int(0.15 * full_backward_macs(backbone.graph))
    known = {"budget_memory_bytes": 1 << 20, "budget_macs": budget, **facts}
    return replace(run, plan=Plan("greedy", tuple(updates), 0, "paper", 0, known))


def tasks(count: int) -> Iterator[tuple[Block, Block]]:
    """Few-shot tasks: five classes, five shots, ten queries a class."""
    block = letters()
    shape = FixedShape(ways=5, shots=5, queries=10)
    pool, _ = check_pool(pool_of(block), shape, skip=True)  # few glyphs have as many fonts
    for episode in draw_episodes(pool, shape, 0, range(count)):
        support, query = (block.take(rows) for rows in (episode.support, episode.query))
        ways = np.unique(support.y)
        yield tuple(replace(b, y=np.searchsorted(ways, b.y), names=None, labels=None, per_class={}, columns={})  # type: ignore[misc]
                    for b in (support, query))  # fmt: skip


def score(run: Run, query: Block) -> float:
    backbone, head = deploy(run.model, engine="native"), run.model.head
    assert head is not None
    features = backbone.features(adapt_block(query, backbone.input))
    return float((head.labels[cosine_logits(features, head.weight, head.scale).argmax(1)] == query.y).mean())


def rotating(size: Size) -> Row:
    """The step of half the live channels where they dominate: a wide last layer."""
    run = import_model(Importing(arch="mlp", arch_args={"dim": 512, "width": 1024, "depth": 2}))
    backbone = deploy(run.model, engine="native")
    updates = named_plan("last-layer", backbone.graph)
    x = inputs_of(backbone, 4)
    halves = turns_of(backbone.graph, tuple(updates), 2)
    nets = {"whole": make_net(backbone, updates), "half": make_net(backbone, updates, halves)}
    optimizers = {name: make_optimizer(net.parameters(), Optimizing(optimizer="adam")) for name, net in nets.items()}
    count = {"half": 0}

    def step(name: str) -> Callable[[], None]:
        net, optimizer = nets[name], optimizers[name]

        def body() -> None:
            if name == "half":
                moving = {id(parameter) for parameter in net.turn(count["half"] % 2)}
                optimizer.hold(parameter for parameter in net.parameters() if id(parameter) not in moving)
                count["half"] += 1
            features, kept = net.forward(net.prefix(x))
            net.backward(kept, np.full_like(features, 1e-3))
            optimizer.step(1e-4)

        return body

    seconds = in_turns({name: step(name) for name in nets}, size.repeats, time.perf_counter)
    sizes = live_values(backbone.graph, updates)
    return (
        f"half of the channels in turn where they dominate a step (a layer of {sizes:,} values, batch 4, Adam)",
        "SliceOut: 10 to 40 % faster, which drops them from the forward pass too",
        f"the step takes {ratio(seconds, 'half', 'whole'):.2f}",
        "forward pass and input gradients stay whole: most of a mobile net's step, where rotating saves nothing",
    )


# --------------------------------------------------------------------------------------------------------- slices


def slices(size: Size) -> tuple[str, list[Row], str]:
    """`pretrain-fsl --slice`: the step, and what it learns in equal epochs and in equal seconds."""
    rows = [sliced_step(size, arch, args) for arch, args in WIDE]
    against = ("plain, equal epochs", "plain, equal seconds", "dropout, equal epochs", "dropout, equal seconds")
    gains: dict[str, list[float]] = {name: [] for name in against}
    shares = []
    for seed in range(size.seeds):
        plain, plain_s = meta_trained(seed, size, 1.0, 1.0)
        sliced, sliced_s = meta_trained(seed, size, 0.5, 1.0)
        longer, _ = meta_trained(seed, size, 0.5, plain_s / sliced_s)
        dropped, dropped_s = meta_trained(seed, size, 1.0, 1.0, dropout=0.5)
        as_long, _ = meta_trained(seed, size, 0.5, dropped_s / sliced_s)
        for name, gain in zip(
            against, (sliced - plain, longer - plain, sliced - dropped, as_long - dropped), strict=True
        ):
            gains[name].append(gain)
        shares.append(sliced_s / plain_s)
    found = "; ".join(f"{interval(values)} points against {name}" for name, values in gains.items())
    rows.append((
        "accuracy of meta-training with half of the hidden channels in each step (Conv-4 of width 64, letters)",
        "dropout's accuracy at 33 % less time (CNN, CIFAR-100)",
        f"{found}; {np.mean(shares):.2f} of the time",
        f"{size.seeds} seeds, 100 validation tasks; dropout computes what it drops",
    ))  # fmt: skip
    said = (
        "Slicing is for training wide nets from scratch. From pretrained mobile nets it destroys the features: leaving "
        "out a tenth of the hidden channels left a cosine of 0.02 to 0.04 to the whole net's (a probe)."
    )
    return "SliceOut: channels left out of a step (`pretrain-fsl --slice`)", rows, said


WIDE: tuple[tuple[str, dict[str, object]], ...] = (("cnn4-w64", {"size": 28}), ("mobilenetv2", {"size": 64}))


def sliced_step(size: Size, arch: str, args: dict[str, object]) -> Row:
    import torch

    from stages.fsl.slicing import Slicing
    from stages.models.modules import trainable

    net = trainable(import_model(Importing(arch=arch, arch_args=args)).model).train()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((32, *net.graph.input_shape)).astype(np.float32))
    count = {"step": 0}

    def step(keep: float) -> Callable[[], None]:
        slicing = Slicing(net.graph, keep, "wrap", 0, torch.device("cpu")) if keep < 1 else None

        def body() -> None:
            count["step"] += 1
            net.cut = None if slicing is None else slicing.cut(count["step"])
            net.zero_grad()
            net(x).square().mean().backward()

        return body

    seconds = in_turns({str(keep): step(keep) for keep in (1.0, 0.75, 0.5)}, size.repeats, time.perf_counter)
    return (
        f"step of {arch}, forward and backward, batch 32",
        "10 to 40 % faster (Wide ResNets, EfficientNets, GPU)",
        f"{ratio(seconds, '0.5', '1.0'):.2f} at 0.5, {ratio(seconds, '0.75', '1.0'):.2f} at 0.75",
        "inputs, outputs and residual streams stay whole",
    )


def meta_trained(seed: int, size: Size, keep: float, longer: float, dropout: float = 0.0) -> tuple[float, float]:
    """Best accuracy on validation tasks in percent, and the seconds of training; with channel dropout if wanted."""
    import torch

    from stages.pretraining import STAGE as PRETRAINING
    from stages.pretraining import Pretraining, pretrain

    block = letters()
    few = block.take(np.flatnonzero(block.y < 200))
    run = import_model(Importing(arch="cnn4-w64", arch_args={"size": 28}, seed=seed))
    epochs = max(1, round(longer * max(2, size.passes // 3)))
    config = Pretraining(epochs=epochs, steps=25, lr=0.05, slice=keep, augment="none", patience=0)
    torch.manual_seed(seed)  # dropout's generator
    start = time.perf_counter()
    with patch("stages.pretraining.trainable", partial(dropping, dropout)):
        table = pretrain(run, [few], config, seed=seed).metrics[PRETRAINING]
    return 100 * float(table["validation_accuracy"].max()), time.perf_counter() - start


def dropping(share: float, model: Model) -> torch.nn.Module:
    """The model as a module that, while it trains, drops so many of the channels that `--slice` would leave out."""
    from torch.nn import functional

    from stages.fsl.slicing import hidden_widths
    from stages.models.modules import trainable

    net = trainable(model)

    def dropped(op: Op, inputs: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return functional.dropout2d(op.operator.forward(op, inputs, tensors), share, net.training)

    if share:
        net.rules = {width.through[-1]: dropped for width in hidden_widths(net.graph)}
    return net


# ------------------------------------------------------------------------------------------------------- schedules


def schedules(size: Size) -> tuple[str, list[Row], str]:
    backbone = mcunet(128)
    updates = tuple(named_plan("full", backbone.graph))
    chain = chain_of(backbone.graph, updates)
    per_link = [sum(macs(backbone.graph[name]) for name in link.ops) for link in chain.links]
    start = time.perf_counter()
    best_schedule(chain, Costs([each / sum(per_link) for each in per_link]), 1536 * 1024, ("keep", "recompute"))
    solver_s = time.perf_counter() - start
    made = scheduling(backbone, updates)
    found = schedule_within(made, 1536 * 1024)
    x = inputs_of(backbone, 1)
    nets = {
        "kept": NativeNet(backbone.graph, backbone.tensors, updates, threads=1),
        "again": NativeNet(backbone.graph, backbone.tensors, updates, threads=1, how=found.how),
    }
    bits = []
    for net in nets.values():
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.full_like(features, 1e-3))
        bits.append(net.gradient.copy())
        net.clear_gradients()

    def body(net: NativeNet) -> Callable[[], None]:
        def step() -> None:
            features, kept = net.forward(net.prefix(x))
            net.backward(kept, np.full_like(features, 1e-3))

        return step

    seconds = in_turns({name: body(net) for name, net in nets.items()}, 2 * size.repeats, time.process_time)
    predicted = found.seconds / float(np.median(seconds["kept"]))
    share = kept_bytes(chain, found.how) / kept_bytes(chain, {})
    peaks = {name: peak_of(how) for name, how in (("kept", {}), ("again", dict(found.how)))}
    rows: list[Row] = [
        ("memory of a step (MCUNet, everything live, batch 1, 128 px, 1,536 KiB)",
         "ResNet-18 and BERT within Cortex-M's memory (abstract)",
         f"{share:.2f} of the bytes kept, {memory_of(backbone.graph, updates, how=found.how).arena / 1024:,.0f} of "
         f"{memory_of(backbone.graph, updates).arena / 1024:,.0f} KiB of arena; three steps raise a fresh process's "
         f"peak by {peaks['again'] / 2**20:.1f} instead of {peaks['kept'] / 2**20:.1f} MiB",
         "theirs prints a schedule, nothing executes it"),
        ("processor time of a step", "value-preserving; energy 0.001 J of paging beside 7.8 J",
         f"{ratio(seconds, 'again', 'kept'):.3f} of keeping everything; predicted {1 + predicted:.3f}; gradients "
         f"{'equal' if np.array_equal(bits[0], bits[1]) else 'DIFFERENT'} to the bit",
         "one thread; predicted from times measured here"),
        ("the schedule itself", "8.5 s for a chain of 8 with POET's program (HiGHS)", f"{solver_s:.2f} s for 43 links",
         "each value is made again once; exact for residual chains"),
    ]  # fmt: skip
    said = (
        "Sparse plans keep so little that the forward pass of the frozen layers is the peak: there is nothing to win, "
        "and `--ram` says so by making nothing again. `--micro-batch 1` comes first: it gives the same update."
    )
    return "POET: kept, made again, or paged (`--ram`)", rows, said


PEAK = """
import sys; sys.path.insert(0, {root!r}); sys.path.insert(0, {here!r})
import related, resource
import numpy as np
backbone = related.mcunet(128)
updates = tuple(related.named_plan("full", backbone.graph))
how = {how!r}
net = related.NativeNet(backbone.graph, backbone.tensors, updates, threads=1, how=how)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
x = related.inputs_of(backbone, 1)
for _ in range(3):
    features, kept = net.forward(net.prefix(x)); net.backward(kept, np.full_like(features, 1e-3))
print(status("VmHWM") - before)
"""


def peak_of(how: dict[str, str]) -> int:
    """How far three steps by a schedule raise the peak memory of a fresh process, in bytes."""
    code = PEAK.format(root=str(ROOT), here=str(Path(__file__).parent), how=how)
    apart = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # large arrays are memory of their own, touched when used
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=apart)
    return int(done.stdout.split()[-1]) * 1024


# --------------------------------------------------------------------------------------------------------- 8 bits


def few_bits(size: Size) -> tuple[str, list[Row], str]:
    backbone = mcunet(128)
    scheme = scheme_for(backbone.graph)
    updates = named_plan(scheme, backbone.graph, tensors_l2=backbone.tensors)
    kept = {bits: saved_activation_bytes(backbone.graph, updates, 1, bits) for bits in (32, 16, 8)}
    x = inputs_of(backbone, 16)
    nets = {bits: make_net(replace(backbone, engine=Engine("native", keep_bits=bits)), updates) for bits in kept}
    gradients = {}
    for bits, net in nets.items():
        features, held = net.forward(net.prefix(x))
        net.backward(held, np.cos(np.arange(features.size, dtype=np.float32)).reshape(features.shape))
        gradients[bits] = np.concatenate([parameter.gradient.copy() for parameter in net.parameters()])
    error = {b: float(np.linalg.norm(g - gradients[32]) / np.linalg.norm(gradients[32])) for b, g in gradients.items()}
    steps: dict[str, Callable[[], object]] = {str(bits): step_of(net, x) for bits, net in nets.items()}
    seconds = in_turns(steps, size.repeats, time.perf_counter)
    same, more = bits_accuracy(size)
    rows: list[Row] = [
        (f"bytes kept ({scheme})", "a probe: 2.2 to 2.3 times fewer at 8 bits",
         f"{', '.join(f'{each / 1024:.1f}' for each in kept.values())} KiB at 32, 16, 8 bits: {kept[8] / kept[32]:.2f}",
         "masks stay one bit each; a range for each sample"),
        ("step time (batch 16, Adam)", "simulated low precision: 1.6 to 6 times slower",
         f"{ratio(seconds, '8', '32'):.2f} at 8 bits, {ratio(seconds, '16', '32'):.2f} at 16",
         f"gradients are off by {100 * error[8]:.2g} % and {100 * error[16]:.2g} %, unbiased"),
        ("accuracy with what is kept in 8 bits, same plan", "PFQ: +0.2 to +0.34 points (progressive, 3 to 8 bits)",
         f"{interval(same)} points", f"{len(same)} paired tasks; only what is kept is rounded, not what is computed"),
        more,
    ]  # fmt: skip
    said = (
        "Widths below 8 and the gates of DFQ save nothing on a CPU: FracTrain's MACs are weighted by bits, for an "
        "accelerator that switches width. What 8 bits save is memory, and the planner buys live channels with it."
    )
    return "FracTrain: what is kept in fewer bits (`--keep-bits`)", rows, said


def bits_accuracy(size: Size) -> tuple[list[float], Row]:
    """TinyTrain's plan in 32 and in 8 bits; and plans under the arena model, 8 bits against 32."""
    backbone, same, bigger, values = mcunet(64), [], [], []
    for support, query in tasks(size.tasks):
        task = Task(support, adapt_block(support, backbone.input), support.y, adapt_block(query, backbone.input), 5)
        updates = TinyTrain()(backbone, task, adapting(), np.random.default_rng(0))
        found = [one_task(backbone, task, query, updates, bits) for bits in (32, 8)]
        same.append(100 * (found[1] - found[0]))
        plans = [plan_in(backbone, support, bits) for bits in (32, 8)]
        values.append([live_values(backbone.graph, plan) for plan in plans])
        found = [one_task(backbone, task, query, plan, bits) for plan, bits in zip(plans, (32, 8), strict=True)]
        bigger.append(100 * (found[1] - found[0]))
    counts = np.mean(values, 0)
    row = ("a plan under 192 KiB of activations and live values (model `saved`, SGD), 8 bits against 32", "none",
           f"{counts[1]:,.0f} live values instead of {counts[0]:,.0f}; {interval(bigger)} points",
           f"{len(bigger)} paired tasks, no budget of MACs")  # fmt: skip
    return same, row


def plan_in(backbone: Backbone, support: Block, bits: int) -> Sequence[LayerUpdate]:
    from stages.scoring import Scoring, score_layers

    run = run_with(backbone, ())
    config = Scoring(
        memory="192KiB", macs="100%", memory_model="saved", optimizer="sgd", keep_bits=bits, select="knapsack",
        engine="native",
    )  # fmt: skip
    plan = score_layers(replace(run, plan=None), support, config, rng=np.random.default_rng(0)).plan
    assert plan is not None
    return plan.updates


def one_task(backbone: Backbone, task: Task, query: Block, updates: Sequence[LayerUpdate], bits: int) -> float:
    kept = replace(backbone, engine=Engine("native", keep_bits=bits))
    result = adapt(kept, updates, task.support_x, task.support_y, adapting(), np.random.default_rng(1))
    features = features_of(result.net, task.query_x)
    means = prototypes(features_of(result.net, task.support_x), task.support_y, task.ways)
    return float((cosine_logits(features, means, 10.0).argmax(1) == query.y).mean())


# ---------------------------------------------------------------------------------------------------------- the page


SECTIONS: dict[str, Callable[[Size], tuple[str, list[Row], str]]] = {
    "velocity": velocity,
    "policies": policies,
    "slices": slices,
    "schedules": schedules,
    "bits": few_bits,
}


def section_text(title: str, rows: Sequence[Row], said: str) -> str:
    lines = [f"## {title}", "", "| claim | the paper's number | here | why they differ |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", said])


def heading(size: Size, minutes: float) -> str:
    weights = "ImageNet weights" if WEIGHTS.is_file() else "random weights"
    data = "Omniglot and Quick, Draw!" if LETTERS.is_file() else "glyphs"
    machine = f"{platform.machine()}, {os.cpu_count()} processors, MCUNet-5fps with {weights}, {data}"
    lines = [
        "# The systems beside TinyTrain: what they claim, and what comes out",
        "",
        "Written by `make reproduce-related`. Each row is a claim, the number that its paper has, the number measured",
        f"by this run, and why they differ. {machine}; {minutes:.0f} minutes.",
        'Times are ratios within one run. How each works: [planning.md](../planning.md), "Plans in time".',
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
