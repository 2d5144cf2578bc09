"""SCOATNet in MONAI's inferers, on the CT beside this file.

    pip install monai
    python examples/monai_inferers.py

The network is a plain module for slices, so SliceInferer runs it over a volume. SlidingWindowInferer runs, too, but a
window is another input than the slice it was cut from: the recalibration (squeeze-and-excitation) takes means over all
that it sees, and the deeper levels see far. The last line shows what that costs here. Prefer whole slices.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import torch
from monai.inferers import SliceInferer, SlidingWindowInferer

import scoat_fast
from scoat_fast.imaging.volume import Turn
from scoat_fast.imaging.window import Window

CT = Path(__file__).parent / "ct.nii.gz"


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


@torch.no_grad()
def main(every: int = 1) -> tuple[float, float]:
    """The Dice of both inferers' masks with those of single slices, of every so many."""
    net = scoat_fast.SCOATNet.from_pretrained("scoat-w16")  # evaluation mode; net.pretrained says what it wants
    image = nibabel.load(CT)
    slices = Turn(image.affine).to_slices(image.get_fdata(dtype="float32"))  # [slices, 256, 256], spine down
    greys = torch.from_numpy(Window(*net.pretrained.window).apply(slices[::every]))[None, None]  # [1, 1, slices, H, W]

    expected = torch.stack([net(greys[:, :, k]) for k in range(greys.shape[2])], 2) > 0
    whole = SliceInferer(roi_size=greys.shape[3:], spatial_dim=0, sw_batch_size=4)(greys, net) > 0
    windows = SliceInferer(roi_size=(128, 128), spatial_dim=0, sw_batch_size=8, overlap=0.5, mode="gaussian")
    cut = windows(greys, net) > 0
    assert isinstance(windows, SlidingWindowInferer)  # which it is, slice by slice

    found = dice(whole, expected), dice(cut, expected)
    print(f"whole slices: Dice {found[0]:.4f} with the network's own masks; windows of 128 pixels: {found[1]:.4f}")
    return found


if __name__ == "__main__":
    main()
