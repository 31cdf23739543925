"""The trained bridge from frozen encoder features to rows that the language model reads.

Shared by the learner's `DnaLlm` and by the vLLM model, so that both project with the same code and the same parameter
names. Invariant: a sequence with S feature rows becomes S + 2 rows of width H: a learned start marker, the projected
rows in order, a learned end marker.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlsys.data.prompts import NUM_MARKERS


class DnaProjector(nn.Module):
    """Features [S, E] -> slot rows [S + 2, H]; `kind` is "mlp" (Linear, GELU, Linear) or "linear" (BioReason's)."""

    def __init__(self, kind: str, feature_width: int, hidden_size: int) -> None:
        super().__init__()
        self.feature_width = feature_width
        first = nn.Linear(feature_width, hidden_size)
        if kind == "mlp":
            self.layers = nn.Sequential(first, nn.GELU(), nn.Linear(hidden_size, hidden_size))
        else:
            assert kind == "linear", f"projector kind {kind!r} passed the configuration's check"
            self.layers = nn.Sequential(first)
        self.start_marker = nn.Parameter(torch.zeros(hidden_size))
        self.end_marker = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Project the features of n sequences ([S_i, E], any float dtype) to their slots' rows, one after another.

        Returns [sum of S_i + NUM_MARKERS, H]. All sequences go through one matrix product, which also runs when there
        are none, and one tensor comes out: under ZeRO-3 every rank has to gather the same parameters in the same order,
        forward and backward, and to give each a gradient, however many sequences its batch holds.
        """
        weight = self.start_marker
        empty = weight.new_zeros((0, self.feature_width))
        rows = [empty, *(feature.to(device=weight.device, dtype=weight.dtype) for feature in features)]
        start, end = self.start_marker[None], self.end_marker[None]
        # The empty piece in front keeps all parameters in the graph; its markers are cut off again.
        projected = torch.split(self.layers(torch.cat(rows)), [len(row) for row in rows])
        slots = [torch.cat([start, piece, end]) for piece in projected]
        return torch.cat(slots)[NUM_MARKERS:]


@torch.no_grad()
def initialise_projector(
    projector: DnaProjector, *, row_norm: float, feature_rms: float, generator: torch.Generator
) -> None:
    """Draw the projector's weights so that slot rows and markers start with about the norm `row_norm`.

    With features of root mean square `feature_rms`, the first layer has unit pre-activations; the second moment of
    GELU under a standard normal is 0.4252, which the second layer undoes. Rows that start much longer than token
    embeddings drown the text, much shorter ones are not seen: neither trains well.
    """
    linears = [module for module in projector.layers if isinstance(module, nn.Linear)]
    hidden_size = linears[-1].out_features
    element_std = row_norm / hidden_size**0.5
    second_moment = feature_rms**2
    for linear in linears:
        is_last = linear is linears[-1]
        target_std = element_std if is_last else 1.0
        linear.weight.normal_(0.0, target_std / (linear.in_features * second_moment) ** 0.5, generator=generator)
        linear.bias.zero_()
        second_moment = 0.4252
    for marker in (projector.start_marker, projector.end_marker):
        marker.normal_(0.0, element_std, generator=generator)
