"""Measures without labels: against NumPy and SciPy in float64, and where the result is known."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import pdist

from ccmim_fast.engine.representation import alignment, alpha_req, lidar, rankme, uniformity


def drawn(*shape, seed=0, spectrum=1.0):
    """Normal features whose directions shrink as j^-spectrum, not centred."""
    scale_D = torch.arange(1, shape[-1] + 1, dtype=torch.float64) ** -spectrum
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale_D + 0.3


def orthogonal(width):
    return torch.linalg.qr(drawn(width, width, spectrum=0.0))[0]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 5)])
def test_rankme_is_the_papers(shape):
    features = drawn(*shape)
    singular = np.linalg.svd(features.numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert rankme(features).item() == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_rankme_where_it_is_known():
    line = torch.outer(torch.arange(1, 9).double(), torch.randn(16).double())
    assert rankme(line).item() == pytest.approx(1, abs=1e-4)
    assert rankme(3 * orthogonal(24)).item() == pytest.approx(24, rel=1e-9)
    assert rankme(torch.cat([orthogonal(6), torch.zeros(6, 10).double()], dim=1)).item() == pytest.approx(6, rel=1e-4)


@pytest.mark.parametrize("shape", [(300, 160), (80, 160), (300, 20)])
def test_alpha_req_is_a_weighted_line_through_the_logs(shape):
    """Also of fewer images or channels than the hundred ranks; float32 features add nothing behind the last."""
    features = drawn(*shape, spectrum=0.6)
    eigenvalues = np.linalg.eigvalsh(np.cov(features.numpy().T))[::-1][: min(shape[0] - 1, shape[1])]
    rank = np.arange(1, len(eigenvalues) + 1)
    rank, eigenvalues = rank[3:100], eigenvalues[3:100]
    # The weights of polyfit are of residuals, not of their squares.
    slope = np.polyfit(np.log(rank), np.log(eigenvalues), 1, w=rank**-0.5)[0]
    assert alpha_req(features).item() == pytest.approx(-slope, rel=1e-6)
    assert alpha_req(features.float()).item() == pytest.approx(-slope, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_alpha_req_of_a_power_law_is_its_exponent(alpha):
    """Of features that are centred, and whose covariance is known: the columns of a Hadamard matrix but the first."""
    columns = torch.from_numpy(scipy.linalg.hadamard(128)[:, 1:]).double()
    spectrum = torch.arange(1, 128).double() ** (-alpha / 2)
    assert alpha_req(5 + columns * spectrum).item() == pytest.approx(alpha, abs=1e-9)


def test_alpha_req_needs_three_ranks():
    assert alpha_req(drawn(50, 5)).isnan()
    assert alpha_req(drawn(50, 6)).isfinite()
    assert alpha_req(drawn(6, 50)).isnan()
    assert alpha_req(torch.ones(20, 20)).isnan()


def test_uniformity_is_of_all_pairs():
    features = drawn(30, 7)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    assert uniformity(features).item() == pytest.approx(np.log(np.exp(-2 * pdist(unit) ** 2).mean()), rel=1e-9)
    assert uniformity(orthogonal(9)).item() == pytest.approx(-4, rel=1e-9)
    assert uniformity(torch.ones(9, 4)).item() == pytest.approx(0, abs=1e-9)
    assert uniformity(torch.ones(1, 4)).isnan()


def test_alignment_is_the_distance_of_two_views():
    one, other = drawn(20, 6), drawn(20, 6, seed=1)
    units = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (one, other)]
    assert alignment(one, other).item() == pytest.approx((np.subtract(*units) ** 2).sum(1).mean(), rel=1e-9)
    assert alignment(one, 7 * one).item() == pytest.approx(0, abs=1e-12)
    assert alignment(one, -one).item() == pytest.approx(4, rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 4, 8), (5, 3, 20)])
def test_lidar_is_of_the_papers_discriminant(shape):
    """Also of fewer images than channels."""
    features = drawn(*shape) + 2 * drawn(shape[0], 1, shape[2], seed=1)
    x = features.numpy()
    mean = x.mean(1)
    between = (mean - mean.mean(0)).T @ (mean - mean.mean(0)) / len(x)
    rest = (x - mean[:, None]).reshape(-1, x.shape[2])
    within = rest.T @ rest / len(rest) + 1e-4 * np.eye(x.shape[2])
    values = np.clip(scipy.linalg.eigh(between, within, eigvals_only=True), 1e-300, None)
    share = values / values.sum()
    assert lidar(features).item() == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_lidar_where_it_is_known():
    """Views without noise: the images' directions, alike; of images on one line there is one."""
    still = orthogonal(8)[:, None].expand(8, 3, 8)
    assert lidar(still).item() == pytest.approx(7, rel=1e-6)  # the mean of eight takes one direction away
    line = torch.outer(torch.arange(9).double(), torch.ones(5).double())[:, None].expand(9, 2, 5)
    assert lidar(line).item() == pytest.approx(1, abs=1e-4)
    assert lidar(drawn(5, 1, 4)).isnan()
    assert lidar(1e12 * drawn(2, 2, 9)).isnan()  # beside which 1e-4 is nothing
