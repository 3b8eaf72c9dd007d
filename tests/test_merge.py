"""Means of groups: both backends against a loop."""

import pytest
import torch

import reroute_kernels as rk

HALVES = [torch.float16, torch.bfloat16]


def looped(features, assignment, groups):
    """The contract, group by group in float64."""
    means = torch.zeros(len(features), groups, features.shape[2], dtype=features.dtype, device=features.device)
    counts = torch.zeros(len(features), groups, dtype=torch.int64, device=features.device)
    for sample in range(len(features)):
        for group in range(groups):
            members = features[sample, assignment[sample] == group]
            counts[sample, group] = len(members)
            if len(members):
                means[sample, group] = members.double().mean(dim=0).to(features.dtype)
    return means, counts


def check(operations, features, assignment, groups, atol=1e-5, rtol=0):
    means, counts = operations.merge_tokens(features, assignment, groups)
    expected, expected_counts = looped(features, assignment, groups)
    assert means.is_contiguous()
    assert counts.is_contiguous()
    torch.testing.assert_close(means, expected, atol=atol, rtol=rtol, equal_nan=True)
    assert torch.equal(counts, expected_counts)


@pytest.fixture
def case(device, random_tensor):
    """Makes features and an assignment; some tokens have no group, and some groups no token."""

    def make(samples=2, length=20, width=24, groups=7, dtype=torch.float32):
        assignment = torch.randint(-2, groups + 2, (samples, length), device=device)
        assignment[assignment == 3] = -1
        return random_tensor(samples, length, width, dtype=dtype), assignment, groups

    return make


@pytest.mark.parametrize(("length", "width", "groups"), [(1, 1, 1), (16, 33, 5), (17, 300, 20), (40, 2, 3), (3, 8, 40)])
def test_shapes(operations, case, length, width, groups):
    check(operations, *case(2, length, width, groups))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves(operations, case, dtype, interpreter_rounds_to_nearest):
    """Sums of float32, rounded once."""
    check(operations, *case(2, 40, 33, 3, dtype), atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_sums_are_taken_in_float32(device, operations):
    features = torch.full((1, 300, 4), 300.0, dtype=torch.float16, device=device)  # their sum is no float16
    means, _ = operations.merge_tokens(features, torch.zeros(1, 300, dtype=torch.int64, device=device), 1)
    assert means.eq(300).all()


def test_groups_of_no_token(device, operations):
    features = torch.full((1, 4, 3), torch.nan, device=device)
    means, counts = operations.merge_tokens(features, torch.full((1, 4), -1, device=device), 2)
    assert means.eq(0).all()
    assert counts.eq(0).all()


def test_infinities_and_nan_stay_in_its_group(device, operations):
    features = torch.ones(1, 4, 3, device=device)
    features[0, 0, 1] = torch.nan
    features[0, 3] = torch.inf  # in no group
    means, _ = operations.merge_tokens(features, torch.tensor([[0, 0, 1, -1]], device=device), 2)
    assert means[0, 0].isnan().tolist() == [False, True, False]
    assert means[0, 1].eq(1).all()


def test_numbers_that_name_no_group(device, operations, random_tensor):
    assignment = torch.tensor([[2**62, -(2**63), 2**32, 1, 2, 2**63 - 1]], device=device)
    check(operations, random_tensor(1, 6, 5), assignment, 2)


@pytest.mark.parametrize(
    ("samples", "length", "width", "groups"), [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)]
)
def test_empty(device, operations, samples, length, width, groups):
    features = torch.ones(samples, length, width, device=device)
    check(operations, features, torch.zeros(samples, length, dtype=torch.int64, device=device), groups)


def test_layouts_of_features(operations, case, layout):
    features, assignment, groups = case()
    check(operations, layout(features), assignment, groups)


def test_layouts_of_the_assignment(operations, case, layout):
    features, assignment, groups = case()
    check(operations, features, layout(assignment), groups)


def test_rows_far_apart(operations, far_apart):
    features = far_apart(4, torch.float32)
    features.copy_(torch.arange(16.0).view(1, 4, 4))
    check(operations, features, torch.tensor([[0, 1, 1, 0]], device=features.device), 2)


def test_one_launch(case, launches):
    rk.triton.merge_tokens(*case(3, 40, width=300, groups=5))
    assert launches == [("merge_rows", (15, 2))]


def test_same_bits_twice_and_in_any_order(device, operations, case):
    features, assignment, groups = case(3, 37, 100)
    means, counts = operations.merge_tokens(features, assignment, groups)
    order = torch.tensor([2, 0, 1], device=device)
    again = operations.merge_tokens(features[order], assignment[order], groups)
    assert torch.equal(again[0], means[order])
    assert torch.equal(again[1], counts[order])


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_gradients(case, backend):
    features, assignment, groups = case(2, 9, 4, 5)

    def by_torch(features):
        rows = [
            features[sample, assignment[sample] == group].sum(dim=0) / max(1, int((assignment[sample] == group).sum()))
            for sample in range(2)
            for group in range(groups)
        ]
        return torch.stack(rows).view(2, groups, 4)

    def gradient(function, dtype):
        given = features.to(dtype).requires_grad_()
        result = function(given)
        return torch.autograd.grad((result * torch.arange(result.numel()).view_as(result).to(result)).sum(), given)[0]

    with rk.backend(backend):
        actual = gradient(lambda given: rk.ops.merge_tokens(given, assignment, groups)[0], torch.float32)
    torch.testing.assert_close(actual, gradient(by_torch, torch.float64).float())


def test_forward_mode(case):
    features, assignment, groups = case()
    tangent = torch.ones_like(features)
    _, moved = torch.func.jvp(lambda given: rk.ops.merge_tokens(given, assignment, groups)[0], (features,), (tangent,))
    torch.testing.assert_close(moved, looped(tangent, assignment, groups)[0])


def test_gradients_without_groups(case):
    features, assignment, _ = case()
    means, _ = rk.ops.merge_tokens(features.requires_grad_(), assignment, 0)
    assert torch.autograd.grad(means.sum(), features)[0].eq(0).all()
