"""PNG, JPEG, WebP and TIFF slices: grey pictures that a window has been applied to already."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import BadInputError
from ..files import is_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
BRIGHT, SEEN = 0.3, 0.002  # any lung window shows tissue brighter than this, on more than this share of a slice
LABELS = 8  # greys of a mask, at most
EXIF_ORIENTATION, TIFF_PHOTOMETRIC = 274, 262
COLOUR_TOLERANCE = 16  # grey levels between the channels of a grey picture that went through JPEG or WebP


def read_picture(path: str | Path) -> np.ndarray:
    """Grey values [H, W] in 0..1, float32, of one picture.

    8 and 16 bit grey, palettes, and colour pictures whose channels agree. Transparent pixels count as black.

    Raises:
        BadInputError: if the file is damaged, holds several pictures or colours, or is unreasonably large.
    """
    if not is_file(path):
        raise BadInputError(path, "a picture file is wanted, this is none")
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, about data that is checked here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if getattr(picture, "n_frames", 1) > 1:
                    raise BadInputError(path, f"one picture is wanted, this file holds {picture.n_frames}")
                if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
                    raise BadInputError(path, "its EXIF orientation turns it: save it upright, spine down")
                return _grey(path, picture)
    except BadInputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadInputError(path, f"too large to be a slice: {error}") from error
    except FileNotFoundError as error:
        raise BadInputError(path, "no such file") from error
    except Exception as error:  # Pillow's decoders raise whatever they please on damaged data
        raise BadInputError(path, f"not a readable picture: {error}") from error


def read_mask(path: str | Path) -> np.ndarray:
    """A mask [H, W] of bool: True where the picture is not black.

    Raises:
        BadInputError: as ``read_picture`` does, and for more greys than labels have: all that is no pure black in a
            picture of probabilities, or one that JPEG has blurred, would count as marked.
    """
    grey = read_picture(path)
    if (count := len(np.unique(grey))) > LABELS:
        raise BadInputError(path, f"a mask is wanted, of two greys or of up to {LABELS} for labels, got {count}")
    return grey > 0


def check_windowed(path: str | Path, grey: np.ndarray) -> None:
    """Raises BadInputError unless a picture [H, W] in 0..1 can be a windowed chest slice, with tissue in it.

    The network would answer with an empty mask, which would look like a healthy patient.
    """
    if grey.min() == grey.max():
        raise BadInputError(path, f"every pixel is {grey.min():.3g} of white: nothing to segment")
    if (grey > BRIGHT).mean() < SEEN:
        raise BadInputError(
            path,
            f"not a windowed slice: nothing is brighter than {BRIGHT:.0%} of white, the maximum is {grey.max():.1%}",
        )


def _grey(path: str | Path, picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16"):
        if getattr(picture, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0:
            raise BadInputError(path, "a picture in which black is 0 is wanted, here white is")
        return np.asarray(picture, dtype=np.float32) / 65535
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"), dtype=np.float32) / 255
    if picture.mode not in ("LA", "P", "PA", "RGB", "RGBA"):
        raise BadInputError(path, f"a grey picture of 8 or 16 bit is wanted, got mode {picture.mode}")
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32)
    colours, alpha = rgba[..., :3], rgba[..., 3] / 255
    if np.ptp(colours, axis=-1).max(initial=0) > COLOUR_TOLERANCE:
        raise BadInputError(path, "a grey picture is wanted, this one has colours")
    return colours.mean(-1) * alpha / 255
