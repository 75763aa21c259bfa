"""What training costs: the two engines beside stock PyTorch, in seconds, in bytes kept, in process memory.

    python examples/bench/engine.py             # everything, about 25 minutes on 2 cores
    python examples/bench/engine.py --quick     # one net, few repeats: does it still run?

Contestants, on the same deploy-form backbone (BatchNorm folded) and the same plan:

* full: stock PyTorch modules, everything trains;
* masked: the same, and gradients of what should not train are erased after the backward pass, as published code does;
* same layers: stock PyTorch modules, `requires_grad` on the plan's layers only (whole layers: it knows no channels, and
  no layer that passes no gradient on, as the plan `shortcut` has them);
* torch engine and native: `stages.training` on either engine.

They take turns within each repeat, so that a busy machine is busy for all of them; ratios are medians of the ratios
within a repeat. All run in a process set up like a command's: numpy's BLAS without threads of its own, an allocator
that keeps what is freed. Peak memory is that of a fresh process each. The table goes to docs/results/engine.md.
"""

# ruff: noqa: E402 - what a command sets up comes before numpy
from __future__ import annotations

from edgetrain_cli.libraries import import_numpy, keep_freed_memory

import_numpy()

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.artifacts.records import Block, LayerUpdate
from stages.cost.training import saved_activation_bytes
from stages.engines.choice import Engine, make_net
from stages.engines.native.net import NativeNet
from stages.engines.parameter import Floats
from stages.engines.torch.net import SparseNet
from stages.fsl.augment import augment
from stages.fsl.protonet import support_loss
from stages.importing import Importing, import_model, read_weights
from stages.methods.plans import Shortcut, TinyTrain, scheme_for
from stages.methods.task import Task
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt as adapt_input
from stages.planning.baselines import named_plan
from stages.training.adaptation import Adapting, adapt
from stages.training.optimizers import Optimizing, make_optimizer
from stages.training.updates import Loss as ClosedLoss
from stages.training.updates import gradient_update

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGETRAIN_DATA") or ROOT.parent / "shared")
NETS = {"mcunet-5fps": "mcunet-5fps", "mobilenetv2-w0.35": "mbv2-w0.35", "proxyless-w0.3": "proxyless-w0.3"}
"""Architecture -> file of ImageNet weights, used where it is at hand: the plan depends on them, a plan's cost not."""
SIZE, WAYS, ITERATIONS, VIEWS, RATE, SCALE = 128, 5, 40, 8, 1e-3, 10.0
TO_REACH = {25: (9.0, 15.0), 100: (20.0, 35.0)}
"""Samples -> how many times as long full training takes, with fresh views and with cached ones."""
Updates = Sequence[LayerUpdate]


@dataclass(frozen=True)
class Loss:
    """A loss over features: for autograd, and in closed form."""

    stock: Callable[[Tensor], Tensor]
    ours: ClosedLoss


# --------------------------------------------------------------------------------------------------------- contestants


class Stock(nn.Module):
    """A deploy-form graph as ordinary PyTorch modules, in PyTorch's default layout."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.graph = backbone.graph
        self.parts = nn.ModuleDict()
        for op in backbone.graph.ops:
            if op.kind == "conv":
                layer = nn.Conv2d(
                    op.in_channels, op.out_channels, op.kernel, op.stride, op.padding, op.dilation, op.groups, op.bias
                )
                layer.load_state_dict({what: torch.from_numpy(backbone.tensors[f"{op.name}.{what}"].copy())
                                       for what in ("weight", "bias")})  # fmt: skip
                self.parts[key(op.name)] = layer
            elif op.kind in ("relu", "relu6"):
                self.parts[key(op.name)] = nn.ReLU(inplace=True) if op.kind == "relu" else nn.ReLU6(inplace=True)
            elif op.kind not in ("input", "add", "global_pool", "flatten"):
                raise SystemExit(f"{op.name}: this benchmark has no stock module for {op.kind}")

    def forward(self, x: Tensor) -> Tensor:
        values = {self.graph.ops[0].name: x}
        for op in self.graph.ops[1:]:
            inputs = [values[name] for name in op.inputs]
            if op.kind == "add":
                values[op.name] = inputs[0] + inputs[1]
            elif op.kind == "global_pool":
                values[op.name] = inputs[0].mean((2, 3))
            elif op.kind == "flatten":
                values[op.name] = inputs[0].flatten(1)
            else:
                values[op.name] = self.parts[key(op.name)](inputs[0])
        return values[self.graph.ops[-1].name]


def key(name: str) -> str:
    return name.replace(".", "_")


class Contestant:
    """What trains on model inputs (N, *input), by gradients of a loss over their features and Adam."""

    def __init__(self, backbone: Backbone, updates: Updates, rate: float) -> None:
        self.module = Stock(backbone)
        self.choose({update.layer: update for update in updates if update.trains})
        self.optimizer = torch.optim.Adam((p for p in self.module.parameters() if p.requires_grad), lr=rate)

    def choose(self, live: dict[str, LayerUpdate]) -> None:
        """Full training: everything requires a gradient already."""

    def step(self, xs: list[Floats], loss: Loss) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        loss.stock(self.module(torch.from_numpy(np.concatenate(xs) if len(xs) > 1 else xs[0]))).backward()
        self.erase()
        self.optimizer.step()

    def erase(self) -> None:
        """Forget gradients of what must not train."""

    def kept_bytes(self, x: Floats) -> int:
        """Bytes of the distinct storages kept for the backward pass, the model's own tensors and the input aside."""
        return kept_by_autograd(lambda: self.module(torch.from_numpy(x)), self.module.parameters())


class SameLayers(Contestant):
    def choose(self, live: dict[str, LayerUpdate]) -> None:
        names = {key(name) for name in live}
        for name, parameter in self.module.parts.named_parameters():
            layer, _, what = name.rpartition(".")
            parameter.requires_grad_(layer in names and what == "weight")


class Masked(Contestant):
    def choose(self, live: dict[str, LayerUpdate]) -> None:
        self.masks = []
        rows = {f"{key(name)}.weight": update for name, update in live.items()}
        for name, parameter in self.module.parts.named_parameters():
            mask = torch.zeros_like(parameter)
            if name in rows:
                channels = list(rows[name].channels)
                mask[(slice(None), channels) if rows[name].axis == "input" and mask.shape[1] > 1 else channels] = 1
            self.masks.append((parameter, mask))

    def erase(self) -> None:
        for parameter, mask in self.masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)


class Ours(Contestant):
    """The same updates by one of our engines."""

    name = ""

    def __init__(self, backbone: Backbone, updates: Updates, rate: float) -> None:
        self.backbone, self.updates = replace(backbone, engine=Engine(self.name)), updates
        self.net = make_net(self.backbone, updates)
        self.rate = rate
        self.rule = make_optimizer(self.net.parameters(), Optimizing(optimizer="adam", learning_rate=rate))

    def step(self, xs: list[Floats], loss: Loss) -> None:
        gradient_update(self.net, xs, loss.ours)
        self.rule.step(self.rate)


class OnTorch(Ours):
    name = "torch"

    def kept_bytes(self, x: Floats) -> int:
        net = SparseNet(self.backbone, self.updates)
        return kept_by_autograd(lambda: net.suffix(net.prefix(torch.from_numpy(x))), net.parameters())


class Native(Ours):
    name = "native"

    def kept_bytes(self, x: Floats) -> int:
        assert isinstance(self.net, NativeNet)
        return len(x) * int(self.net.sizes.kept_bytes)


CONTESTANTS: dict[str, type[Contestant]] = {
    "full": Contestant,
    "masked": Masked,
    "same layers": SameLayers,
    "torch engine": OnTorch,
    "native": Native,
}


def kept_by_autograd(features: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = features()
    assert result.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def mean_square() -> Loss:
    """A loss whose own cost is next to nothing."""

    def ours(features: Floats) -> tuple[float, Floats]:
        return float(np.square(features).mean()), np.float32(2 / features.size) * features

    return Loss(lambda features: features.square().mean(), ours)


def prototype_loss(labels: NDArray[np.int64]) -> Loss:
    """ProtoNet's loss of a support set and its pseudo-query, cosine, the gradient through the prototypes too."""
    rows = torch.from_numpy(labels)
    members = nn.functional.one_hot(rows).float()
    mean = members.T / members.sum(0)[:, None]

    def stock(features: Tensor) -> Tensor:
        support, query = features.split(len(rows))
        angles = nn.functional.normalize(query) @ nn.functional.normalize(mean @ support).T
        return nn.functional.cross_entropy(SCALE * angles, rows)

    return Loss(stock, support_loss(labels, labels, WAYS, SCALE))


# ------------------------------------------------------------------------------------------------------ nets and plans


def load(name: str) -> Backbone:
    """The backbone at 128 x 128, with ImageNet weights where they are at hand, else random ones."""
    file = SHARED / "weights" / f"{NETS[name]}.h5"
    settings = Importing(arch=name, arch_args={"size": SIZE})
    return deploy(import_model(settings, read_weights(file) if file.is_file() else None).model)


def task(backbone: Backbone, samples: int) -> Task:
    """Random pictures of five classes: costs do not depend on what they show."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (samples, SIZE, SIZE, 3), dtype=np.uint8), np.arange(samples) % WAYS
    inputs = adapt_input(x, "NHWC", backbone.input)
    return Task(Block(x, y, "NHWC"), inputs, y, inputs[:1], WAYS)


def adapting(**options: Any) -> Adapting:
    """TinyTrain's procedure at one learning rate."""
    return Adapting(
        iterations=options.pop("iterations", ITERATIONS), learning_rates=(RATE,),
        optimizing=Optimizing(optimizer="adam"), **options,
    )  # fmt: skip


def tinytrain(backbone: Backbone, some: Task) -> Updates:
    """TinyTrain's plan: 1 MB, 15 % of full backward MACs, Fisher pass and search included."""
    return TinyTrain()(backbone, some, adapting(), np.random.default_rng(0))


def plans(backbone: Backbone) -> dict[str, Updates]:
    """The plans that steps are measured with."""
    scheme, weights = scheme_for(backbone.graph), backbone.tensors
    return {
        "tinytrain": tinytrain(backbone, task(backbone, 25)),
        scheme: named_plan(scheme, backbone.graph, tensors_l2=weights),
        "last-layer": named_plan("last-layer", backbone.graph, tensors_l2=weights),
        "shortcut": Shortcut()(backbone, task(backbone, 25), adapting(), np.random.default_rng(0)),
    }


# -------------------------------------------------------------------------------------------------------- measurements


def take_turns(bodies: dict[str, Callable[[], object]], repeats: int, *, warm: int = 1) -> dict[str, np.ndarray]:
    """Seconds of each body in each repeat, (repeats,); `warm` rounds before that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for repeat in range(repeats + warm):
        for name, body in bodies.items():
            began = time.perf_counter()
            body()
            if repeat >= warm:
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def step_of(name: str, backbone: Backbone, updates: Updates, x: Floats) -> Callable[[], None]:
    """One training step of a new contestant."""
    contestant, loss = CONTESTANTS[name](backbone, updates, 1e-4), mean_square()
    return lambda: contestant.step([x], loss)


def peak_growth_bytes(name: str, backbone: Backbone, updates: Updates, batch: int) -> int:
    """How far three steps raise this process's peak memory above what it holds before them. Linux only."""
    x = inputs_of(backbone, batch)
    step = step_of(name, backbone, updates, x)
    warm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    warm(torch.rand(1, 3, 8, 8)).sum().backward()  # what the libraries set up once is not the contestants' doing
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is nobody's to use again
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    for _ in range(3):
        step()
    return status_bytes("VmHWM") - before


def inputs_of(backbone: Backbone, batch: int) -> Floats:
    """Random model inputs."""
    return np.random.default_rng(0).random((batch, *backbone.graph.input_shape), np.float32)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def fresh_process(name: str, net: str, updates: Updates, batch: int, threads: int) -> int:
    """`peak_growth_bytes` in a process of its own."""
    job = {"name": name, "net": net, "batch": batch, "threads": threads, "updates": [list(fields(u)) for u in updates]}
    command = [sys.executable, __file__, "--peak", json.dumps(job)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return int(done.stdout)


def fields(update: LayerUpdate) -> tuple[Any, ...]:
    return update.layer, update.axis, update.channels, update.axis_channels, update.bias, update.detached


def peak_job(text: str) -> None:
    """The fresh process's part."""
    job = json.loads(text)
    torch.set_num_threads(job["threads"])
    updates = [
        LayerUpdate(layer, axis, tuple(channels), count, tuple(bias), detached)
        for layer, axis, channels, count, bias, detached in job["updates"]
    ]
    print(peak_growth_bytes(job["name"], load(job["net"]), updates, job["batch"]))


# ---------------------------------------------------------------------------------------------------- whole adaptations


def adaptations(backbone: Backbone, some: Task) -> dict[str, Callable[[], object]]:
    """Whole adaptations to one support set: planning where there is a plan, then 40 iterations of P>M>F."""

    def stock(kind: type[Contestant], planner: Callable[[Backbone, Task], Updates]) -> Callable[[], object]:
        return lambda: stock_adaptation(kind(backbone, planner(backbone, some), RATE), backbone, some)

    def ours(engine: str, **options: Any) -> Callable[[], object]:
        how, rng, base = adapting(**options), np.random.default_rng(0), replace(backbone, engine=Engine(engine))
        return lambda: adapt(base, tinytrain(base, some), some.support_x, some.support_y, how, rng)

    return {
        "full": stock(Contestant, lambda backbone, some: ()),
        "masked": stock(Masked, tinytrain),
        "same layers": stock(SameLayers, tinytrain),
        "torch engine": ours("torch"),
        "torch engine, cached views": ours("torch", views=VIEWS, cache_prefix=True),
        "native": ours("native"),
        "native, cached views": ours("native", views=VIEWS, cache_prefix=True),
    }


def stock_adaptation(contestant: Contestant, backbone: Backbone, some: Task) -> None:
    """P>M>F's loop: a fresh augmented copy as pseudo-query in every iteration, gradients through the prototypes."""
    loss, rng = prototype_loss(some.support_y), np.random.default_rng(0)
    for _ in range(ITERATIONS):
        contestant.step([some.support_x, augment(some.support_x, backbone.input, rng)], loss)


# ---------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    nets: tuple[str, ...]
    batches: tuple[int, ...]
    supports: tuple[int, ...]
    steps: int
    rounds: int
    threads: int


@dataclass(frozen=True)
class Check:
    """One figure that is to be reached."""

    what: str
    found: float
    bound: float
    at_least: bool = False

    def line(self) -> str:
        reached = self.found >= self.bound if self.at_least else self.found <= self.bound
        sign = "at least" if self.at_least else "at most"
        return f"| {self.what} | {sign} {self.bound:g} | {self.found:.2f} | {'yes' if reached else 'NO'} |"


def report(effort: Effort) -> Iterable[str]:
    """The page, line by line, as it is measured."""
    checks: list[Check] = []
    yield from heading(effort)
    for net in effort.nets:
        backbone = load(net)
        yield from ["", f"## {net}", ""]
        yield from step_table(net, backbone, plans(backbone), effort, checks)
        yield from adaptation_table(net, backbone, effort, checks)
    yield from ["", "## To reach", "", "| figure | bound | found | reached |", "|---|---|--:|---|"]
    yield from (check.line() for check in checks)
    yield from ["", "## Where a step's time goes", ""]
    yield f"The torch engine's step with TinyTrain's plan at batch {effort.batches[-1]}, profiled apart from the rest."
    for net in effort.nets:
        yield from profile_table(net, effort)


def heading(effort: Effort) -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    weights = "ImageNet" if all((SHARED / "weights" / f"{f}.h5").is_file() for f in NETS.values()) else "random"
    return [
        "# The engines beside stock PyTorch",
        "",
        f"Written by `make bench-engine`. {cpu}, {effort.threads} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}; {weights} weights, {SIZE} x {SIZE} inputs.",
        "",
        "* Times are medians (quartiles in brackets) of turns taken one after the other; ratios are medians of the "
        "ratios within a turn.",
        "* *kept* is what autograd holds for the backward pass; *of the paper's* compares it with the inputs of live "
        "layers (only their live channels where those suffice) plus one bit per activation output.",
        "* *peak growth* is how far training steps raise the peak memory of a fresh process.",
    ]


COLUMNS = {
    "plan": "---", "batch": "--:", "contestant": "---", "step, ms": "--:", "native / it": "--:", "kept, KiB": "--:",
    "it / native": "--:", "of the paper's": "--:", "peak growth, MiB": "--:", "it / native ": "--:",
}  # fmt: skip


def step_table(
    net: str, backbone: Backbone, by_name: dict[str, Updates], effort: Effort, checks: list[Check]
) -> Iterable[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "|".join(COLUMNS.values()) + "|"
    for plan, updates in by_name.items():
        for batch in effort.batches if plan == "tinytrain" else effort.batches[-1:]:
            steps = measure_steps(net, backbone, updates, batch, effort)
            yield from (f"| {plan} | {batch} | {row}" for row in steps.rows())
            if plan == "tinytrain":
                checks += steps.checks(net, batch)


@dataclass(frozen=True)
class Steps:
    """Steps of all contestants with one plan at one batch size; each by contestant."""

    seconds: dict[str, np.ndarray]
    kept: dict[str, int]
    peaks: dict[str, int]
    paper_bytes: int

    def rows(self) -> list[str]:
        our_kept, our_peak = self.kept["native"], max(self.peaks["native"], 1)
        return [
            f"{name} | {spread(1e3 * self.seconds[name])} | {self.time_of(name):.2f} "
            f"| {self.kept[name] / 1024:,.0f} | {self.kept[name] / our_kept:.1f} "
            f"| {self.kept[name] / self.paper_bytes:.2f} "
            f"| {self.peaks[name] / 2**20:,.1f} | {self.peaks[name] / our_peak:.1f} |"
            for name in CONTESTANTS
        ]

    def time_of(self, name: str) -> float:
        """The native engine's time as a share of a contestant's."""
        return float(np.median(self.seconds["native"] / self.seconds[name]))

    def checks(self, net: str, batch: int) -> list[Check]:
        """The figures to reach that this batch size has."""
        if batch == 1:
            return [Check(f"{net}, batch 1: step, native / torch engine", self.time_of("torch engine"), 0.2)]
        if batch != 32:
            return []
        kept = self.kept["native"]
        return [
            Check(f"{net}, batch 32: step, native / torch engine", self.time_of("torch engine"), 0.7),
            Check(f"{net}, batch 32: step, native / full", self.time_of("full"), 0.16),
            Check(f"{net}, batch 32: kept, native / paper", kept / self.paper_bytes, 1.02),
            Check(f"{net}, batch 32: kept, full / native", self.kept["full"] / kept, 65, at_least=True),
            Check(f"{net}, batch 32: peak growth, full / native", self.peaks["full"] / self.peaks["native"], 5, True),
        ]


def measure_steps(net: str, backbone: Backbone, updates: Updates, batch: int, effort: Effort) -> Steps:
    x = inputs_of(backbone, batch)
    kept = {name: kind(backbone, updates, 1e-4).kept_bytes(x) for name, kind in CONTESTANTS.items()}
    seconds = take_turns({name: step_of(name, backbone, updates, x) for name in CONTESTANTS}, effort.steps)
    peaks = {name: fresh_process(name, net, updates, batch, effort.threads) for name in CONTESTANTS}
    return Steps(seconds, kept, peaks, saved_activation_bytes(backbone.graph, updates, batch))


def adaptation_table(net: str, backbone: Backbone, effort: Effort, checks: list[Check]) -> Iterable[str]:
    yield from [
        "",
        f"Whole adaptation: {ITERATIONS} iterations, TinyTrain's plan, Fisher pass and planning included.",
        "",
    ]
    yield "| support | contestant | s | full / it |"
    yield "|--:|---|--:|--:|"
    for samples in effort.supports:
        some = task(backbone, samples)
        large = samples > 25  # its rounds are long and its first calls no longer new
        seconds = take_turns(adaptations(backbone, some), 1 if large else effort.rounds, warm=not large)
        times = {name: float(np.median(seconds["full"] / values)) for name, values in seconds.items()}
        for name, values in seconds.items():
            yield f"| {samples} | {name} | {spread(values)} | {times[name]:.2f} |"
        planning = take_turns({"plan": lambda some=some: tinytrain(backbone, some)}, effort.rounds)["plan"]
        yield f"| {samples} | (Fisher pass and planning alone) | {spread(planning)} | |"
        if samples in TO_REACH:
            what, (fresh, cached) = f"{net}, {samples} samples: whole adaptation, full / native", TO_REACH[samples]
            checks.append(Check(what, times["native"], fresh, at_least=True))
            checks.append(Check(what + " with cached views", times["native, cached views"], cached, at_least=True))


def profile_table(net: str, effort: Effort) -> Iterable[str]:
    """The parts of a step of the torch engine, and the operators that take most of its processor time."""
    backbone = load(net)
    engine, x = (
        OnTorch(backbone, tinytrain(backbone, task(backbone, 25)), 1e-4),
        inputs_of(backbone, effort.batches[-1]),
    )
    boundary, loss = engine.net.prefix(x), mean_square()
    step = lambda: engine.step([x], loss)  # noqa: E731
    parts = {"step": step, "prefix": lambda: engine.net.prefix(x), "suffix": lambda: engine.net.suffix(boundary)}
    ms = {name: 1e3 * float(np.median(each)) for name, each in take_turns(parts, effort.steps).items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(effort.steps):
            step()
    operators = sorted(profile.key_averages(), key=lambda each: -each.self_cpu_time_total)
    whole = sum(each.self_cpu_time_total for each in operators)
    yield ""
    yield (
        f"{net}: {ms['step']:.1f} ms, of which the frozen layers' forward pass {ms['prefix']:.1f} ms and the trained "
        f"part's {ms['suffix']:.1f} ms; the rest is backward pass and update."
    )
    yield from ["", "| operator | its own time, % |", "|---|--:|"]
    yield from (f"| `{each.key}` | {100 * each.self_cpu_time_total / whole:.1f} |" for each in operators[:8])


def spread(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one net, batch 1 and 8, few repeats; nothing is written")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "engine.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()
    if options.peak:
        return peak_job(options.peak)
    torch.set_num_threads(options.threads)
    whole = Effort(tuple(options.nets), (1, 8, 32), (25, 100), steps=20, rounds=3, threads=options.threads)
    quick = Effort(tuple(options.nets[:1]), (1, 8), (5,), steps=3, rounds=1, threads=options.threads)
    lines = []
    for line in report(quick if options.quick else whole):
        print(line, flush=True)
        lines.append(line)
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
