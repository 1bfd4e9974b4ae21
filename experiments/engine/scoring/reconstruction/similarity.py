"""How close two images are: PSNR and SSIM of 8-bit images.

PSNR is of the mean square over all values of an image, with a peak of 255. SSIM is that of Wang et
al. 2004: Gaussian windows of 11 x 11 with deviation 1.5, K1 = 0.01, K2 = 0.03, and population
variances. It is the mean over the channels and over the places whose window lies in the image.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray
from scipy.ndimage import correlate1d

PEAK = 255.0
RADIUS = 5
DEVIATION = 1.5
C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2


def psnr(images: ndarray, others: ndarray) -> ndarray:
    """Return the PSNR in decibels of each pair of uint8 images (N, H, W, C); inf if equal."""
    _check(images, others)
    errors = np.square(images.astype(np.float64) - others).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        ratios: ndarray = 10 * np.log10(PEAK**2 / errors)
    return ratios


def ssim(images: ndarray, others: ndarray) -> ndarray:
    """Return the SSIM of each pair of uint8 images (N, H, W, C).

    Raises:
        ValueError: the images are smaller than a window.
    """
    _check(images, others)
    side = 2 * RADIUS + 1
    if min(images.shape[1:3]) < side:
        raise ValueError(f"SSIM takes images of at least {side} x {side} pixels")
    return np.array([_ssim(*pair) for pair in zip(images, others, strict=True)])


def _ssim(image: ndarray, other: ndarray) -> float:
    x, y = image.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _smooth(x), _smooth(y)
    variances = _smooth(x * x) - mean_x**2 + _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y

    structure = (2 * covariance + C2) / (variances + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return float((luminance * structure).mean())


def _smooth(image: ndarray) -> ndarray:
    """Average an image (H, W, C) over Gaussian windows, where these lie in it."""
    places = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-0.5 * (places / DEVIATION) ** 2)
    window /= window.sum()
    for axis in (0, 1):
        image = correlate1d(image, window, axis=axis)
    return image[RADIUS:-RADIUS, RADIUS:-RADIUS]


def _check(images: ndarray, others: ndarray) -> None:
    if images.dtype != np.uint8 or others.dtype != np.uint8 or images.shape != others.shape:
        raise ValueError(
            f"images to compare are uint8 of one shape, got {images.dtype} {images.shape} and "
            f"{others.dtype} {others.shape}"
        )
