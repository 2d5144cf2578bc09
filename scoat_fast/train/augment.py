"""Random changes to a batch of slices, on its device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = math.radians(12)
SCALE = 0.15
SHEAR = 0.06
SHIFT = 0.06  # of the side
GAMMA = 0.25  # of log(gamma)
CONTRAST = 0.15
BRIGHTNESS = 0.10  # of the window: the windows of scanners and of pictures differ by about this much
NOISE = 0.03
BLUR = 0.5  # the highest resolution is half blurred away at most


def augment(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrors, moves and bends a batch and changes its greys.

    Args:
        images: [N, 1, S, S] in 0..1.
        masks: [N, 1, S, S] in 0 and 1.
        generator: a CPU generator; its state decides what is drawn: the noise on the device, else the same on all.
    """
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, shear = uniform(ROTATION), uniform(SHEAR)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    scale_x, scale_y = uniform(SCALE).exp(), uniform(SCALE).exp()
    theta = torch.stack(
        [
            torch.stack([angle.cos() * scale_x * mirror, (shear - angle.sin()) * scale_y, uniform(2 * SHIFT)], 1),
            torch.stack([angle.sin() * scale_x * mirror, angle.cos() * scale_y, uniform(2 * SHIFT)], 1),
        ],
        1,
    )
    gamma, contrast, brightness = uniform(GAMMA).exp(), 1 + uniform(CONTRAST), uniform(BRIGHTNESS)
    blur, noise = torch.rand(n, generator=generator) * BLUR, torch.rand(n, generator=generator) * NOISE
    seed = torch.randint(2**62, (), generator=generator).item()
    grain = torch.randn(images.shape, generator=torch.Generator(images.device).manual_seed(seed), device=images.device)

    def each(values: Tensor) -> Tensor:
        return values.to(images.device)[:, None, None, None]

    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    both = F.grid_sample(torch.cat([images, masks], 1), grid, mode="bilinear", align_corners=False)
    images, masks = both[:, :1], (both[:, 1:] > 0.5).to(masks.dtype)
    images = images + each(blur) * (F.avg_pool2d(images, 3, 1, 1, count_include_pad=False) - images)
    images = (images.clamp(0, 1) ** each(gamma) - 0.5) * each(contrast) + 0.5 + each(brightness)
    images = images + each(noise) * grain
    return images.clamp(0, 1), masks
