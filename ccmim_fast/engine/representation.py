"""Measures of features that need no labels: how many dimensions are used, and how images lie on the sphere.

Each takes finite features of any float dtype, computes in float64 and returns a float64 scalar on their device. What is
not defined, such as of a single image, is NaN.
"""

# N images, V views of an image, D width, R singular values or eigenvalues, J ranks

import torch
import torch.nn.functional as F
from torch import Tensor

# The ranks of eigenvalues that a power law is fitted to, as in the code of alpha-ReQ's authors: the paper names none.
_RANKS = 4, 100
_LEAST_RANKS = 3  # two are always on a line
_LEAST_SHARE = 1e-12  # of the largest eigenvalue: below it lies what rounding of float32 features leaves
_DELTA = 1e-4  # added to the diagonal of the covariance within images: LiDAR's paper


def rankme(features_ND: Tensor) -> Tensor:
    """Return RankMe (Garrido et al., 2023, Eq. 1): exp of the entropy of the singular values, as shares of their sum.

    1 of features on one line through the origin, D of features that use D orthogonal directions alike. The features are
    not centred, as in the paper; its 1e-7 beside each share is left out, since p log p is 0 at 0.
    """
    return effective_rank(singular_values(features_ND.double()))


def alpha_req(features_ND: Tensor) -> Tensor:
    """Return alpha-ReQ (Agrawal et al., 2022): alpha of the power law j^-alpha of the covariance's eigenvalues.

    A small one is a flat spectrum, a large one a spectrum of few directions; the paper finds the best features near 1.
    The fit is the least squares of log eigenvalue against log j over the ranks j = 4 to 100, or as many as there are,
    each weighted by 1 / j: so the authors' code. NaN where fewer than three of these ranks are left.
    """
    centred_ND = features_ND.double() - features_ND.double().mean(0)
    eigenvalues_R = singular_values(centred_ND).flip(0)[: len(features_ND) - 1].square()
    eigenvalues_R = eigenvalues_R[eigenvalues_R > _LEAST_SHARE * eigenvalues_R[:1]][: _RANKS[1]]
    log_J = eigenvalues_R[_RANKS[0] - 1 :].log()
    if len(log_J) < _LEAST_RANKS:
        return log_J.new_tensor(torch.nan)
    rank_J = torch.arange(_RANKS[0], _RANKS[0] + len(log_J), dtype=log_J.dtype, device=log_J.device)
    weight_J = (1 / rank_J) / (1 / rank_J).sum()
    place_J = rank_J.log() - (weight_J * rank_J.log()).sum()
    return -(weight_J * place_J * log_J).sum() / (weight_J * place_J.square()).sum()


def uniformity(features_ND: Tensor) -> Tensor:
    """Return log E exp(-2 |x - y|^2) over pairs of normalised features of two images (Wang and Isola, 2020, Eq. 2).

    0 where all features have one direction, -4 of orthogonal ones; lower is more uniform. NaN of a single image.
    """
    unit_ND = F.normalize(features_ND.double(), dim=1)
    # |x - y|^2 = 2 - 2 x.y
    exponent_NN = 4 * (unit_ND @ unit_ND.T) - 4
    images = len(unit_ND)
    others_NN = ~torch.eye(images, dtype=torch.bool, device=unit_ND.device)
    return (exponent_NN.exp() * others_NN).sum().div(images * (images - 1)).log() if images > 1 else _nan(unit_ND)


def alignment(one_ND: Tensor, other_ND: Tensor) -> Tensor:
    """Return E |x - y|^2 over images, of normalised features of two views of each (Wang and Isola, 2020, Eq. 1).

    0 where both views have one direction, 2 of orthogonal ones, at most 4.
    """
    one_ND, other_ND = (F.normalize(features.double(), dim=1) for features in (one_ND, other_ND))
    return (one_ND - other_ND).square().sum(1).mean()


def lidar(features_NVD: Tensor) -> Tensor:
    """Return LiDAR (Thilak et al., 2024, Eq. 1 to 4): exp of the entropy of a linear discriminant's eigenvalues.

    The discriminant tells images apart, each a class of V views: W^-1/2 B W^-1/2 of the covariance B of the images'
    means and W of the views around them, plus 1e-4 on its diagonal. 1 .. min(N - 1, D): directions that tell images
    apart in spite of the views. NaN of one view or one image.
    """
    features_NVD = features_NVD.double()
    images, views, width = features_NVD.shape
    if min(images, views) < 2:
        return _nan(features_NVD)
    mean_ND = features_NVD.mean(1)
    between_ND = mean_ND - mean_ND.mean(0)
    within_XD = (features_NVD - mean_ND[:, None]).flatten(0, 1)
    within_DD = within_XD.T @ within_XD / (images * views)
    within_DD = within_DD + _DELTA * torch.eye(width, dtype=within_DD.dtype, device=within_DD.device)
    factor_DD, failed = torch.linalg.cholesky_ex(within_DD)
    if failed:  # of features so large that 1e-4 is nothing beside them
        return _nan(features_NVD)
    # With W = L L^T the matrix L^-1 B L^-T has the same eigenvalues: the squares of the singular values of L^-1 M^T.
    whitened_DN = torch.linalg.solve_triangular(factor_DD, between_ND.T, upper=False)
    return effective_rank(singular_values(whitened_DN).square())


def singular_values(x_ND: Tensor) -> Tensor:
    """Return the min(N, D) singular values of a matrix [N, D], ascending; values that are not finite count as numbers.

    By the eigenvalues of the smaller Gram matrix, much cheaper: it squares, so x is to be float64.
    """
    gram = x_ND.T @ x_ND if len(x_ND) > x_ND.shape[1] else x_ND @ x_ND.T
    # What is not finite has no eigenvalues.
    return torch.linalg.eigvalsh(gram.nan_to_num()).clamp_min(0).sqrt()


def effective_rank(values_R: Tensor) -> Tensor:
    """Return exp of the entropy of values, as shares of their sum: how many of them there are, were they alike."""
    return torch.exp(torch.special.entr(values_R / values_R.sum()).sum())


def _nan(like: Tensor) -> Tensor:
    return like.new_tensor(torch.nan)
