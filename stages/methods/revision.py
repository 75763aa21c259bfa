"""A policy at work: it is told what it needs, its plans become nets, and every revision is recorded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.artifacts.records import Array, LayerUpdate, Scores
from stages.artifacts.updates import read_updates, updates_text
from stages.engines.choice import TrainedNet, make_net
from stages.engines.parameter import Floats
from stages.methods.observing import Observer
from stages.models.deploy import Backbone
from stages.planning.policies import OBSERVED_LOSSES, Policy, Room, Seen, Updates, turns_of
from stages.planning.precision import PrecisionSchedule, advance
from stages.planning.precision import begin as begin_precision
from stages.training.optimizers import Optimizer
from stages.training.revising import carry, resting

Score = Callable[[Backbone], Scores | None]
"""A Fisher pass with the weights as they are; None where the samples say nothing."""
PROBE_PER_CLASS = 1
"""Samples of a class that a policy looks at: few, so that looking costs next to nothing."""


def probe_rows(labels: Array) -> Array:
    """The first samples of every class, ascending: int64 (n,)."""
    rows = [np.flatnonzero(labels == label)[:PROBE_PER_CLASS] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows)) if rows else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Revision:
    """A plan that a policy made."""

    update: int
    """Updates made before it."""
    updates: Updates
    """Nothing where training came to rest."""


class Revising:
    """Follows one net's training by a policy (`training.revising.Follower`).

    Args:
        backbone: with the weights that training begins with.
        updates: the plan that it begins with.
        room: what revised plans keep within.
        probe: model inputs (n, *input) whose outputs are watched, where the policy looks at outputs.
        score: a Fisher pass, where the policy wants scores; gets the backbone as it is.
        rng: where channels are drawn by chance.
        precision: the widths in which inputs are kept, one after the other.
        window: updates whose mean is one loss for that.
    """

    def __init__(
        self,
        policy: Policy,
        backbone: Backbone,
        updates: Sequence[LayerUpdate],
        room: Room,
        *,
        probe: Floats | None = None,
        score: Score | None = None,
        rng: np.random.Generator | None = None,
        precision: PrecisionSchedule | None = None,
        window: int = 1,
    ) -> None:
        self._precision, self._window, self._mean = precision, window, list[float]()
        self._widths = {} if precision is None else begin_precision(precision)
        self.widths: list[tuple[int, int]] = []
        """(updates made before, bits) of every width in which inputs are kept, where that changes."""
        if precision is not None:
            backbone = replace(backbone, engine=replace(backbone.engine, keep_bits=precision.bits[0]))
            self.widths.append((0, precision.bits[0]))
        self.policy, self._backbone, self._room = policy, backbone, room
        self._first = self.updates = tuple(updates)
        self._probe, self._score, self._rng = probe, score, rng
        self._memory: Mapping[str, Array] = {}
        self._losses: deque[float] = deque(maxlen=OBSERVED_LOSSES)
        self._descents: list[float] = []
        self._values: list[Floats] = []
        self._turn = self.done = 0
        self._turns: list[Updates] = []
        self.moved: set[str] = set()
        """Names of the tensors that have trained at some time."""
        self._observer: Observer | None = None
        self.revisions: list[Revision] = []
        """Every plan when it began to train; of those that take turns each once."""

    # ------------------------------------------------------------------------------------------------------- training

    def begin(self) -> TrainedNet:
        """The net that trains now."""
        if self._turning:
            self._turns = turns_of(self._backbone.graph, self._first, self.policy.settings.parts)
        self._net = self._made(self._turns)
        if not self.done:
            self.revisions.append(Revision(0, self._turns[0] if self._turning else self.updates))
        if self._turning:
            self._net.turn(self._turn)
            return self._net
        if self._probe is not None:
            self.meet(self._probe)
        return self._net

    @property
    def wants_probe(self) -> bool:
        """Whether it must see samples before it can look at outputs."""
        return self.policy.kind.needs == "outputs" and self._probe is None

    def meet(self, probe: Floats) -> None:
        """Look at these model inputs (n, *input) from now on."""
        self._probe = probe
        if not self._memory:
            self._decide()

    def hold(self, optimizer: Optimizer) -> None:
        """Let what has no turn rest."""
        if self._turning:
            optimizer.hold(resting(self._net, self._net.turn(self._turn)))

    def about_to_step(self) -> None:
        """The gradients of an update are complete: how far the loss still falls the way that the last update went."""
        if not self.policy.learns:
            return
        parameters = self._net.parameters()
        if len(self._values) == len(parameters):
            went = zip(parameters, self._values, strict=True)
            self._descents.append(sum(float(np.vdot(p.gradient, before - p.value)) for p, before in went))
        self._values = [parameter.value.copy() for parameter in parameters]

    def after(self, optimizer: Optimizer, loss: float) -> TrainedNet:
        """The net that trains next; the optimiser has it in the place of the one before."""
        self._losses.append(loss)
        self.done += 1
        if self._precision is not None and self.updates:
            self._watch_loss(self._precision, loss, optimizer)
        if not self.policy.every or (self.updates and self.done % self.policy.every):
            return self._net
        before = self.updates
        turn = self._decide()
        if self._turning:
            self._turn = turn
            self.hold(optimizer)
            if self.done == turn * self.policy.every:  # the first time
                self.revisions.append(Revision(self.done, self._turns[turn]))
        elif self.updates != before:
            self._change(optimizer)
        return self._net

    def _decide(self) -> int:
        """Ask the policy; whose turn it is."""
        decision = self.policy.revise(self._seen(), self._memory)
        self._memory, self._descents = decision.memory, []
        if decision.updates != self.updates:
            self.revisions.append(Revision(self.done, decision.updates))
        self.updates = decision.updates
        return decision.turn

    def _watch_loss(self, precision: PrecisionSchedule, loss: float, optimizer: Optimizer) -> None:
        """Keep inputs in more bits where the loss stalls."""
        self._mean.append(loss)
        if len(self._mean) < self._window:
            return
        self._widths, self._mean = advance(precision, self._widths, float(np.mean(self._mean))), []
        bits = precision.bits[int(self._widths["stage"])]
        if bits != self._backbone.engine.keep_bits:
            self._backbone = replace(self._backbone, engine=replace(self._backbone.engine, keep_bits=bits))
            self.widths.append((self.done, bits))
            self._change(optimizer)

    def _change(self, optimizer: Optimizer) -> None:
        """Another net, with the weights reached."""
        before = self._net
        self._backbone = replace(self._backbone, tensors=before.tensors())
        self._net = self._made(self._turns)
        carry(optimizer, before, self._net)
        self._values = []
        if self._turning:
            self.hold(optimizer)

    def _made(self, turns: Sequence[Updates] = ()) -> TrainedNet:
        net = make_net(self._backbone, self.updates, turns)
        self.moved |= {place.name for place in net.places()}
        return net

    @property
    def plan(self) -> Updates:
        """What trains, the channels that rest for a turn too."""
        return self.updates

    @property
    def _turning(self) -> bool:
        return self.policy.kind.in_turns

    def _seen(self) -> Seen:
        seen = Seen(self._first, self.updates, self._room, list(self._losses), descents=self._descents, rng=self._rng)
        if self.policy.kind.needs == "outputs" and self.updates:
            seen = replace(seen, outputs=self._watch().look(self._net.tensors()))
        if self.policy.kind.needs == "scores" and self._score is not None:
            seen = replace(seen, scores=self._score(replace(self._backbone, tensors=self._net.tensors())))
        return seen

    def _watch(self) -> Observer:
        if self._observer is None:
            assert self._probe is not None
            live = [update.layer for update in self._first if update.trains]
            settings = self.policy.settings
            layers = live if settings.by == "threshold" else list(self._room.candidates)
            changing = [op.name for op in self._backbone.graph.layers if op.name in {*layers, *live}]
            full = settings.probe == "full"
            self._observer = Observer(self._backbone, layers, changing, self._probe, full=full)
        return self._observer

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Array]:
        """All that it goes on from, as arrays by name, for a checkpoint."""
        found = {f"memory {name}": np.asarray(value) for name, value in self._memory.items()}
        found |= {f"values {number}": value for number, value in enumerate(self._values)}
        found |= {f"width {name}": np.asarray(value) for name, value in self._widths.items()}
        found |= {
            "mean": np.array(self._mean, np.float64),
            "losses": np.array(self._losses, np.float64), "descents": np.array(self._descents, np.float64),
            "counts": np.array([self.done, self._turn]), "now": _text(updates_text(self.updates)),
            "moved": _text(" ".join(sorted(self.moved))),
        }  # fmt: skip
        return found if self._probe is None else {**found, "probe": self._probe}

    def load(self, arrays: Mapping[str, Array], tensors: Mapping[str, Floats]) -> None:
        """Go on from what `state` gave, with the weights of then; before `begin`."""
        self._memory = dict(_named(arrays, "memory "))
        self._values = [np.asarray(value) for _, value in sorted(_named(arrays, "values "))]
        self._losses.extend(arrays["losses"].tolist())
        self._descents = arrays["descents"].tolist()
        self.done, self._turn = map(int, arrays["counts"])
        self.updates = read_updates(_read(arrays["now"]), "checkpoint")
        self.moved = set(_read(arrays["moved"]).split())
        self._mean = np.asarray(arrays["mean"]).tolist()
        if self._precision is not None:
            self._widths, self.widths = dict(_named(arrays, "width ")), []
            bits = self._precision.bits[int(self._widths["stage"])]
            self._backbone = replace(self._backbone, engine=replace(self._backbone.engine, keep_bits=bits))
        if "probe" in arrays:
            self._probe = np.asarray(arrays["probe"])
        self._backbone = replace(self._backbone, tensors=dict(tensors))


def _named(arrays: Mapping[str, Array], kind: str) -> Iterator[tuple[str, Array]]:
    return ((name.removeprefix(kind), value) for name, value in arrays.items() if name.startswith(kind))


def _text(text: str) -> Array:
    return np.frombuffer(text.encode(), np.uint8)


def _read(array: Array) -> str:
    return bytes(np.asarray(array, np.uint8)).decode()
