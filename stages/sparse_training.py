"""The stage `train-sparse`: update exactly the live channels of a plan, from a support set or from a stream.

A support set adapts the backbone with the ProtoNet loss and leaves prototypes in the run's head (TinyTrain,
arXiv:2307.09988). A stream trains the backbone's live channels and a linear head, which is always live, with one update
per block and the weighted loss sum_i w_i * l_i (Titan, KDD 2025).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from stages.artifacts.history import model_hash
from stages.artifacts.records import (
    Array,
    Block,
    Head,
    InputSpec,
    LayerUpdate,
    Model,
    Plan,
    Preparation,
    Profile,
    Run,
    Scores,
    check_labelled,
)
from stages.cost.latency import durations
from stages.data.blocks import check_prepared
from stages.engines.choice import TrainedNet, make_net
from stages.engines.parameter import Floats
from stages.errors import DataError, EdgeTrainError, StreamBroken, TransferError, require
from stages.graphs.graph import Graph
from stages.graphs.keeping import value_bytes
from stages.measurement.need import to_train
from stages.measurement.room import Fit, fit, room
from stages.methods.layer_scores import SEARCHES, candidates, scores_of
from stages.methods.revision import Revising, probe_rows
from stages.methods.scheduling import mark_of_plan, schedule_within, scheduling
from stages.methods.search import Wish, inspect_task
from stages.models import heads
from stages.models.deploy import Backbone, deploy, store
from stages.models.inputs import adapt_block as model_input
from stages.planning.baselines import named_plan
from stages.planning.budget import format_bytes
from stages.planning.plans import check_plan
from stages.planning.policies import Room, parse_policy, room_of, search_of
from stages.planning.precision import BLOCKS, PrecisionSchedule, parse_schedule
from stages.planning.schedules import PAGE, RECOMPUTE, read_schedule
from stages.randomness import generator
from stages.training.adaptation import Adapting, adapt, adaptation_inputs
from stages.training.caching import worth_of
from stages.training.checkpoints import Checkpoint, read_checkpoint
from stages.training.learner import Batch, StreamLearner
from stages.training.optimizers import Optimizing, load_state, state_arrays
from stages.training.prefix_file import PrefixFile
from stages.training.updates import PrefixCache, Source, boundary_of

STAGE = "train-sparse"
"""Name of the metrics' table in the run record."""
REVISIONS = "train-sparse revisions"
"""Name of the table of plans that a policy made: `layer` is the number among the model's layers, -1 for none."""

WIDTHS = "train-sparse widths"
"""Name of the table of the widths of a precision schedule."""

Publish = Callable[[int, Mapping[str, Array], Head, Sequence[LayerUpdate] | None], None]
"""Gets the number of updates since the run began, the tensors that train (whole), the head, and what trains next where
a policy revises the plan.

The tensors are the trainer's own, which the next update changes: a receiver that keeps them copies them.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportTraining:
    """Training on a support set."""

    plan: str | None = None
    """A named plan, such as `full` or `last-layer`; None takes the run's own."""
    adapting: Adapting = field(default_factory=Adapting)
    engine: str = "auto"
    """What runs and differentiates the graph: one of `engines.choice.ENGINES`."""
    device: str = "cpu"
    """Of torch's engine: one of `engines.choice.DEVICES`."""
    same_bits: bool = False
    """Of the native engine: features and gradients that do not depend on the machine."""
    policy: str = "static"
    """How the plan is revised while training (`planning.policies.parse_policy`)."""
    keep_bits: int | None = None
    """In which inputs of live layers are kept: 32, 16 or 8; None: as the plan says."""
    keep_rounding: str = "stochastic"
    """To these bits: `stochastic` or `nearest`."""
    precision: str | None = None
    """Widths in which these inputs are kept, one after the other (`planning.precision.parse_schedule`)."""
    ram_bytes: int | None = None
    """What the values of a sample may take; more is made again, or paged, than kept. None keeps everything."""
    schedule: str | None = None
    """A schedule of memory as text (`planning.schedules.Schedule.text`), to be replayed."""
    page_dir: str | None = None
    """A folder where values may be paged to."""
    ram_least: str = "time"
    """What a schedule takes the least of: `time` or `energy`."""
    auto_cache: bool = False
    """Decide by measured times and free memory whether the frozen layers' outputs are kept, instead of
    `adapting.cache_prefix`."""
    fitting: bool = False
    """Take as many samples at a time as fit into memory, at most `MICRO_BATCH`, instead of `adapting.micro_batch`."""


MICRO_BATCH = 64
"""Most samples that are in memory at once where nobody says otherwise."""

STREAM_OPTIMIZING = Optimizing(optimizer="sgd", learning_rate=0.02, clip_norm=2.0)
"""Plain SGD, which Titan's theory is about. Titan states a rate of 0.1, at which a small CNN lost a third of its
accuracy; 0.02 was best there. Why the gradient is limited: docs/decisions.md, "Training"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamTraining:
    """Training on a stream of blocks."""

    plan: str | None = None
    """A named plan, such as `full` or `last-layer`; None takes the run's own."""
    optimizing: Optimizing = STREAM_OPTIMIZING
    micro_batch: int | None = None
    """Samples of a block that are in memory at once in a pass; 0 is all of them, None as many as fit, at most
    `MICRO_BATCH`. The update is the same."""
    engine: str = "auto"
    """What runs and differentiates the graph: one of `engines.choice.ENGINES`."""
    device: str = "cpu"
    """Of torch's engine: one of `engines.choice.DEVICES`."""
    same_bits: bool = False
    """Of the native engine: features and gradients that do not depend on the machine."""
    policy: str = "static"
    """How the plan is revised while training (`planning.policies.parse_policy`)."""
    keep_bits: int | None = None
    """In which inputs of live layers are kept: 32, 16 or 8; None: as the plan says."""
    keep_rounding: str = "stochastic"
    """To these bits: `stochastic` or `nearest`."""
    precision: str | None = None
    """Widths in which these inputs are kept, one after the other (`planning.precision.parse_schedule`)."""
    ram_bytes: int | None = None
    """What the values of a sample may take; more is made again, or paged, than kept. None keeps everything."""
    schedule: str | None = None
    """A schedule of memory as text (`planning.schedules.Schedule.text`), to be replayed."""
    page_dir: str | None = None
    """A folder where values may be paged to."""
    ram_least: str = "time"
    """What a schedule takes the least of: `time` or `energy`."""

    def __post_init__(self) -> None:
        require((self.micro_batch or 0) >= 0, "micro-batch", f"{self.micro_batch}", "at least 0")
        parse_policy(self.policy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdout:
    """Samples on which accuracy is watched while training."""

    block: Block
    every: int = 10
    """Updates from one measurement to the next."""

    def __post_init__(self) -> None:
        require(len(self.block) > 0, "holdout", "no samples", "at least one")
        require(self.every > 0, "holdout", f"every {self.every} updates", "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpointing:
    """Where checkpoints go: `write` gets a record from which `train_stream(..., resume=...)` goes on."""

    write: Callable[[Run], None]
    every: int = 100
    """Updates from one checkpoint to the next; the last state is always written."""

    def __post_init__(self) -> None:
        require(self.every > 0, "checkpoint", f"every {self.every} updates", "at least 1")


@dataclass(frozen=True)
class Update:
    """What one block did; the rows of the run's metrics."""

    version: int
    """Updates since the run began, this one included."""
    round: int
    """Of the streaming pipeline; the block's number where it has none."""
    loss: float
    learning_rate: float
    samples: int
    weight_sum: float
    accuracy: float
    """On the holdout; NaN where it was not measured."""


class TrainingStopped(EdgeTrainError):
    """Training on a stream could not go on. `run` is the last good version; the exit code is the cause's."""

    def __init__(self, run: Run, cause: EdgeTrainError | OSError, updates: int) -> None:
        if not isinstance(cause, EdgeTrainError):
            cause = TransferError(cause.filename or "input or output", cause.strerror or str(cause))
        where = f"after {updates} updates" + (f": {cause.where}" if cause.where else "")
        super().__init__(where, cause.found, cause.expected, cause.fix)
        self.run, self.exit_code = run, cause.exit_code


# ------------------------------------------------------------------------------------------------------- support sets


def train_support(
    run: Run,
    support: Block,
    config: SupportTraining,
    *,
    rng: np.random.Generator,
    on_step: Callable[[int], None] = lambda done: None,
    stop: Callable[[], int] = lambda: 0,
    cache_file: PrefixFile | None = None,
    on_fit: Callable[[Fit], None] = lambda fit: None,
    on_note: Callable[[str], None] = lambda text: None,
    allow: str | None = None,
) -> Run:
    """The run adapted to a support set, with the class means of the adapted features as its head.

    A cosine scale that the run has learned takes the place of `config.adapting.scale`.

    Args:
        on_step: gets the number of iterations done, those of the choice of the learning rate included.
        stop: asked before every iteration; not 0 ends training with the current weights.
        cache_file: where `adapting.cache_prefix` keeps the frozen layers' outputs for the next time.
        on_fit: gets how many samples are in memory at once.
        on_note: gets a line where another engine computes than a user would expect.
        allow: the user's model factory that may be imported, `package.module:factory`.

    Raises:
        DataError: no plan, or one of another model; samples that do not fit; a loss that is not finite.
    """
    if not len(support):
        raise DataError("support", "no samples", "at least one per class")
    check_labelled(support.y, "support")
    backbone = deploy(
        run.model,
        allow=allow,
        engine=config.engine,
        device=config.device,
        same_bits=config.same_bits,
        keep_bits=_keep_bits(run, config),
        keep_rounding=config.keep_rounding,
        on_note=on_note,
    )
    updates = planned_updates(run, backbone.graph, config.plan)
    backbone, schedule = _scheduled(run, backbone, updates, config, on_note)
    x = model_input(support, backbone.input)
    labels, ways = np.unique(support.y, return_inverse=True)
    inputs = adaptation_inputs(config.adapting, len(support)) - len(support)  # which are there already
    wanted = None if config.fitting else config.adapting.micro_batch
    held = _fit(backbone, updates, config.adapting.optimizing, wanted, inputs)
    on_fit(held)
    how = replace(config.adapting, scale=heads.cosine_scale(run.model.head, config.adapting.scale))
    how = replace(how, micro_batch=held.samples) if config.fitting else how
    if config.auto_cache:
        how = replace(how, cache_prefix=_pays(backbone, updates, x, how, on_note))
    follow = _support_follower(run, support, x, backbone, updates, config, how)
    result = adapt(backbone, updates, x, ways.astype(np.int64), how, rng, on_step, stop, cache_file, follow)
    head = heads.prototype_head(result.prototypes, labels, heads.class_names(support), scale=how.scale)
    model = _prepared(store(run.model, replace(backbone, tensors=result.net.tensors())), support.prepared)
    version = run.model.version + len(result.losses)
    rows = {
        "version": np.arange(run.model.version, version) + 1,
        "loss": np.array(result.losses),
        "learning_rate": np.full(len(result.losses), result.learning_rate),
        "samples": np.full(len(result.losses), len(support)),
    }
    done = _with_rows(replace(run, model=replace(model, head=head, version=version)), rows)
    done = _with_schedule(done, schedule, config.plan)
    follower = result.follower
    if not isinstance(follower, Revising):
        return done
    return _with_revisions(done, backbone.graph, follower, run.model.version)


def _pays(
    backbone: Backbone,
    updates: tuple[LayerUpdate, ...],
    x: Floats,
    how: Adapting,
    on_note: Callable[[str], None],
) -> bool:
    """Whether keeping the frozen layers' outputs pays, and a line that says so."""
    worth = worth_of(make_net(backbone, updates), x, how, room())
    does = "are kept" if worth.pays else "are made anew each time"
    times = f"{1e3 * worth.run_s:.2g} ms to run, {1e3 * worth.read_s:.2g} ms to read"
    on_note(f"frozen layers' outputs {does}: {format_bytes(worth.bytes)} in all; a sample takes {times}")
    return worth.pays


def _support_follower(
    run: Run,
    support: Block,
    x: Floats,
    backbone: Backbone,
    updates: tuple[LayerUpdate, ...],
    config: SupportTraining,
    how: Adapting,
) -> Callable[[], Revising] | None:
    """What makes somebody who revises the plan of one training on the support, if anybody does."""
    policy, precision = parse_policy(config.policy), _precision(config)
    if policy.name == "static" and precision is None:
        return None
    plan = run.plan if config.plan is None else None
    room = _room(backbone, plan, updates, how.optimizing.optimizer, None, run.profile)
    probe = x[probe_rows(support.y)] if policy.kind.needs == "outputs" else None

    def score(now: Backbone) -> Scores | None:
        rescoring = _Rescoring("prototypes", run.model.head, policy.criterion, how.micro_batch or len(support), 0)
        return _scores(now, support, room, plan, rescoring)

    def follow() -> Revising:
        rng = generator(0, "policy")
        return Revising(policy, backbone, updates, room, probe=probe, score=score, rng=rng, precision=precision)

    return follow


def _precision(config: SupportTraining | StreamTraining) -> PrecisionSchedule | None:
    return None if config.precision is None else parse_schedule(config.precision)


class _Rescoring(NamedTuple):
    """How layers are scored while training."""

    kind: str
    """Whose loss counts: `prototypes` or `linear`."""
    head: Head | None
    criterion: str
    """Empty: that of the search for the plan."""
    micro_batch: int
    number: int
    """What draws its views and random scores apart from others."""


def _scores(backbone: Backbone, samples: Block, room: Room, plan: Plan | None, how: _Rescoring) -> Scores | None:
    """Scores of the room's candidates with the weights as they are; None for samples that say nothing."""
    rng = generator(0, "rescore", how.number)
    wish = Wish(SEARCHES["tinytrain"], room.channels, lambda macs: room.problem.budget, 1, lambda *_: how.micro_batch)
    try:
        seen = inspect_task(backbone, samples, room.candidates, wish, rng, kind=how.kind, head=how.head)
    except DataError:
        return None  # a block of a single class, where every answer is right
    criterion = how.criterion or str(search_of(plan)["criterion"])
    return scores_of(criterion, backbone, seen.fisher, room.candidates, rng)


def _room(
    backbone: Backbone,
    plan: Plan | None,
    updates: tuple[LayerUpdate, ...],
    optimizer: str,
    head: Head | None,
    profile: Profile | None,
) -> Room:
    """What revised plans keep within."""
    graph, how = backbone.graph, search_of(plan)
    window = candidates(graph, int(how["blocks"]), str(how["layers"]))
    return room_of(
        graph, plan, updates, window, classes=0 if head is None else len(head.labels), optimizer=optimizer,
        measured=None if profile is None else durations(profile), weights=backbone.tensors,
    )  # fmt: skip


def _with_revisions(run: Run, graph: Graph, follower: Revising, start: int) -> Run:
    """The run with a table of every plan's layers, from which version on they train, and how much of them; and one of
    the widths in which inputs were kept, where they changed."""
    if follower.widths:
        widths = np.array(follower.widths, np.float64)
        run = _with_rows(run, {"version": start + widths[:, 0], "keep_bits": widths[:, 1]}, WIDTHS)
    numbers = {op.name: number for number, op in enumerate(graph.layers)}
    rows = [
        (start + each.update, numbers.get(update.layer, -1), len(update.channels), len(update.bias))
        for each in follower.revisions
        for update in each.updates or (LayerUpdate("", "output", (), 1),)
        if update.trains or not each.updates
    ]
    names = ("version", "layer", "live_channels", "live_biases")
    columns = {name: np.array([row[i] for row in rows], np.float64) for i, name in enumerate(names)}
    return _with_rows(run, columns, REVISIONS)


def _prepared(model: Model, prepared: Preparation | None) -> Model:
    """The model with how the samples were prepared that it has learnt from."""
    return replace(model, input=replace(model.input, prepared=prepared))


def _fit(
    backbone: Backbone, updates: Sequence[LayerUpdate], how: Optimizing, wanted: int | None, inputs: int = 0
) -> Fit:
    """How many samples fit beside this many inputs."""
    other = value_bytes(backbone.graph, backbone.graph.ops[0].name, inputs)
    most = max(MICRO_BATCH, wanted or 0)
    return fit(to_train(backbone, updates, how.state_values), most, other_bytes=other, wanted=wanted)


def _scheduled(
    run: Run,
    backbone: Backbone,
    updates: tuple[LayerUpdate, ...],
    config: SupportTraining | StreamTraining,
    on_note: Callable[[str], None],
) -> tuple[Backbone, str]:
    """The backbone as it runs within `config.ram_bytes`, and the schedule as text; empty where everything is kept."""
    if config.ram_bytes is None and config.schedule is None:
        return backbone, ""
    policy = parse_policy(config.policy)
    found = f"with --policy {policy.name}, which revises the plan"
    require(policy.name in ("static", "rotate"), "--ram", found, "static or rotate", "leave one of the two out")
    mark = mark_of_plan(backbone.graph, updates)
    if config.schedule is not None:
        schedule = read_schedule(config.schedule, mark, "--memory-schedule")
    else:
        made = scheduling(backbone, updates, profile=run.profile, page_dir=config.page_dir, least=config.ram_least)
        schedule = schedule_within(made, config.ram_bytes or 0)
        again, paged = (list(schedule.how.values()).count(way) for way in (RECOMPUTE, PAGE))
        step = sum(made.costs.links)
        share = f", about {100 * schedule.seconds / step:.2g} % of a forward pass" if step else ""
        on_note(f"a sample's values take {format_bytes(schedule.peak_bytes)}: {again} made again, {paged} paged{share}")
    engine = replace(backbone.engine, how=tuple(sorted(schedule.how.items())), page_dir=config.page_dir or "")
    return replace(backbone, engine=engine), schedule.text(mark)


SCHEDULE = "schedule"
"""Where a run record has the schedule of memory that ran: a fact of its plan, or an attribute for a named plan."""


def _with_schedule(run: Run, schedule: str, plan: str | None) -> Run:
    """The run with the schedule that ran; `plan` is the named plan that trained, if one did."""
    if not schedule:
        return run
    if run.plan is None or plan is not None:
        return replace(run, extra=replace(run.extra, attrs={**run.extra.attrs, SCHEDULE: schedule}))
    return replace(run, plan=replace(run.plan, facts={**run.plan.facts, SCHEDULE: schedule}))


def schedule_of(run: Run) -> str:
    """The schedule of memory by which a run was trained last; empty for none."""
    by_plan = "" if run.plan is None else run.plan.facts.get(SCHEDULE, "")
    return str(run.extra.attrs.get(SCHEDULE, by_plan))


def _keep_bits(run: Run, config: SupportTraining | StreamTraining) -> int:
    """In how many bits inputs of live layers are kept: as asked, as the plan counted, or as they are."""
    if config.keep_bits is not None:
        return config.keep_bits
    return 32 if run.plan is None or config.plan is not None else int(run.plan.facts.get("keep_bits", 32))


def planned_updates(run: Run, graph: Graph, plan: str | None) -> tuple[LayerUpdate, ...]:
    """What trains: the named plan, or else the run's own.

    Raises:
        DataError: neither is there, or the run's plan is for another model.
        UsageError: no plan of that name.
    """
    if plan is not None:
        return named_plan(plan, graph)
    if run.plan is None:
        fix = "make one with `edgetrain score-layers`, or train with --full or --last-layer"
        raise DataError("run record", "no plan", "/plan, which says what trains", fix)
    check_plan(run.plan, graph)
    return run.plan.updates


# ------------------------------------------------------------------------------------------------------------ streams


def train_stream(
    run: Run,
    blocks: Iterable[Block],
    config: StreamTraining,
    *,
    resume: Run | None = None,
    replayed: bool = True,
    publish: Publish | None = None,
    checkpoint: Checkpointing | None = None,
    holdout: Holdout | None = None,
    stop: Callable[[], int] = lambda: 0,
    on_step: Callable[[Update], None] = lambda update: None,
    on_fit: Callable[[Fit], None] = lambda fit: None,
    on_note: Callable[[str], None] = lambda text: None,
    allow: str | None = None,
) -> Run:
    """The run after one update per block; every block advances the version, an empty one too.

    Args:
        resume: a checkpoint of the same run to go on from.
        replayed: with `resume`, the stream begins anew: the blocks that were used already are passed over.
        publish: gets every version.
        on_fit: gets how many samples are in memory at once.
        on_note: gets a line where another engine computes than a user would expect.
        stop: asked after every update; not 0 ends training as if the stream had ended.
        allow: the user's model factory that may be imported, `package.module:factory`.

    Raises:
        DataError: no block, no plan, a plan of another model, or a first block that cannot be used.
        TrainingStopped: later trouble (a broken stream, a bad block, a loss that is not finite, a full disk): its
            `run` is the run after the last good update.
    """
    trainer = _Trainer(run, config, resume, allow, on_note)
    on_fit(trainer.held)
    if resume is not None and publish is not None and trainer.blocks:
        trainer.publish(publish)
    try:
        try:
            for block in islice(blocks, trainer.blocks if replayed else 0, None):
                on_step(trainer.take(block, holdout))
                if publish is not None:
                    trainer.publish(publish)
                if checkpoint is not None and trainer.blocks % checkpoint.every == 0:
                    checkpoint.write(trainer.checkpoint())
                if stop():
                    break
        finally:
            if checkpoint is not None and trainer.blocks:
                checkpoint.write(trainer.checkpoint())
    except (EdgeTrainError, OSError) as error:
        asked_for = isinstance(error, StreamBroken) and stop()
        if isinstance(error, BrokenPipeError) or not (trainer.blocks or asked_for):
            raise
        if not asked_for:
            raise TrainingStopped(trainer.run(), error, trainer.blocks) from error
    if not trainer.blocks and not stop():
        raise DataError("stream", "no blocks", "at least one", "pipe sample blocks in after the run record")
    return trainer.run() if trainer.blocks else run


class _Trainer:
    """The state of training on a stream, between two blocks."""

    def __init__(
        self,
        run: Run,
        config: StreamTraining,
        resume: Run | None,
        allow: str | None,
        on_note: Callable[[str], None],
    ) -> None:
        self.start = model_hash(run)
        self.configuration = json.dumps(asdict(config), sort_keys=True)
        state = None
        if resume is not None:
            state = read_checkpoint(resume, start=self.start, configuration=self.configuration)
        self.base = run if state is None else state.run
        self.blocks = 0 if state is None else state.blocks
        self.first_version = run.model.version
        self.backbone = deploy(
            self.base.model,
            allow=allow,
            engine=config.engine,
            device=config.device,
            same_bits=config.same_bits,
            keep_bits=_keep_bits(run, config),
            keep_rounding=config.keep_rounding,
            on_note=on_note,
        )
        updates = planned_updates(run, self.backbone.graph, config.plan)
        self.named = config.plan
        self.backbone, self.schedule = _scheduled(run, self.backbone, updates, config, on_note)
        self.held = _fit(self.backbone, updates, config.optimizing, config.micro_batch)
        self.follower = self._follower(run, updates, config)
        self.block: Block | None = None
        """The latest."""
        if self.follower is not None and state is not None:
            self.follower.load(state.policy, self.backbone.tensors)
        self.learner = StreamLearner(
            self.backbone,
            updates,
            self.base.model.head,
            config.optimizing,
            micro_batch=self.held.samples if config.micro_batch is None else config.micro_batch,
            done=self.blocks,
            follower=self.follower,
        )
        if state is not None:
            load_state(self.learner.optimizer, state.optimizer)
        self.rows = {name: array("d") for name in Update.__dataclass_fields__}
        self.prepared = None if state is None else self.base.model.input.prepared

    def take(self, block: Block, holdout: Holdout | None) -> Update:
        """One update from one block. Raises `DataError` for one that was prepared in another way than those before."""
        check_prepared(block.prepared, self.prepared, "stream", "the blocks before it", self.backbone.input)
        self.prepared = self.prepared or block.prepared
        self.block = block
        if self.follower is not None and self.follower.wants_probe and len(block):
            self.follower.meet(model_input(block.take(probe_rows(block.y)), self.backbone.input))
        batch = _batch(block, self.learner.net, self.backbone.input, revised=self.follower is not None)
        figures = self.learner.update(batch)
        self.blocks += 1
        measured = holdout is not None and self.blocks % holdout.every == 0
        update = Update(
            version=self.first_version + self.blocks,
            round=self.blocks - 1 if block.round is None else block.round,
            **asdict(figures),
            accuracy=self._accuracy(holdout.block) if holdout is not None and measured else float("nan"),
        )
        for name, values in self.rows.items():
            values.append(getattr(update, name))
        return update

    def _follower(self, run: Run, updates: tuple[LayerUpdate, ...], config: StreamTraining) -> Revising | None:
        """Who revises the plan, if anybody does."""
        policy, precision = parse_policy(config.policy), _precision(config)
        if policy.name == "static" and precision is None:
            return None
        plan = run.plan if config.plan is None else None
        head = run.model.head
        room = _room(self.backbone, plan, updates, config.optimizing.optimizer, head, run.profile)

        def score(backbone: Backbone) -> Scores | None:
            assert self.block is not None
            how = _Rescoring("linear", self.learner.head(), policy.criterion, self.held.samples, self.blocks)
            return _scores(backbone, self.block, room, plan, how)

        rng = generator(0, "policy")
        return Revising(policy, self.backbone, updates, room, score=score, rng=rng, precision=precision, window=BLOCKS)

    def publish(self, publish: Publish) -> None:
        """The version as it is now: all that has trained, and what trains next where the plan is revised."""
        if self.follower is None:
            publish(self.blocks, self.learner.net.changed_tensors(), self.learner.head(), None)
            return
        tensors = self.learner.net.tensors()
        moved = {name: tensors[name] for name in sorted(self.follower.moved)}
        publish(self.blocks, moved, self.learner.head(), self.follower.plan)

    def run(self) -> Run:
        """The run record after the updates so far."""
        model = store(self.base.model, replace(self.backbone, tensors=self.learner.net.tensors()))
        model = replace(model, head=self.learner.head(), version=self.first_version + self.blocks)
        model = _prepared(model, self.prepared)
        columns = {name: np.array(values) for name, values in self.rows.items()}
        if np.isnan(columns["accuracy"]).all():
            del columns["accuracy"]
        done = _with_schedule(_with_rows(replace(self.base, model=model), columns), self.schedule, self.named)
        if self.follower is None:
            return done
        return _with_revisions(done, self.backbone.graph, self.follower, self.first_version)

    def checkpoint(self) -> Run:
        state, policy = state_arrays(self.learner.optimizer), {} if self.follower is None else self.follower.state()
        return Checkpoint(self.run(), self.blocks, self.start, self.configuration, state, policy).record()

    def _accuracy(self, block: Block) -> float:
        """Share of right answers; classes that the head does not know count as wrong."""
        head, hits = self.learner.head(), 0
        if not len(head.labels):
            return 0.0
        known = heads.extend(head, block.y, heads.class_names(block))
        for part in block.slices(256):
            scores = self.learner.logits(model_input(part, self.backbone.input))
            answers = np.searchsorted(known.labels, head.labels)[scores.argmax(1)]
            hits += int(np.sum(answers == heads.rows(known, part.y, heads.class_names(block))))
        return hits / len(block)


def _batch(block: Block, net: TrainedNet, spec: InputSpec, *, revised: bool) -> Batch:
    """A block as model inputs, with its importance weights or else 1 / N."""
    size = len(block)
    weights = block.columns.get("weight")
    if weights is None:
        weights = np.full(size, 1 / max(size, 1), np.float32)
    elif np.shape(weights) != (size,):
        raise DataError("weight", f"shape {np.shape(weights)}", f"({size},)")
    return Batch(
        _source(block, net, spec, revised=revised), np.asarray(block.y), np.asarray(weights), heads.class_names(block)
    )


def _source(block: Block, net: TrainedNet, spec: InputSpec, *, revised: bool) -> Source:
    """Where training on a block starts: at the model's input, or behind the frozen layers where `select` ran them.

    Where a policy revises the plan, `select` may have run those of the plan before: then training starts at the input.
    """
    if not len(block):
        return np.zeros((0, *spec.shape), np.float32)
    if "boundary" not in block.facts:
        return model_input(block, spec)
    if block.facts["boundary"] != boundary_of(net):
        if revised:
            return model_input(block, spec)
        found, expected = f"features of {block.facts['boundary']}", f"those of {boundary_of(net)}"
        raise DataError("stream", found, expected, "train the plan that `select` was given, with the same engine")
    names = [name for name in block.columns if name.startswith("boundary")]
    return PrefixCache.from_arrays({name: block.columns[name] for name in names})


def _with_rows(run: Run, columns: Mapping[str, Array], stage: str = STAGE) -> Run:
    """The run with rows appended to its training metrics; a column that one side lacks is NaN there."""
    old = run.metrics.get(stage, {})
    return run.with_metrics(
        stage, {name: np.concatenate([_column(table, name) for table in (old, columns)]) for name in {**old, **columns}}
    )


def _column(table: Mapping[str, Array], name: str) -> Array:
    rows = len(next(iter(table.values()), ()))
    return table.get(name, np.full(rows, np.nan))
