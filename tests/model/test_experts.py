"""Experts against a dense computation in float64: rows of several sources, pass by pass and under autograd."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ds.model.moe.experts import Assignment, Experts

D, WIDTH = 16, 24


def make(num_experts, implementation, hidden=D, width=WIDTH, dtype=torch.float32):
    experts = Experts(num_experts, hidden, width, implementation).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return experts


def source(counts, num_rows, hidden=D, dtype=torch.float32, seed=0):
    """Random rows, weights, gradients and an assignment of distinct rows to each expert."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_rows, generator=generator)[:count].sort().values for count in counts]
    x_ND, grad_ND = (torch.randn(num_rows, hidden, generator=generator).to(dtype) for _ in range(2))
    return x_ND, grad_ND, Assignment(torch.cat(rows), torch.rand(sum(counts), generator=generator), list(counts))


def oracle(experts, sources):
    """Float64: (y_ND, grad_x_ND, grad_weight_A) of every source, and the gradients of both weights."""
    gate_up_E2FD, down_EDF = (p.detach().double().requires_grad_() for p in experts.parameters())
    results = []
    for x_ND, grad_ND, (row_A, weight_A, counts) in sources:
        x_ND, weight_A = (t.detach().double().requires_grad_() for t in (x_ND, weight_A))
        y_ND, position = torch.zeros_like(x_ND), 0
        for expert, count in enumerate(counts):
            for entry in range(position, position + count):
                gate_F, up_F = gate_up_E2FD[expert] @ x_ND[row_A[entry]]
                y_D = weight_A[entry] * (down_EDF[expert] @ (F.silu(gate_F) * up_F))
                y_ND = y_ND + torch.eye(len(x_ND), dtype=torch.float64)[row_A[entry]][:, None] * y_D
            position += count
        (y_ND * grad_ND.double()).sum().backward() if counts != [0] * len(counts) else None
        results.append([y_ND.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x_ND, weight_A))])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (gate_up_E2FD, down_EDF)]
    return results, grads


def close(actual, expected, tolerance=2e-5):
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


@torch.no_grad()
def passes(experts, sources):
    pending, results = [], []
    for x_ND, grad_ND, assignment in sources:
        y_ND, saved = experts(x_ND, assignment)
        results.append([y_ND, *experts.backward(saved, grad_ND, pending)])
    return results, experts.weight_gradients(pending)


SOURCES = {
    "one": [([3, 1, 4], 5)],
    "several": [([3, 1, 4], 5), ([0, 2, 0], 2), ([1, 1, 1], 1)],
    "an idle expert": [([2, 0, 3], 4), ([1, 0, 0], 3)],
    "a source without rows": [([0, 0, 0], 0), ([1, 2, 1], 3)],
    "rows without experts": [([1, 0, 0], 6)],
    "nothing at all": [([0, 0, 0], 0), ([0, 0, 0], 4)],
}


@pytest.mark.parametrize("implementation", ["grouped_mm", "loop"])
@pytest.mark.parametrize("case", SOURCES)
def test_passes_equal_the_oracle(case, implementation):
    experts = make(3, implementation)
    sources = [source(counts, rows, seed=seed) for seed, (counts, rows) in enumerate(SOURCES[case])]
    (actual, actual_grads), (expected, expected_grads) = passes(experts, sources), oracle(experts, sources)
    for mine, theirs in zip(actual, expected):
        for a, b in zip(mine, theirs):
            close(a, b)
    for a, b in zip(actual_grads, expected_grads):
        close(a, b)


def test_odd_widths_in_a_loop():
    experts = make(2, "loop", hidden=7, width=5)
    sources = [source([3, 4], 5, hidden=7), source([1, 0], 3, hidden=7, seed=1)]
    (actual, actual_grads), (expected, expected_grads) = passes(experts, sources), oracle(experts, sources)
    for a, b in zip((*actual[0], *actual[1], *actual_grads), (*expected[0], *expected[1], *expected_grads)):
        close(a, b)


@pytest.mark.parametrize("implementation", ["grouped_mm", "loop"])
def test_bf16_is_near_and_weights_stay_fp32(implementation):
    experts = make(3, implementation, dtype=torch.bfloat16)
    sources = [source([3, 0, 4], 5, dtype=torch.bfloat16), source([1, 2, 2], 3, dtype=torch.bfloat16, seed=1)]
    (actual, actual_grads), (expected, expected_grads) = passes(experts, sources), oracle(experts, sources)
    for mine, theirs in zip(actual, expected):
        assert [t.dtype for t in mine] == [torch.bfloat16, torch.bfloat16, torch.float32]
        for a, b in zip(mine, theirs):
            close(a, b, 2e-2)
    for a, b in zip(actual_grads, expected_grads):
        assert a.dtype == torch.bfloat16
        close(a, b, 2e-2)


@pytest.mark.parametrize("implementation", ["grouped_mm", "loop"])
def test_compute_under_autograd_equals_the_passes(implementation):
    experts = make(3, implementation)
    x_ND, grad_ND, (row_A, _, counts) = source([2, 0, 3], 5)
    x_ND.requires_grad_()
    y_AD = experts.compute(x_ND[row_A], counts)
    y_AD.backward(grad_ND[row_A])
    y_ND = torch.zeros_like(x_ND).index_add(0, row_A, y_AD)
    (((expected, grad_x_ND, _),), grads) = passes(
        experts, [(x_ND.detach(), grad_ND, Assignment(row_A, torch.ones(5), counts))]
    )
    close(y_ND.detach(), expected.double())
    close(x_ND.grad, grad_x_ND.double())
    for parameter, grad in zip(experts.parameters(), grads):
        close(parameter.grad, grad.double())


def test_backward_can_run_again():
    experts, (x_ND, grad_ND, assignment) = make(3, "grouped_mm"), source([3, 1, 4], 5)
    with torch.no_grad():
        saved = experts(x_ND, assignment)[1]
        runs = []
        for _ in range(2):
            pending = []
            runs.append([*experts.backward(saved, grad_ND, pending), *experts.weight_gradients(pending)])
    assert all(map(torch.equal, *runs))
