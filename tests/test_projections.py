"""The geometry of the balls, on random tensors of every size from denormal to huge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import L1_projection

from aerl.attacks.projections import ascent_direction, clip, free, norms, project, random_in_ball
from aerl.attacks.random import BatchGenerator, SampleGenerator
from aerl.types import ORDERS

NORMS = st.sampled_from(["L1", "L2", "Linf"])
EPS = st.floats(1e-3, 10)


@st.composite
def batches(draw, low=-30, high=30):
    """(B, C, H, W) float32 tensors whose samples have sizes from 10**low to 10**high, some of them zero."""
    shape = [draw(st.integers(1, n)) for n in (4, 3, 5, 5)]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    sizes = draw(st.lists(st.floats(low, high) | st.none(), min_size=shape[0], max_size=shape[0]))
    scale = torch.tensor([0.0 if size is None else 10.0**size for size in sizes])
    batch = noise * scale.view(-1, 1, 1, 1)
    return batch.to(memory_format=torch.channels_last) if draw(st.booleans()) else batch


def reference(t, norm):
    return torch.linalg.vector_norm(t.double(), ORDERS[norm], (1, 2, 3), keepdim=True)


@settings(deadline=None)
@given(batches(), NORMS)
def test_norms_agree_with_float64_at_every_size(t, norm):
    torch.testing.assert_close(norms(t, norm).double(), reference(t, norm), rtol=1e-5, atol=0)


@settings(deadline=None)
@given(batches(), NORMS)
def test_ascent_direction_is_a_unit_step_along_the_gradient(gradient, norm):
    step = ascent_direction(gradient, norm)
    moving = reference(gradient, norm) > 0
    torch.testing.assert_close(reference(step, norm), moving.double(), rtol=1e-5, atol=0)
    # Of all unit steps it gains most: the gradient's dual norm.
    gain = (step.double() * gradient.double()).sum((1, 2, 3))
    dual = reference(gradient, {"L1": "Linf", "L2": "L2", "Linf": "L1"}[norm]).flatten()
    torch.testing.assert_close(gain, dual, rtol=1e-5, atol=0)


@settings(deadline=None)
@given(batches(-6, 6), NORMS, EPS)
def test_project(delta, norm, eps):
    projected = project(delta, norm, eps)
    assert (reference(projected, norm) <= eps * (1 + 1e-6)).all()
    inside = (reference(delta, norm) <= eps * (1 - 1e-6)).flatten()
    assert torch.equal(projected[inside], delta[inside])
    # In L1 every pixel moves by what rounding leaves of the norm, also the smallest.
    torch.testing.assert_close(project(projected, norm, eps), projected, rtol=1e-6, atol=1e-6 * eps)
    # Nearest: the residual makes an obtuse angle with the way to any other point of the ball.
    other = project(delta.flip(3) * 0.7, norm, eps)
    angle = ((delta - projected).double() * (other - projected).double()).sum((1, 2, 3))
    assert (angle <= 1e-5 * eps * delta.double().abs().sum((1, 2, 3))).all()


@settings(deadline=None)
@given(batches(-6, 6), NORMS, EPS)
def test_clip_ends_in_ball_and_box(delta, norm, eps):
    x = torch.rand(delta.shape, generator=torch.Generator().manual_seed(0))
    result = clip(x, delta, norm, eps)
    assert result.min() >= 0 and result.max() <= 1
    assert (reference(result - x, norm) <= eps + 1e-6 * result[0].numel()).all()


@settings(deadline=None)
@given(st.integers(0, 2**63), NORMS, EPS, st.sampled_from([torch.float32, torch.float64]))
def test_random_points_lie_in_the_ball(seed, norm, eps, dtype):
    like = torch.rand(3, 2, 4, 4, dtype=dtype)
    point = random_in_ball(like, norm, eps, SampleGenerator.for_images(like, seed))
    assert point.dtype == dtype
    assert (reference(point, norm) <= eps * (1 + 1e-6)).all()


@settings(deadline=None)
@given(batches(-3, 3), EPS)
def test_clip_in_l1_gives_the_nearest_point_of_ball_and_box(delta, eps):
    """The variational inequality holds for any other point of both, and the official AutoAttack's is no nearer."""
    x = torch.rand(delta.shape, generator=torch.Generator().manual_seed(0))
    found = clip(x, delta, "L1", eps).double() - x
    others = [clip(x, torch.randn(x.shape) * scale, "L1", eps).double() - x for scale in (0.1, 1, 10)]
    for other in others:
        angle = ((delta.double() - found) * (other - found)).sum((1, 2, 3))
        assert (angle <= 1e-5 * (1 + delta.double().abs().sum((1, 2, 3)))).all()
    theirs = (delta + L1_projection(x, delta.contiguous(), eps).view(delta.shape)).double()
    inside = reference(theirs, "L1").flatten() <= eps  # not always
    distance, other = (reference(each - delta, "L2").flatten() for each in (found, theirs))
    assert (distance <= other * (1 + 1e-4) + 1e-4)[inside].all()


def test_a_step_in_l1_changes_one_pixel_in_a_hundred_and_none_that_is_blocked():
    gradient = torch.linspace(-1, 0.9, 300).view(1, 3, 10, 10)
    step = ascent_direction(gradient, "L1").flatten()
    assert step.nonzero().flatten().tolist() == [0, 1, 2] and step[:3].tolist() == pytest.approx([-1 / 3] * 3)
    point = torch.full_like(gradient, 0.5)
    point[0, 0, 0, :3] = 0  # which would get darker
    assert ascent_direction(free(gradient, point), "L1").flatten()[:6].nonzero().flatten().tolist() == [3, 4, 5]


@pytest.mark.parametrize("norm", ["L1", "L2", "Linf"])
def test_random_points_are_uniform(norm, half=0.5 ** (1 / 12)):
    """Half of the points lie in the concentric ball of half the volume, and they are centred."""
    like = torch.empty(4000, 3, 2, 2)
    points = random_in_ball(like, norm, 2.0, BatchGenerator(torch.Generator().manual_seed(0), 4000))
    inner = (reference(points, norm) < 2.0 * half).double().mean()
    assert abs(inner - 0.5) < 0.04
    assert points.mean((0, 2, 3)).abs().max() < 0.04
