"""Small DICOM series for the tests, written with pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_series(
    folder: Path,
    hu: np.ndarray,
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.9),
    slopes=None,
    change=lambda k, slice: None,
) -> Path:
    """Writes HU [slices, rows, columns], from the feet up, as one file a slice in a scrambled order of names.

    ``slopes``: slope and intercept of each slice. ``change(k, dataset)`` may alter slice k before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = (generate_uid() for _ in range(3))
    names = np.random.default_rng(1).permutation(len(hu))
    for k, pixels in enumerate(hu):
        slope, intercept = slopes[k] if slopes else (1, -1024)
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        slice = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice.SOPClassUID, slice.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice.PatientName, slice.PatientID, slice.Modality = "Doe^Jane", "12345", "CT"
        slice.StudyInstanceUID, slice.SeriesInstanceUID, slice.FrameOfReferenceUID = study, series, frame
        slice.InstanceNumber = int(names[k])  # tells nothing about the place
        slice.ImagePositionPatient = [-30.0, -20.0, 100 + k * spacing[0]]
        slice.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice.PixelSpacing = list(spacing[1:])
        slice.Rows, slice.Columns = pixels.shape
        slice.SamplesPerPixel, slice.PhotometricInterpretation = 1, "MONOCHROME2"
        slice.BitsAllocated, slice.BitsStored, slice.HighBit, slice.PixelRepresentation = 16, 16, 15, 1
        slice.RescaleSlope, slice.RescaleIntercept = slope, intercept
        slice.PixelData = np.round((pixels - intercept) / slope).astype("<i2").tobytes()
        change(k, slice)
        slice.save_as(folder / f"IM{names[k]:04d}", enforce_file_format=True)
    return folder
