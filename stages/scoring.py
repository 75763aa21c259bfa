"""The stage `score-layers`: how much each layer matters for a task, and which of them train under the budgets.

TinyTrain's online stage (arXiv:2307.09988, Algorithm 1, steps 1-4): one Fisher pass over the support set, a criterion,
a selector. Or a plan that was named or written by hand, which needs no Fisher pass unless its channels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from stages.artifacts.records import Array, Block, Head, LayerUpdate, Plan, Run
from stages.cost.latency import Durations, durations
from stages.cost.model import full_backward_macs
from stages.cost.training import HEAD, live_values, whole_update, with_head
from stages.errors import BudgetError, UsageError, require
from stages.importance.criteria import CRITERIA
from stages.importance.fisher import Fisher, fisher_bytes, fisher_pass
from stages.importance.tasks import TASKS, build_task
from stages.methods.layer_scores import GRADIENTS, LAYERS, SEARCHES, Search, candidates, detached, scores_of
from stages.models.deploy import Backbone, deploy
from stages.models.graph import Graph, Op
from stages.planning import problem as planning
from stages.planning.baselines import named_plan
from stages.planning.budget import Budget, format_bytes, parse_latency, parse_macs, parse_memory
from stages.planning.channels import ChannelEvidence, axis_of, channel_rule, top_channels
from stages.planning.knapsack import COMPARISON, knapsack
from stages.planning.layers import SELECTORS, select_layers
from stages.planning.plans import Ranking, make_plan, parse_plan

SEARCH = ("search", "criterion", "select", "channels", "ratios", "train_bias", "blocks", "layers")
"""Settings of the search, which have no meaning beside a plan that is given."""

MEMORY, MACS = "1MB", "15%"
"""TinyTrain's budgets, which a search keeps unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How layers and channels are scored and selected, or which plan is taken instead.

    Raises `UsageError` for a value that cannot be read, and for settings of the search beside a given plan.
    """

    plan: str | None = None
    """A named plan instead of a search."""
    plan_text: str | None = None
    """The text of a hand-made plan instead of a search."""
    plan_file: str = "plan.toml"
    """Its file's name: says whether it is TOML or JSON."""
    memory: str | None = None
    """Budget such as `1MB` or `512KiB`. None: `MEMORY` for a search, no limit for a given plan."""
    macs: str | None = None
    """Budget of the backward pass per sample: `6.5M`, or a share of full training's such as `15%`. None: as above."""
    latency: str | None = None
    """Budget such as `200ms`, predicted from the profile's measurements on this device. None: no limit."""
    memory_model: str = "paper"
    batch: int = 1
    """Samples whose activations training keeps at once."""
    optimizer: str = "adam"
    search: str = "tinytrain"
    """One of `SEARCHES`: what the five settings after it are where they are None."""
    criterion: str | None = None
    select: str | None = None
    layers: str | None = None
    """Which of the inspected layers may train: one of `LAYERS`."""
    gradient: str | None = None
    """How gradients flow back: one of `GRADIENTS`. With a given plan None is exact."""
    ratios: tuple[float, ...] | None = None
    """Channel ratios that the selector may choose from."""
    channels: str = "output"
    """The axis that channels are counted along."""
    channel_rule: str | None = None
    """What ranks channels. None: `fisher` for a search, `l2` for a given plan."""
    train_bias: bool = False
    blocks: int = 6
    """Only the last so many blocks, and what follows them, are inspected."""
    head: str | None = None
    """`prototypes` or `linear`: whose loss counts. None: linear where the run has a linear head."""
    micro_batch: int = 1
    """Samples looked at together; more take more memory and less time, and give the same result."""

    def __post_init__(self) -> None:
        require(self.search in SEARCHES, "--search", repr(self.search), "one of " + ", ".join(SEARCHES))
        require(
            self.criterion in (None, *CRITERIA), "--criterion", repr(self.criterion), "one of " + ", ".join(CRITERIA)
        )
        require(self.select in (None, *SELECTORS), "--select", repr(self.select), "one of " + ", ".join(SELECTORS))
        require(self.layers in (None, *LAYERS), "--layers", repr(self.layers), "one of " + ", ".join(LAYERS))
        require(
            self.gradient in (None, *GRADIENTS), "--gradient", repr(self.gradient), "one of " + ", ".join(GRADIENTS)
        )
        require(self.head in (None, *TASKS), "--head", repr(self.head), "one of " + ", ".join(TASKS))
        require(self.blocks > 0, "--blocks", str(self.blocks), "at least 1")
        require(self.micro_batch > 0, "--micro-batch", str(self.micro_batch), "at least 1")
        require(self.plan is None or self.plan_text is None, "--plan", "a name and a file", "one of them")
        self.budget(full_macs=10**6)
        self.channel_choice()
        default = {field.name: field.default for field in fields(type(self))}
        ignored = [name for name in SEARCH if self.given and getattr(self, name) != default[name]]
        require(not ignored, "a plan that is given", f"settings of the search: {', '.join(ignored)}", "none beside it")

    @property
    def given(self) -> bool:
        """Whether the plan is given, not searched for."""
        return self.plan is not None or self.plan_text is not None

    def how(self) -> Search:
        """How to search, with what the user chose in place; for a given plan only the gradient counts."""
        named = SEARCHES[self.search]
        chosen = {field.name: getattr(self, field.name) for field in fields(Search)}
        return replace(named, **{name: value for name, value in chosen.items() if value is not None})

    def budget(self, full_macs: int) -> Budget:
        """The limits in numbers; shares are shares of `full_macs`."""
        memory, macs = (self.memory, self.macs) if self.given else (self.memory or MEMORY, self.macs or MACS)
        return Budget(
            memory_bytes=None if memory is None else parse_memory(memory),
            backward_macs=None if macs is None else parse_macs(macs, full_macs),
            latency_s=None if self.latency is None else parse_latency(self.latency),
            memory_model=self.memory_model,
            batch=self.batch,
            optimizer=self.optimizer,
        )

    def channel_choice(self) -> planning.Channels:
        """How a search chooses channels; for a given plan only the rule counts."""
        rule = self.channel_rule or ("l2" if self.given else "fisher")
        return planning.Channels(ratios=self.how().ratios, axis=self.channels, rule=rule, bias=self.train_bias)


@dataclass(frozen=True)
class _Job:
    """What the steps of one call share."""

    run: Run
    support: Block | None
    config: Scoring
    rng: np.random.Generator
    on_step: Callable[[int], None]
    backbone: Backbone

    @property
    def head_kind(self) -> str:
        head = self.run.model.head
        return self.config.head or (head.kind if head is not None else "prototypes")

    @property
    def weights(self) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in self.backbone.tensors.items()}

    def fisher(self, window: Sequence[str]) -> tuple[Fisher, Head, dict[str, Any]]:
        """The Fisher pass over the support, the head whose loss it used, and what is worth keeping about the pass."""
        if self.support is None:
            raise UsageError("--support", "missing", "samples of the task", "or --plan with channels chosen by l2")
        size = self.config.micro_batch
        task = build_task(self.head_kind, self.backbone, self.support, self.run.model.head, self.rng)
        found = fisher_pass(self.backbone, task.batches(size), task.loss, window, on_step=self.on_step)
        kept = fisher_bytes(self.backbone.graph, window, min(size, found.samples))
        return found, task.head, {"samples": found.samples, "loss": found.loss, "fisher_pass_bytes": kept}


def score_layers(
    run: Run,
    support: Block | None,
    config: Scoring,
    *,
    rng: np.random.Generator,
    on_step: Callable[[int], None] = lambda done: None,
    allow: str | None = None,
) -> Run:
    """The run with a plan, and with scores where they were searched for.

    `on_step` gets the number of samples done; `allow` names user code that may be imported. The support may be None
    for a given plan unless its channels are chosen by Fisher.

    Raises `DataError` for a support that says nothing (empty, one class, not finite) or a plan of another model,
    `UsageError` for settings that do not fit the model, `BudgetError` when nothing fits.
    """
    job = _Job(run, support, config, rng, on_step, deploy(run.model, allow=allow))
    return _given(job) if config.given else _searched(job)


# --------------------------------------------------------------------------------------------------- a plan searched


def _searched(job: _Job) -> Run:
    graph, config, how = job.backbone.graph, job.config, job.config.how()
    window = candidates(graph, config.blocks, how.layers)
    fisher, head, facts = job.fisher(window)
    scores = scores_of(how.criterion, job.backbone, fisher, window, job.rng)
    costs = _costs(job, head)
    problem = planning.pose(
        costs.graph, scores, costs.budget, config.channel_choice(), planning.Evidence(job.weights, job.rng),
        fixed=costs.fixed, measured=costs.measured, detached=costs.detached,
    )  # fmt: skip
    found = select_layers(problem, how.select)
    optimum = found if how.select == "knapsack" else knapsack(problem, COMPARISON)
    facts |= {"score": found.score} | ({"optimum_score": optimum.score} if optimum.optimal else {})
    return replace(job.run, scores=scores, plan=_plan(how.select, problem, found.updates, facts))


# ------------------------------------------------------------------------------------------------------ a plan given


def _given(job: _Job) -> Run:
    rule, head = job.config.channel_choice().rule, job.run.model.head
    facts: dict[str, Any] = {}
    name, updates = _read_plan(job, _ranking(job, "l2"))
    if rule == "fisher":
        fisher, head, facts = job.fisher([update.layer for update in updates])
        _, updates = _read_plan(job, _ranking(job, rule, fisher))
    elif rule != "l2":
        _, updates = _read_plan(job, _ranking(job, rule))
    costs = _costs(job, head)
    if not costs.fits(updates):
        memory, macs, _ = costs.usage(updates)
        found = f"{format_bytes(memory)} and {macs:,} backward MACs"
        raise BudgetError(f"plan {name}", found, f"at most {costs.budget}", "raise the budget, or search for a plan")
    return replace(job.run, plan=_plan(name, costs, updates, facts))


def _read_plan(job: _Job, ranking: Ranking) -> tuple[str, tuple[LayerUpdate, ...]]:
    """Name and updates of the given plan, channels by the ranking wherever the plan leaves them open."""
    graph, config = job.backbone.graph, job.config
    if config.plan_text is not None:
        return parse_plan(config.plan_text, config.plan_file, graph, ranking)
    name = config.plan or ""
    updates = named_plan(name, graph, tensors_l2=job.weights)
    return name, tuple(_rechosen(graph[update.layer], update, ranking) for update in updates)


def _rechosen(op: Op, update: LayerUpdate, ranking: Ranking) -> LayerUpdate:
    """The same number of channels, the best by the ranking."""
    if len(update.channels) in (0, update.axis_channels):
        return update
    return replace(update, channels=top_channels(ranking(op, update.axis), len(update.channels)))


def _ranking(job: _Job, rule: str, fisher: Fisher | None = None) -> Ranking:
    weights = job.weights

    def rank(op: Op, axis: str) -> Array:
        axis, channels = axis_of(op, axis)
        side = None if fisher is None else (fisher.output if axis == "output" else fisher.input)[op.name]
        return channel_rule(rule)(ChannelEvidence(op, axis, channels, side, weights[f"{op.name}.weight"], job.rng))

    return rank


# -------------------------------------------------------------------------------------------------------------- costs


def _costs(job: _Job, head: Head | None) -> planning.Problem:
    """What plans are checked against, without candidates. A linear head always trains, so every plan pays for it."""
    graph: Graph = job.backbone.graph
    fixed: tuple[LayerUpdate, ...] = ()
    if head is not None and job.head_kind == "linear":
        graph = with_head(graph, len(head.labels))
        fixed = (whole_update(graph[HEAD]),)
    budget = job.config.budget(full_backward_macs(graph))
    measured = _with_free_head(durations(job.run.profile)) if budget.latency_s is not None else None
    return planning.Problem(graph, (), budget, fixed, measured, detached(graph, job.config.how().gradient))


def _with_free_head(measured: Durations) -> Durations:
    """The profile measures the backbone; a linear head's time is too small to matter beside it."""
    return replace(
        measured,
        input_gradient_ns={**measured.input_gradient_ns, HEAD: 0},
        weight_gradient_ns={**measured.weight_gradient_ns, HEAD: 0},
    )


def _plan(name: str, problem: planning.Problem, updates: Sequence[LayerUpdate], facts: Mapping[str, Any]) -> Plan:
    """The plan record; it costs what the updates and what always trains with them cost together."""
    budget = problem.budget
    memory, macs, latency_ns = problem.usage(updates)
    known = {
        "budget_memory_bytes": budget.memory_bytes,
        "budget_macs": budget.backward_macs,
        "budget_latency_s": budget.latency_s,
        "latency_s": latency_ns / 1e9 if problem.measured else None,
        "full_backward_macs": full_backward_macs(problem.graph),
        "model_layers": len(problem.graph.layers) - len(problem.fixed),
        "live_values": live_values(problem.graph, updates),
        **facts,
    }
    plan = make_plan(
        name, problem.complete(updates), problem.graph,
        memory_model=budget.memory_model, batch=budget.batch, optimizer=budget.optimizer,
        facts={name: value for name, value in known.items() if value is not None},
    )  # fmt: skip
    return replace(plan, memory_bytes=memory, backward_macs=macs)
