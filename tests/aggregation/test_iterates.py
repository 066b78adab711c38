"""An iterate against the objective's derivatives, which torch forms from the updates themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from fedeat.aggregation.iterates import iterate, newton_direction


def instance() -> tuple[Tensor, Tensor, Tensor]:
    """Updates (7, 4) of a wide model, their prior weights, and coefficients of a point among them."""
    generator = torch.Generator().manual_seed(5)
    updates = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    prior, coefficients = torch.rand(2, 7, generator=generator, dtype=torch.float64) + 0.1
    return updates, prior / prior.sum(), coefficients / coefficients.sum()


def test_the_slope_is_the_length_of_the_gradient_and_the_step_is_weiszfelds() -> None:
    updates, prior, coefficients = instance()
    point = (coefficients @ updates).requires_grad_()
    radii = (updates - point).norm(dim=1)
    (radii @ prior).backward()  # type: ignore[no-untyped-call]
    state = iterate((updates @ updates.T).numpy(), prior.numpy(), coefficients.numpy())
    assert point.grad is not None
    torch.testing.assert_close(torch.tensor(state.slope, dtype=torch.float64), point.grad.norm())
    torch.testing.assert_close(torch.from_numpy(state.radii), radii.detach())
    pulls = (prior / radii).detach()
    torch.testing.assert_close(torch.from_numpy(state.coefficients + state.step), pulls / pulls.sum())


def test_newtons_direction_solves_the_hessian() -> None:
    updates, prior, coefficients = instance()
    gram, point = (updates @ updates.T).numpy(), coefficients @ updates

    def objective(at: Tensor) -> Tensor:
        return (updates - at).norm(dim=1) @ prior

    gradient = torch.autograd.functional.jacobian(objective, point)
    hessian = torch.autograd.functional.hessian(objective, point)
    direction = newton_direction(gram, iterate(gram, prior.numpy(), coefficients.numpy()))
    assert direction is not None
    assert abs(direction.sum()) < 1e-12
    torch.testing.assert_close(torch.from_numpy(direction) @ updates, -torch.linalg.solve(hessian, gradient))
