"""The stage `score-layers`: how much each layer matters for a task, and which of them train under the budgets.

TinyTrain's online stage (arXiv:2307.09988, Algorithm 1, steps 1-4): one Fisher pass over the support set, a criterion,
a selector. Or a plan that was named or written by hand, which needs no Fisher pass unless its channels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from stages.artifacts.records import Array, Block, LayerUpdate, Plan, Run
from stages.cost.model import full_backward_macs
from stages.cost.training import live_values
from stages.errors import BudgetError, UsageError, require
from stages.importance.criteria import CRITERIA
from stages.importance.fisher import Fisher, fisher_bytes, fisher_pass
from stages.importance.tasks import TASKS, build_task
from stages.methods.layer_scores import GRADIENTS, LAYERS, SEARCHES, Search
from stages.methods.search import Wish, costs_of, search, weights_of
from stages.models.deploy import Backbone, deploy
from stages.operators import Op
from stages.planning import problem as planning
from stages.planning.baselines import named_plan
from stages.planning.budget import Budget, format_bytes, parse_latency, parse_macs, parse_memory
from stages.planning.channels import ChannelEvidence, axis_of, channel_rule, top_channels
from stages.planning.knapsack import COMPARISON, knapsack
from stages.planning.layers import SELECTORS
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
    def wish(self) -> Wish:
        config = self.config
        return Wish(config.how(), config.channel_choice(), config.budget, config.blocks, config.micro_batch)

    def needed_support(self) -> Block:
        if self.support is None:
            raise UsageError("--support", "missing", "samples of the task", "or --plan with channels chosen by l2")
        return self.support

    def facts(self, fisher: Fisher, window: Sequence[str]) -> dict[str, Any]:
        """What is worth keeping about a Fisher pass."""
        kept = fisher_bytes(self.backbone.graph, window, min(self.config.micro_batch, fisher.samples))
        return {"samples": fisher.samples, "loss": fisher.loss, "fisher_pass_bytes": kept}


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
    found = search(
        job.backbone, job.needed_support(), job.wish, job.rng,
        kind=job.head_kind, head=job.run.model.head, profile=job.run.profile, on_step=job.on_step,
    )  # fmt: skip
    how = job.wish.how
    optimum = found.choice if how.select == "knapsack" else knapsack(found.problem, COMPARISON)
    facts = job.facts(found.fisher, found.scores.layer)
    facts |= {"score": found.choice.score} | ({"optimum_score": optimum.score} if optimum.optimal else {})
    plan = _plan(how.select, found.problem, found.choice.updates, facts)
    return replace(job.run, scores=found.scores, plan=plan)


# ------------------------------------------------------------------------------------------------------ a plan given


def _given(job: _Job) -> Run:
    rule, head = job.config.channel_choice().rule, job.run.model.head
    facts: dict[str, Any] = {}
    name, updates = _read_plan(job, _ranking(job, "l2"))
    if rule == "fisher":
        window = [update.layer for update in updates]
        task = build_task(job.head_kind, job.backbone, job.needed_support(), head, job.rng)
        batches = task.batches(job.config.micro_batch)
        fisher = fisher_pass(job.backbone, batches, task.loss, window, on_step=job.on_step)
        head, facts = task.head, job.facts(fisher, window)
        _, updates = _read_plan(job, _ranking(job, rule, fisher))
    elif rule != "l2":
        _, updates = _read_plan(job, _ranking(job, rule))
    costs = costs_of(job.backbone.graph, job.wish, head if job.head_kind == "linear" else None, job.run.profile)
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
    updates = named_plan(name, graph, tensors_l2=weights_of(job.backbone))
    return name, tuple(_rechosen(graph[update.layer], update, ranking) for update in updates)


def _rechosen(op: Op, update: LayerUpdate, ranking: Ranking) -> LayerUpdate:
    """The same number of channels, the best by the ranking."""
    if len(update.channels) in (0, update.axis_channels):
        return update
    return replace(update, channels=top_channels(ranking(op, update.axis), len(update.channels)))


def _ranking(job: _Job, rule: str, fisher: Fisher | None = None) -> Ranking:
    weights = weights_of(job.backbone)

    def rank(op: Op, axis: str) -> Array:
        axis, channels = axis_of(op, axis)
        side = None if fisher is None else (fisher.output if axis == "output" else fisher.input)[op.name]
        return channel_rule(rule)(ChannelEvidence(op, axis, channels, side, weights[f"{op.name}.weight"], job.rng))

    return rank


# -------------------------------------------------------------------------------------------------------------- costs


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
