from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from smc.learning.network import CVNNConfig, build_cvnn
from smc.learning.optimizer import load_optimizer, make_optimizer, optimizer_state
from smc.learning.soap import Soap
from tests.conftest import small_simulation


def quadratic_loss(optimizer_of: object, steps: int, *, turn_every: int = 10) -> float:
    """An ill-conditioned least-squares problem in a complex matrix, its axes turned away from the coordinates."""
    generator = torch.Generator().manual_seed(1)
    size = 16

    def unitary() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size, dtype=torch.complex64, generator=generator)).Q

    scales = torch.logspace(0, -2, size).to(torch.complex64)
    left, right = unitary() * scales, unitary() * scales
    target = torch.randn(size, size, dtype=torch.complex64, generator=generator)
    weight = nn.Parameter(torch.zeros(size, size, 2))
    optimizer = optimizer_of([weight])  # type: ignore[operator]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = (left.mH @ (torch.view_as_complex(weight) - target) @ right).abs().square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if isinstance(optimizer, Soap) and (step + 1) % turn_every == 0:
            optimizer.turn()
    return float(loss.detach())


def test_its_bases_make_an_ill_conditioned_problem_easy() -> None:
    turned = quadratic_loss(Soap, 300)
    assert turned < quadratic_loss(torch.optim.Adam, 300) / 10
    assert turned < quadratic_loss(Soap, 300, turn_every=10**9) / 3


def test_without_bases_a_step_is_adams() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    soap = Soap([ours], lr=0.1, betas=(0.9, 0.99), largest_side=0)
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    for _ in range(20):
        for parameter, optimizer in ((ours, soap), (theirs, adam)):
            optimizer.zero_grad()
            (parameter**4).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_bases_stay_unitary_and_tend_to_eigenvectors() -> None:
    weight = nn.Parameter(torch.zeros(5, 7, 2, dtype=torch.float64))
    optimizer = Soap([weight], lr=0.0)
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(5, 5, dtype=torch.complex128, generator=generator)
    for step in range(400):
        gradient = mixing @ torch.randn(5, 7, dtype=torch.complex128, generator=generator)
        weight.grad = torch.view_as_real(gradient).contiguous()
        optimizer.step()
        if step % 5 == 0:
            optimizer.turn()
    optimizer.turn()
    state = optimizer.state[weight]
    basis, covariance = (torch.view_as_complex(state[name]) for name in ("left_basis", "left"))
    torch.testing.assert_close(basis.mH @ basis, torch.eye(5, dtype=torch.complex128))
    turned = basis.mH @ covariance @ basis
    assert float((turned - torch.diag(turned.diag())).norm() / turned.norm()) < 0.2


@pytest.mark.parametrize("numbers", ["complex", "real"])
@pytest.mark.parametrize("name", ["soap", "adam"])
def test_an_optimiser_goes_on_from_its_state(name: str, numbers: str) -> None:
    model = build_cvnn(small_simulation(), CVNNConfig(hidden=(8,), numbers=numbers))
    optimizer = make_optimizer(name, model)  # type: ignore[arg-type]

    def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(4, 9, generator=torch.Generator().manual_seed(step))
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.zero_grad()
            real, imag = model(x, 0 * x)
            (real.square().sum() + imag.square().sum()).backward()
            optimizer.step()
            if isinstance(optimizer, Soap):
                optimizer.turn()

    assert optimizer_state(optimizer, model, 0) is None
    steps(optimizer, 0, 5)
    state = optimizer_state(optimizer, model, 5)
    assert state is not None
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    again = load_optimizer(model, state)
    steps(optimizer, 5, 8)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.load_state_dict(before)
    # The first optimiser has moved on from the state, which is by reference: what was loaded is a copy.
    steps(again, 5, 8)
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, after[parameter_name])
