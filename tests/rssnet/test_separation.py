"""SASM against explicit loops, its start, its switches and what it costs in memory."""

import pytest
import torch
import torch.nn.functional as F

from rssnet.composition import compose
from rssnet.separation import BilinearUpsampling, SpatiallyAdaptiveSeparation, bilinear_weights
from tests.benchmarks.model import sasm_peak


def compose_by_loops(tokens, composition, kernel_size):
    batch, channels, height, width = tokens.shape
    _, fine_height, fine_width, groups, _ = composition.shape
    ratio, reach = fine_height // height, kernel_size // 2
    result = torch.zeros(batch, channels, fine_height, fine_width, dtype=tokens.dtype)
    for b in range(batch):
        for c in range(channels):
            group = c * groups // channels
            for y in range(fine_height):
                for x in range(fine_width):
                    for j in range(kernel_size**2):
                        row = min(max(y // ratio + j // kernel_size - reach, 0), height - 1)
                        column = min(max(x // ratio + j % kernel_size - reach, 0), width - 1)
                        result[b, c, y, x] += composition[b, y, x, group, j] * tokens[b, c, row, column]
    return result


def module(form="conv", groups=1, ratio=2, kernel_size=3, local_width=6, width=8, **options):
    return SpatiallyAdaptiveSeparation(
        width=width, local_width=local_width, ratio=ratio, kernel_size=kernel_size, groups=groups, form=form, **options
    )


def shaken(separation, scale=1.0):
    """A module as if trained: nothing left at its initial zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in separation.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return separation


@pytest.mark.parametrize(("groups", "ratio", "kernel_size"), [(1, 2, 3), (2, 4, 3), (4, 2, 5), (1, 1, 3)])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (1, 3)])
def test_composition_is_the_sum_over_the_window(groups, ratio, kernel_size, size):
    torch.manual_seed(0)
    tokens = torch.randn(2, 4, *size, dtype=torch.float64)
    composition = torch.randn(2, size[0] * ratio, size[1] * ratio, groups, kernel_size**2, dtype=torch.float64)
    expected = compose_by_loops(tokens, composition, kernel_size)
    torch.testing.assert_close(compose(tokens, composition, kernel_size), expected)


@pytest.mark.parametrize(("groups", "kernel_size", "size"), [(1, 3, (2, 3)), (2, 5, (1, 1)), (2, 3, (1, 2))])
def test_composition_gradients(groups, kernel_size, size):
    tokens = torch.randn(1, 2 * groups, *size, dtype=torch.float64, requires_grad=True)
    shape = (1, size[0] * 2, size[1] * 2, groups, kernel_size**2)
    composition = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: compose(a, b, kernel_size), (tokens, composition))


@pytest.mark.parametrize("form", ["conv", "affinity", "plain"])
def test_module_gradients(form):
    separation = shaken(module(form, width=4, local_width=3)).double()
    deep = torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    local = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: separation(a, b)[0], (deep, local))


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_bilinear_weights_are_those_of_torch(ratio, kernel_size):
    tokens = torch.randn(1, 2, 4, 5)
    weights = bilinear_weights(ratio, kernel_size).repeat(4, 5, 1)[None, :, :, None]
    expected = F.interpolate(tokens, scale_factor=ratio, mode="bilinear")
    torch.testing.assert_close(compose(tokens, weights, kernel_size), expected)


@pytest.mark.parametrize("form", ["conv", "affinity", "plain"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("local_width", [6, None])
def test_it_starts_as_bilinear_upsampling_up_to_the_gate(form, groups, local_width):
    torch.manual_seed(0)
    deep, local = torch.randn(2, 8, 3, 4), torch.randn(2, 6, 6, 8)
    separated, weights = module(form, groups, local_width=local_width, max_gate=2.0, gate_bias=-4.0)(
        deep, local if local_width else None
    )
    gate = 2.0 * torch.sigmoid(torch.tensor(-4.0))
    torch.testing.assert_close(weights.gate, gate.expand_as(weights.gate))
    reach = (deep.max() - deep.min()) * gate
    difference = separated - F.interpolate(deep, scale_factor=2, mode="bilinear")
    assert 0 < difference.abs().max() < reach


@pytest.mark.parametrize("form", ["conv", "affinity", "plain"])
def test_weights_sum_to_one_and_the_gate_stays_in_range(form):
    weights = shaken(module(form, groups=2, max_gate=1.5)).weigh(torch.randn(2, 8, 3, 4), torch.randn(2, 6, 6, 8))
    for part in (weights.attraction, weights.repulsion, weights.composition):
        torch.testing.assert_close(part.sum(-1), torch.ones(2, 6, 8, 2))
    assert weights.attraction.min() >= 0
    assert weights.repulsion.min() >= 0
    assert weights.gate.min() >= 0
    assert weights.gate.max() <= 1.5


@pytest.mark.parametrize("form", ["conv", "affinity"])
def test_trained_weights_differ_by_place_and_group(form):
    weights = shaken(module(form, groups=2)).weigh(torch.randn(1, 8, 3, 4), torch.randn(1, 6, 6, 8))
    assert weights.attraction.std(dim=(1, 2)).max() > 0.01
    assert (weights.attraction[:, :, :, 0] - weights.attraction[:, :, :, 1]).abs().max() > 0.01


def test_a_composition_is_bilinear_moved_by_what_attracts_and_what_repels():
    separation = shaken(module("conv", groups=2)).double()
    deep, local = torch.randn(1, 8, 3, 4, dtype=torch.float64), torch.randn(1, 6, 6, 8, dtype=torch.float64)
    separated, weights = separation(deep, local)
    moved = torch.zeros(1, 6, 8, 2, 9, dtype=torch.float64)
    bilinear = bilinear_weights(2, 3)
    for y in range(6):
        for x in range(8):
            w, v, a = weights.attraction[0, y, x], weights.repulsion[0, y, x], weights.gate[0, y, x]
            moved[0, y, x] = bilinear[y % 2, x % 2] + a * (w - v)
    torch.testing.assert_close(separated, compose_by_loops(deep, moved, 3))


def test_affinity_is_its_definition():
    separation = shaken(module("affinity", groups=1), scale=0.3).double()
    deep, local = torch.randn(1, 8, 3, 3, dtype=torch.float64), torch.randn(1, 6, 6, 6, dtype=torch.float64)
    weights = separation.weigh(deep, local)
    assert separation.from_local is not None
    hidden = F.interpolate(separation.from_deep(deep), scale_factor=2, mode="bilinear") + separation.from_local(local)
    query = 0.1 * separation.query(F.gelu(separation.mix(F.gelu(hidden))))
    key = separation.key(deep)
    products = torch.zeros(6, 6, 9, dtype=torch.float64)
    for y in range(6):
        for x in range(6):
            for j in range(9):
                row, column = min(max(y // 2 + j // 3 - 1, 0), 2), min(max(x // 2 + j % 3 - 1, 0), 2)
                products[y, x, j] = query[0, :, y, x] @ key[0, :, row, column] / query.shape[1] ** 0.5
    log_bilinear = bilinear_weights(2, 3).clamp(min=1e-3).log().repeat(3, 3, 1)
    torch.testing.assert_close(weights.attraction[0, :, :, 0], (products + log_bilinear).softmax(-1))
    torch.testing.assert_close(weights.repulsion[0, :, :, 0], (-products).softmax(-1))


def test_the_plain_form_pushes_bilinear_upsampling_away_from_the_local_mean():
    separation = shaken(module("plain")).double()
    deep, local = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, 8, 8, dtype=torch.float64)
    separated, weights = separation(deep, local)
    up = F.interpolate(deep, scale_factor=2, mode="bilinear")
    attracted = compose_by_loops(deep, weights.attraction, 3)
    mean = F.avg_pool2d(F.pad(deep, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mean = F.interpolate(mean, scale_factor=2, mode="nearest")
    gate = weights.gate[..., 0].permute(0, 3, 1, 2)
    torch.testing.assert_close(separated, up + gate * (attracted - mean))
    torch.testing.assert_close(attracted, up, rtol=0, atol=0.05)  # but for the floor under bilinear weights


def test_bilinear_upsampling_can_stand_in():
    deep = torch.randn(1, 8, 3, 4)
    separated, weights = BilinearUpsampling(ratio=2)(deep, None)
    assert weights is None
    torch.testing.assert_close(separated, F.interpolate(deep, scale_factor=2, mode="bilinear"))


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"groups must divide the decoder's width, 8; 3 does not"):
        module(groups=3)


@pytest.mark.parametrize(
    ("width", "form", "groups", "maps"),
    [
        *((width, form, 1, 4) for width in (256, 128, 64) for form in ("conv", "affinity", "plain")),
        # Eight sets of weights for k*k tokens, made by a softmax, are not small beside narrow maps.
        (256, "conv", 8, 4.3),
        (64, "conv", 8, 9.6),
    ],
)
@pytest.mark.parametrize("ratio", [2, 4])
def test_forward_and_backward_hold_few_maps(width, form, groups, maps, ratio):
    # More than one: the output at least.
    assert 1 < sasm_peak(width, ratio, form=form, groups=groups) <= maps
