"""Checkpoints of training on a stream: a run record with what training needs to go on as if it had not stopped.

The record is the run as it would be written now (tensors, head, version, metrics) and an extra group `checkpoint`:
how many blocks have been used, the hash of the model that the run started from, the configuration, and the
optimiser's state. There is no further random state: training on a stream draws nothing at random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from stages.artifacts.records import Array, Group, Run
from stages.errors import DataError, UsageError

GROUP = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """Where training on a stream stands."""

    run: Run
    """As it would be written now."""
    blocks: int
    """Blocks used so far, one update each."""
    start: str
    """`history.model_hash` of the record that the run started from."""
    configuration: str
    """The training's configuration as text: a resumed run must have the same."""
    optimizer: Mapping[str, Array]
    """`optimizers.state_arrays` of the optimiser."""
    policy: Mapping[str, Array] = field(default_factory=dict)
    """What the policy that revises the plan goes on from."""

    def record(self) -> Run:
        """As a run record, ready to be written."""
        arrays = {name: np.atleast_1d(array) for name, array in self.optimizer.items()}
        attrs = {"blocks": self.blocks, "start": self.start, "configuration": self.configuration}
        groups = {"optimizer": Group(arrays=arrays)}
        if self.policy:
            groups["policy"] = Group(arrays=self.policy)
        group = Group(attrs, groups=groups)
        extra = self.run.extra
        return replace(self.run, extra=replace(extra, groups={**extra.groups, GROUP: group}))


def read_checkpoint(record: Run, *, start: str, configuration: str) -> Checkpoint:
    """The checkpoint in a record that `Checkpoint.record` made, if it continues this very run.

    Raises:
        DataError: not a checkpoint, or one of a run that started from another model.
        UsageError: the training is configured otherwise than it was.
    """
    group = _group(record)
    if group.attrs["start"] != start:
        found = f"a checkpoint of a run that started from model {str(group.attrs['start'])[:12]}"
        raise DataError("--resume", found, f"model {start[:12]}", "begin with the same run record")
    if group.attrs["configuration"] != configuration:
        theirs, mine = _differing(str(group.attrs["configuration"]), configuration)
        fix = "use the same options, and the version that wrote it"
        raise UsageError("--resume", f"a checkpoint of training with {theirs}", mine, fix)
    groups = {name: child for name, child in record.extra.groups.items() if name != GROUP}
    state, policy = (group.groups[name].arrays if name in group.groups else {} for name in ("optimizer", "policy"))
    return Checkpoint(
        run=replace(record, extra=replace(record.extra, groups=groups)),
        blocks=int(group.attrs["blocks"]),
        start=start,
        configuration=configuration,
        optimizer=state,
        policy=policy,
    )


def _differing(*configurations: str) -> list[str]:
    """Of two configurations, JSON objects as text, the entries that differ, as text."""
    first, second = (json.loads(text) for text in configurations)
    keys = [key for key in sorted({*first, *second}) if first.get(key, "") != second.get(key, "")]
    return [", ".join(f"{key} {json.dumps(one.get(key, 'not there'))}" for key in keys) for one in (first, second)]


def blocks_used(record: Run) -> int:
    """How many blocks of the stream a checkpoint has used. Raises `DataError` for a record that is none."""
    return int(_group(record).attrs["blocks"])


def _group(record: Run) -> Group:
    group = record.extra.groups.get(GROUP)
    if group is None or not {"blocks", "start", "configuration"} <= group.attrs.keys():
        raise DataError("--resume", "a run record", "a checkpoint", "`edgetrain train-sparse --checkpoint` writes one")
    return group
