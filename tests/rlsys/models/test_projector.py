from __future__ import annotations

import pytest
import torch

from rlsys.models.projector import DnaProjector, initialise_projector


def test_a_slot_is_a_start_marker_the_projected_rows_and_an_end_marker() -> None:
    projector = DnaProjector("linear", 2, 3)
    with torch.no_grad():
        projector.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        projector.layers[0].bias.fill_(0.5)
        projector.start_marker.fill_(7.0)
        projector.end_marker.fill_(9.0)
    one, two = torch.split(projector([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])]), [3, 4])
    assert one.tolist() == [[7.0] * 3, [1.5, 2.5, 3.5], [9.0] * 3]
    assert two.tolist() == [[7.0] * 3, [3.5, 4.5, 7.5], [5.5, 6.5, 11.5], [9.0] * 3]


def test_without_dna_every_parameter_still_gets_a_gradient() -> None:
    projector = DnaProjector("mlp", 4, 3)
    nothing = projector([])
    assert nothing.shape == (0, 3)
    nothing.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in projector.parameters())


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("feature_rms", [0.3, 1.0, 20.0])
def test_new_slot_rows_have_about_the_norm_that_was_asked_for(kind: str, feature_rms: float) -> None:
    generator = torch.Generator().manual_seed(0)
    projector = DnaProjector(kind, 64, 256)
    initialise_projector(projector, row_norm=1.7, feature_rms=feature_rms, generator=generator)
    rows = projector([feature_rms * torch.randn(200, 64, generator=generator)])
    norms = torch.linalg.vector_norm(rows, dim=-1)
    # The spread of a norm over 256 random coordinates is 1 / sqrt(2 * 256) = 4 %; markers are single draws.
    assert float(norms[1:-1].mean().detach()) == pytest.approx(1.7, rel=0.05)
    assert norms[[0, -1]].tolist() == pytest.approx([1.7, 1.7], rel=0.2)
