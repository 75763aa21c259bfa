"""The stage `score-layers`: how much each layer matters for a task, and which of them train under the budgets.

TinyTrain's online stage (arXiv:2307.09988, Algorithm 1, steps 1-4): one Fisher pass over the support set, a criterion,
a selector. Or a plan that was named or written by hand, which needs no Fisher pass unless its channels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.artifacts.records import Array, Block, LayerUpdate, Plan, Run
from stages.cost.model import full_backward_macs
from stages.cost.training import live_values
from stages.engines.choice import fisher_bytes
from stages.errors import BudgetError, UsageError
from stages.graphs.graph import Graph
from stages.importance.fisher import Fisher
from stages.measurement.need import to_inspect
from stages.measurement.room import Fit, fit
from stages.methods.search import FisherPass, Wish, costs_of, inspect_task, search
from stages.models.deploy import Backbone, deploy
from stages.operators import Op
from stages.planning import problem as planning
from stages.planning.baselines import named_plan
from stages.planning.budget import format_bytes
from stages.planning.channels import ChannelEvidence, axis_of, channel_rule, top_channels
from stages.planning.knapsack import COMPARISON, knapsack
from stages.planning.plans import Ranking, make_plan, parse_plan
from stages.planning.policies import SEARCH, search_text
from stages.settings.scoring import Scoring as Scoring

MICRO_BATCH = 16
"""Most samples that are looked at together unless told otherwise: more would not be faster."""


@dataclass(frozen=True)
class _Job:
    """What the steps of one call share."""

    run: Run
    support: Block | None
    config: Scoring
    rng: np.random.Generator
    on_step: Callable[[int], None]
    on_fit: Callable[[Fit], None]
    backbone: Backbone

    @property
    def head_kind(self) -> str:
        head = self.run.model.head
        return self.config.head or (head.kind if head is not None else "prototypes")

    @property
    def wish(self) -> Wish:
        config = self.config
        return Wish(config.how(), config.channel_choice(), config.budget, config.blocks, self.micro_batch)

    def needed_support(self) -> Block:
        if self.support is None:
            raise UsageError("--support", "missing", "samples of the task", "or --plan with channels chosen by l2")
        return self.support

    def micro_batch(self, graph: Graph, window: Sequence[str]) -> int:
        """Samples of the Fisher pass looked at together: as many as fit this machine's memory, or as it was told."""
        held = fit(to_inspect(self.backbone, window), MICRO_BATCH, wanted=self.config.micro_batch)
        self.on_fit(held)
        return held.samples

    def facts(self, found: FisherPass) -> dict[str, Any]:
        """What is worth keeping about a Fisher pass."""
        fisher = found.fisher
        size = min(found.micro_batch, fisher.samples)
        kept = fisher_bytes(self.backbone.engine, self.backbone.graph, found.window, size)
        return {"samples": fisher.samples, "loss": fisher.loss, "fisher_pass_bytes": kept}


def score_layers(
    run: Run,
    support: Block | None,
    config: Scoring,
    *,
    rng: np.random.Generator,
    on_step: Callable[[int], None] = lambda done: None,
    on_fit: Callable[[Fit], None] = lambda fit: None,
    on_note: Callable[[str], None] = lambda text: None,
    allow: str | None = None,
) -> Run:
    """The run with a plan, and with scores where they were searched for.

    `on_step` gets the number of samples done, `on_fit` how many are in memory at once, `on_note` a line where another
    engine computes than a user would expect; `allow` names user code that may be imported. The support may be None for
    a given plan unless its channels are chosen by Fisher.

    Raises `DataError` for a support that says nothing (empty, one class, not finite) or a plan of another model,
    `UsageError` for settings that do not fit the model, `BudgetError` when nothing fits.
    """
    backbone = deploy(
        run.model,
        allow=allow,
        engine=config.engine,
        device=config.device,
        same_bits=config.same_bits,
        on_note=on_note,
    )
    job = _Job(run, support, config, rng, on_step, on_fit, backbone)
    return _given(job) if config.given else _searched(job)


# --------------------------------------------------------------------------------------------------- a plan searched


def _searched(job: _Job) -> Run:
    found = search(
        job.backbone, job.needed_support(), job.wish, job.rng,
        kind=job.head_kind, head=job.run.model.head, profile=job.run.profile, on_step=job.on_step,
    )  # fmt: skip
    how = job.wish.how
    optimum = found.choice if how.select == "knapsack" else knapsack(found.problem, COMPARISON)
    facts = job.facts(found.inspected)
    channels = job.wish.channels
    facts[SEARCH] = search_text(
        criterion=how.criterion, select=how.select, layers=how.layers, gradient=how.gradient, ratios=channels.ratios,
        axis=channels.axis, rule=channels.rule, bias=channels.bias, unit=channels.unit, blocks=job.config.blocks,
        head=job.head_kind,
    )  # fmt: skip
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
        seen = inspect_task(
            job.backbone, job.needed_support(), window, job.wish, job.rng,
            kind=job.head_kind, head=head, on_step=job.on_step,
        )  # fmt: skip
        head, facts = seen.head, job.facts(seen)
        _, updates = _read_plan(job, _ranking(job, rule, seen.fisher))
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
    updates = named_plan(name, graph, tensors_l2=job.backbone.tensors)
    return name, tuple(_rechosen(graph[update.layer], update, ranking) for update in updates)


def _rechosen(op: Op, update: LayerUpdate, ranking: Ranking) -> LayerUpdate:
    """The same number of channels, the best by the ranking."""
    if len(update.channels) in (0, update.axis_channels):
        return update
    return replace(update, channels=top_channels(ranking(op, update.axis), len(update.channels)))


def _ranking(job: _Job, rule: str, fisher: Fisher | None = None) -> Ranking:
    weights = job.backbone.tensors

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
        memory_model=budget.memory_model, batch=budget.batch, optimizer=budget.optimizer, workers=budget.workers,
        keep_bits=budget.keep_bits,
        facts={name: value for name, value in known.items() if value is not None},
    )  # fmt: skip
    return replace(plan, memory_bytes=memory, backward_macs=macs)
