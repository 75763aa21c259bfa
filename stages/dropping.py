"""`import --drop-tokens`: a run whose model lets fewer tokens pass, with the same layers and weights."""

from __future__ import annotations

from dataclasses import replace

from stages.artifacts.records import Run
from stages.graphs.record import graph_tree, read_graph
from stages.graphs.tokens import Drops, drop_tokens
from stages.models.deploy import with_graph


def with_drops(run: Run, drops: Drops) -> Run:
    """The run with a model that drops tokens (BSR, arXiv:2405.10951): what every later stage then computes with.

    Weights and head stay, trained or not. What was measured of the old model goes: profile, scores and plan.

    Raises as `graphs.tokens.drop_tokens`, `SchemaError` for a graph that is none.
    """
    model = with_graph(run.model)
    assert model.graph is not None
    graph, tensors = drop_tokens(read_graph(model.graph), drops)
    model = replace(model, graph=graph_tree(graph), tensors={**model.tensors, **tensors})
    return replace(run, model=model, profile=None, scores=None, plan=None)
