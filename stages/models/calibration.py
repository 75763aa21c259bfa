"""A new network's normalisation from samples: what BatchNorm folds into a deep one that was never trained.

A record holds BatchNorm's statistics and training a plan folds them into the layers before it. Of a network from
scratch they are 0 and 1, so nothing is normalised, and a deep one stays at chance however long it trains.
"""

from __future__ import annotations

import torch
from torch import nn

from stages.models.inputs import Floats


def calibrated(module: nn.Module, inputs: Floats) -> nn.Module:
    """The module with the statistics of model inputs (N, *input) in its BatchNorms, in evaluation mode; in place."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all batches, of which there is one
        norm.reset_running_stats()
    with torch.no_grad():
        module.train()(torch.from_numpy(inputs))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return module.eval()
