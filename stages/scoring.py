"""The stage `score-layers`: how much each layer matters for a task, and which of them train under the budgets.

TinyTrain's online stage (arXiv:2307.09988, Algorithm 1, steps 1-4): one Fisher pass over the support set, a criterion,
a selector. Or a plan that was named or written by hand, which needs no Fisher pass unless its channels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.artifacts.records import Array, Block, Head, LayerUpdate, Plan, Run
from stages.cost.latency import Durations, durations
from stages.cost.model import full_backward_macs, inference_peak_bytes
from stages.cost.training import HEAD, live_values, whole_update, with_head
from stages.errors import BudgetError, UsageError
from stages.importance.fisher import Fisher, fisher_bytes, fisher_pass
from stages.importance.tasks import build_task
from stages.measurement.room import Fit, fit
from stages.methods.layer_scores import candidates, detached, scores_of
from stages.models.deploy import Backbone, deploy
from stages.models.graph import Graph, Op
from stages.planning import problem as planning
from stages.planning.baselines import named_plan
from stages.planning.budget import format_bytes
from stages.planning.channels import ChannelEvidence, axis_of, channel_rule, top_channels
from stages.planning.knapsack import knapsack
from stages.planning.layers import select_layers
from stages.planning.plans import Ranking, make_plan, parse_plan
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
    def weights(self) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in self.backbone.tensors.items()}

    def fisher(self, window: Sequence[str]) -> tuple[Fisher, Head, dict[str, Any]]:
        """The Fisher pass over the support, the head whose loss it used, and what is worth keeping about the pass."""
        if self.support is None:
            raise UsageError("--support", "missing", "samples of the task", "or --plan with channels chosen by l2")
        graph = self.backbone.graph
        kept = fisher_bytes(graph, window, 1)
        held = fit(kept, inference_peak_bytes(graph), MICRO_BATCH, wanted=self.config.micro_batch)
        self.on_fit(held)
        size = held.samples
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
    on_fit: Callable[[Fit], None] = lambda fit: None,
    allow: str | None = None,
) -> Run:
    """The run with a plan, and with scores where they were searched for.

    `on_step` gets the number of samples done, `on_fit` how many are in memory at once; `allow` names user code that may
    be imported. The support may be None for a given plan unless its channels are chosen by Fisher.

    Raises `DataError` for a support that says nothing (empty, one class, not finite) or a plan of another model,
    `UsageError` for settings that do not fit the model, `BudgetError` when nothing fits.
    """
    job = _Job(run, support, config, rng, on_step, on_fit, deploy(run.model, allow=allow))
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
    optimum = found if how.select == "knapsack" else knapsack(problem)
    facts |= {"score": found.score, "optimum_score": optimum.score}
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
