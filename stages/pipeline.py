"""The streaming pipeline in one process: what `filter | select | train-sparse` computes, without pipes.

With a fixed lag the three processes compute exactly this, bit for bit with the same threads, however they are
scheduled: batch r is chosen with version max(0, r - lag), and every random draw belongs to one (seed, stage, round).
It serves as the oracle for the processes and as the way to run the pipeline from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stages.artifacts.live import Version, version_for
from stages.artifacts.records import Array, Block, End, Head, LayerUpdate, Run
from stages.errors import require
from stages.filtering import Filtering, filter_stream
from stages.models.deploy import deploy
from stages.selection import Selection, Weights, select_stream
from stages.sparse_training import StreamTraining, Update, train_stream
from stages.valuation.shallow import shallow_features


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """The three stages' settings, as their commands would get them."""

    filtering: Filtering = field(default_factory=Filtering)
    selection: Selection = field(default_factory=Selection)
    training: StreamTraining = field(default_factory=StreamTraining)
    feature_blocks: int = 1
    """Depth of the filter's features, for strategies that use them."""
    lag: int = 1
    """Updates that the weights which score a batch are behind: 0 sequential, 1 Titan's one-round delay."""
    filter_seed: int = 0
    select_seed: int = 0

    def __post_init__(self) -> None:
        require(self.lag >= 0, "lag", str(self.lag), "at least 0")


def simulate(
    run: Run,
    samples: Iterable[Block],
    pipeline: Pipeline,
    *,
    on_step: Callable[[Update], None] = lambda update: None,
    allow: str | None = None,
) -> Run:
    """The run after the stream has passed through filter, select and train-sparse.

    Args:
        run: in any form, with a plan unless `pipeline.training` names one.
        samples: sample blocks of the stream, in order.
        on_step: gets each update as it is made.
        allow: the user's model factory that may be imported.

    Raises:
        What the stages raise.
    """
    how = pipeline.selection
    backbone = deploy(run.model, allow=allow, engine=how.engine, device=how.device, same_bits=how.same_bits)
    start = Weights(backbone, run.model.head)
    versions: dict[int, Version] = {}

    def weights(round_number: int) -> Weights:
        number = version_for(round_number, pipeline.lag)
        return start if number == 0 else start.at(versions[number])

    def publish(number: int, tensors: Mapping[str, Array], head: Head, revised: Sequence[LayerUpdate] | None) -> None:
        copies = {name: tensor.copy() for name, tensor in tensors.items()}
        plan = None if revised is None else tuple(revised)
        versions[number] = Version(number, copies, head, updates=plan)
        versions.pop(number - pipeline.lag - 2, None)

    features = shallow_features(backbone, pipeline.feature_blocks) if pipeline.filtering.needs_model else None
    candidates = filter_stream(samples, pipeline.filtering, features=features, seed=pipeline.filter_seed)
    updates = None if run.plan is None else run.plan.updates
    batches = select_stream(
        _blocks(candidates),
        pipeline.selection,
        weights=weights,
        updates=updates,
        backbone=backbone,
        seed=pipeline.select_seed,
    )
    return train_stream(run, _blocks(batches), pipeline.training, publish=publish, on_step=on_step, allow=allow)


def _blocks(records: Iterable[Block | End]) -> Iterator[Block]:
    return (record for record in records if isinstance(record, Block))
