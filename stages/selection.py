"""`select`: candidates of a round -> the batch worth training on, with importance weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from stages.artifacts.records import Array, Block, End, LayerUpdate
from stages.cost.model import forward_macs
from stages.cost.training import plan_backward_macs
from stages.engines.parameter import Floats
from stages.errors import require
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.randomness import generator
from stages.settings.selection import AUTO as AUTO
from stages.settings.selection import Selection as Selection
from stages.valuation import fine
from stages.valuation.costs import Clock, Meter
from stages.valuation.designs import draw
from stages.valuation.efficiency import Decision, Option, Tuner
from stages.valuation.fine import Chosen, GradientView, answers_of, selection_named
from stages.valuation.forgetting import Memory
from stages.valuation.forward import Forward
from stages.valuation.scoring import Weights as Weights  # what callers hand in
from stages.valuation.scoring import flat_inputs, masses, scored


def select_stream(
    blocks: Iterable[Block],
    config: Selection,
    *,
    weights: Callable[[int], Weights] | None = None,
    updates: Sequence[LayerUpdate] | None = None,
    backbone: Backbone | None = None,
    ready: Callable[[int], bool] | None = None,
    passed: int = 0,
    replayed: bool = True,
    seed: int = 0,
    clock: Clock | None = None,
    replay: Mapping[int, Decision] | None = None,
    on_note: Callable[[str], None] = lambda text: None,
    on_step: Callable[[int], None] = lambda round: None,
) -> Iterator[Block | End]:
    """One chosen batch per block, then the end mark.

    Args:
        blocks: candidates; a block without round gets its place in the stream as one.
        weights: round -> the weights to score it with; asked once per block, in order, where the strategy scores.
        updates: the plan's, for `importance="live"`, and to know what is frozen.
        backbone: with the starting weights: frozen layers are prepared once. Needed for `ready` and `send_features`.
        ready: round -> whether its batch is wanted by now: scoring then stops and what has been scored stands for all
            (anytime selection). None scores all candidates.
        passed: so many rounds have been used already by a trainer that goes on from a checkpoint. `replayed`: the
            stream begins anew and these rounds pass as empty blocks; else it goes on and rounds count from there.
        clock: with which `auto` measures what scoring costs; None counts forward passes, and then the same input gives
            the same choices.
        replay: round -> what `auto` chose in an earlier run (`efficiency.recorded`), to do the same again.
        on_note: gets one line whenever `auto` changes its mind.
        on_step: gets the number of rounds done so far.

    Raises:
        UsageError: the strategy scores candidates and there are no weights, or no plan for `live`.
        DataError: masses or features that are not finite, classes that conflict with the head's.
    """
    require(
        not (config.needs_model and weights is None),
        "--strategy",
        f"{config.strategy!r} without a model",
        "a run record to score candidates with",
        "put the run record first in the stream, or give --run FILE",
    )
    require(
        not (config.importance == "live" and config.needs_model and updates is None),
        "--importance",
        "live without a plan",
        "a run record with a plan",
        "make one with `edgetrain score-layers`",
    )
    require(
        ready is None
        or (
            config.needs_model
            and config.importance == "last-layer"
            and config.strategy != AUTO
            and not config.remembers
        ),
        "--until-ready",
        f"--strategy {config.strategy} with --importance {config.importance}",
        "a scored strategy (not auto, not forgetting) by last-layer importance",
    )
    require(
        backbone is not None or not config.send_features,
        "--send",
        "features without a model",
        "a run record with a plan",
        "put the run record first in the stream, or give --run FILE",
    )
    forward = None
    if backbone is not None and (config.needs_model or config.send_features):
        forward = Forward(backbone, updates, send=config.send_features)
    done, told, tuner, memory = 0, "", None, _memory_of(config)
    for block in blocks:
        number = (done if block.round is None else block.round) + (0 if replayed else passed)
        block, rng = replace(block, round=number), generator(seed, "select", number)
        if number < passed:
            yield block.take(slice(0, 0))
        elif config.strategy == AUTO and weights is not None and len(block):
            current = cache(partial(weights, number))
            tuner = tuner or _tuner(config, current().backbone.graph, updates, clock, replay)
            chosen, decision = auto_block(block, config, tuner, current, updates, rng, forward)
            if (found := f"{decision.option.strategy} {decision.option.batch} {decision.option.scored}") != told:
                on_note(f"round {number}: {tuner.explain(decision)}")
                told = found
            yield chosen
        else:
            known = weights(number) if weights is not None and config.needs_model else None
            wanted = None if ready is None else partial(ready, number)
            yield select_block(block, config, known, updates, rng, forward=forward, ready=wanted, memory=memory)
        done += 1
        on_step(done)
    if memory is not None and (advice := memory.advice()):
        on_note(advice)
    yield End(done)


def select_block(
    block: Block,
    config: Selection,
    weights: Weights | None,
    updates: Sequence[LayerUpdate] | None,
    rng: np.random.Generator,
    *,
    forward: Forward | None = None,
    ready: Callable[[], bool] | None = None,
    memory: Memory | None = None,
) -> Block:
    """The batch chosen from one block of candidates.

    Columns `weight` and, where candidates were scored, `score` (the gradient norm); per class `allocation` (draws);
    facts `strategy`, `design`, `strata` and, where scored, `variance`, `variance_is`, `variance_random` in closed form
    for this pool, and `squared_bias` for strategies without chance; `candidates` is how many there were, `scored` how
    many of them were looked at before `ready` said stop. Samples without mass are no candidates. An empty block stays
    one. `forward` computes the features; None does it the plain way. `memory` is that of a strategy that has one, which
    goes from block to block; None begins anew.
    """
    if not len(block):
        return _nothing(block, config)
    memory = _memory_of(config) if memory is None else memory
    return _from_pool(*_with_mass(block), config, weights, updates, rng, forward=forward, ready=ready, memory=memory)


def _memory_of(config: Selection) -> Memory | None:
    """A fresh memory, where the strategy has one."""
    begin = selection_named(config.strategy).memory if config.remembers else None
    return None if begin is None else begin(config)


def _nothing(block: Block, config: Selection) -> Block:
    """The batch of an empty block."""
    columns = {**block.columns, "weight": np.zeros(0, np.float32)}
    return replace(block, columns=columns, facts={**block.facts, "strategy": config.strategy})


def _from_pool(
    pool: Block,
    mass: Array,
    config: Selection,
    weights: Weights | None,
    updates: Sequence[LayerUpdate] | None,
    rng: np.random.Generator,
    *,
    forward: Forward | None = None,
    ready: Callable[[], bool] | None = None,
    memory: Memory | None = None,
) -> Block:
    """The batch chosen from candidates of known positive masses."""
    pool, features = replace(pool, facts={**pool.facts, "candidates": len(pool)}), None
    if memory is not None:
        pool, mass = memory.offer(pool, mass, rng)
        if not len(pool):
            return _nothing(replace(pool, facts={**pool.facts, "scored": 0}), config)
    offered = pool
    if forward is not None and weights is not None:
        looked = forward.look(pool, mass, weights, ready=ready, rng=rng)
        pool, mass, features = looked.pool, looked.mass, looked.features
        pool = replace(pool, facts={**pool.facts, "scored": len(pool)})
    view = view_of(pool, mass, config, weights, updates, features)
    if memory is not None:
        memory.note(offered, answers_of(view))
    chosen = selection_named(config.strategy).choose(view, config.batch, config.epsilon, rng)
    batch = _emit(pool, view, chosen, config)
    return batch if forward is None or weights is not None else forward.attach(batch)


def _tuner(
    config: Selection,
    graph: Graph,
    updates: Sequence[LayerUpdate] | None,
    clock: Clock | None = None,
    replay: Mapping[int, Decision] | None = None,
) -> Tuner:
    ratio = config.update_cost
    if ratio is None:
        ratio = 3.0 if updates is None else 1.0 + plan_backward_macs(graph, updates) / forward_macs(graph)
    meter = Meter(ratio, fixed_ratio=config.update_cost is not None, overlap=config.overlap, clock=clock)
    return Tuner(config.batch, config.max_batch or config.batch, meter, replay)


def auto_block(
    block: Block,
    config: Selection,
    tuner: Tuner,
    weights: Callable[[], Weights],
    updates: Sequence[LayerUpdate] | None,
    rng: np.random.Generator,
    forward: Forward | None = None,
) -> tuple[Block, Decision]:
    """The batch of a round whose strategy the tuner chooses; rounds that are due are scored whole and observed first.

    As `select_block`, with facts that let the choice be replayed (`Decision.facts`): `strategy` is what was chosen,
    `auto_batch` and `auto_candidates` what it was given, `auto_observed` whether the tuner learnt from this round.
    Weights are asked for only where candidates are scored; the time of that and of the choice is measured.
    """
    number, meter, view = block.round or 0, tuner.meter, None
    pool, mass = _with_mass(block)
    arrived = int(block.per_class["seen"].sum()) if "seen" in block.per_class else len(pool)
    if tuner.due(number):
        meter.updates(weights().update_times)
        view = meter.time(lambda: _scored_whole(pool, mass, config, weights(), updates, rng, forward))
        tuner.observe(view, config.epsilon, arrived)
    decision = tuner.decide(number, len(pool))
    option = decision.option
    settings = replace(config, strategy=option.strategy, batch=option.batch, max_batch=None)
    found = meter.time(lambda: _spend(pool, mass, settings, option, view, weights, updates, rng, forward))
    looked_at = option.scored if view is None else len(pool)
    meter.close_round(looked_at)
    counts = {"candidates": len(pool), "scored": looked_at}
    return replace(found, facts={**found.facts, **counts, **decision.facts()}), decision


def _scored_whole(
    pool: Block,
    mass: Array,
    config: Selection,
    weights: Weights,
    updates: Sequence[LayerUpdate] | None,
    rng: np.random.Generator,
    forward: Forward | None,
) -> GradientView:
    features = None if forward is None else forward.look(pool, mass, weights, rng=rng).features
    return scored(pool, mass, weights, config.importance, updates, features)


def _spend(
    pool: Block,
    mass: Array,
    settings: Selection,
    option: Option,
    view: GradientView | None,
    weights: Callable[[], Weights],
    updates: Sequence[LayerUpdate] | None,
    rng: np.random.Generator,
    forward: Forward | None,
) -> Block:
    """The batch of one option, from the whole pool where that has been scored already."""
    if view is None:
        current = weights() if settings.needs_model else None
        return _from_pool(*_thinned(pool, mass, option, rng), settings, current, updates, rng, forward=forward)
    chosen = selection_named(option.strategy).choose(view, option.batch, settings.epsilon, rng)
    return _emit(pool, view, chosen, settings)


def _thinned(pool: Block, mass: Array, option: Option, rng: np.random.Generator) -> tuple[Block, Array]:
    """Fewer candidates that stand for all of them, chosen by label, and their masses."""
    if option.candidates >= len(pool):
        return pool, mass
    rows, _, weights = draw(fine.by_label(GradientView(pool.y, mass), option.candidates, 0.0), rng)
    return pool.take(rows), weights


def _with_mass(block: Block) -> tuple[Block, Array]:
    """The samples that have mass, and their masses."""
    mass = masses(block)
    return (block, mass) if mass.all() else (block.take(mass > 0), mass[mass > 0])


def view_of(
    block: Block,
    mass: Array,
    config: Selection,
    weights: Weights | None,
    updates: Sequence[LayerUpdate] | None,
    features: Floats | None = None,
) -> GradientView:
    """What the configured strategy may look at, and no more: only strategies that need gradients cost a pass."""
    needs = selection_named(config.strategy).needs
    if needs == "inputs":
        return GradientView(block.y, mass, inputs=flat_inputs(block))
    if needs == "labels" or weights is None:
        return GradientView(block.y, mass)
    if needs == "answers":
        return replace(scored(block, mass, weights, "last-layer", updates, features), gradients=None)
    return scored(block, mass, weights, config.importance, updates, features)


def _emit(pool: Block, view: GradientView, chosen: Chosen, config: Selection) -> Block:
    """The chosen samples as a block that says how they were chosen."""
    weights = chosen.weights if config.weighted else view.mass.sum() * chosen.times / chosen.times.sum()
    batch = pool.take(chosen.rows)
    columns = {**batch.columns, "weight": weights.astype(np.float32)}
    if view.gradients is not None:
        columns["score"] = np.sqrt(view.gradients.squared_norms[chosen.rows]).astype(np.float32)
    labels = np.unique(pool.y) if pool.labels is None else pool.labels
    allocation = np.zeros(len(labels), np.int64)
    np.add.at(allocation, np.searchsorted(labels, batch.y), chosen.times)
    per_class = {**pool.per_class, "allocation": allocation}
    facts = {**pool.facts, **_facts(view, chosen, config)}
    return replace(batch, columns=columns, labels=labels, per_class=per_class, facts=facts)


def _facts(view: GradientView, chosen: Chosen, config: Selection) -> dict[str, Any]:
    facts: dict[str, Any] = {"strategy": config.strategy, "design": chosen.design, "strata": chosen.strata}
    if view.gradients is not None and chosen.variance is not None:
        facts["variance"] = chosen.variance
        facts |= fine.reference_variances(view, config.batch, config.epsilon)
        if chosen.design == "fixed":
            facts["squared_bias"] = fine.squared_bias(view, chosen)
    return facts
