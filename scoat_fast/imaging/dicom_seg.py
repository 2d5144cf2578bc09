"""A mask as DICOM Segmentation, for viewers and archives that speak DICOM."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from .. import __version__
from ..errors import BadInputError, ScoatFastError
from .dicom import sorted_headers

SERIES_NUMBER = 9001  # far from those of a scanner
NAMES = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")  # of a source, and of its study
# what a Segmentation takes over from its sources, and what these may lack where a series was made anonymous
FILED_BY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
TIMES = (
    "ContentDate", "ContentTime", "SeriesDate", "SeriesTime", "InstanceCreationDate", "InstanceCreationTime",
    "ContributionDateTime",
)  # fmt: skip


def write_seg(file: BinaryIO, folder: Path, uid: str | None, mask: np.ndarray, weights: str, seed: str) -> None:
    """Writes a mask of a DICOM series as a binary Segmentation with one segment, in the study of the series.

    It names the patient as the series does: the standard wants that, and an archive could not file it otherwise. Equal
    input gives equal bytes: its UIDs come from those of the series and from ``seed``, its dates from the study.

    Args:
        folder, uid: where the series is, and which; as for ``dicom.read_series``.
        mask: [I, J, K], on the grid that ``dicom.read_series`` gives.
        weights: the name of the network's weights.
        seed: what the mask was made from.

    Raises:
        BadInputError: if the series is several files with many frames each, or has no UIDs.
        ScoatFastError: without highdicom.
    """
    try:
        import highdicom as hd
        from pydicom.sr.codedict import codes
    except ImportError as error:
        raise ScoatFastError("DICOM SEG needs highdicom: pip install 'scoat-fast[dicom]'") from error
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # what it finds odd may be the patient's name
    with warnings.catch_warnings(action="ignore"):
        _segmentation(hd, codes, folder, uid, mask, weights, seed).save_as(file, enforce_file_format=True)


def _segmentation(hd, codes, folder: Path, uid: str | None, mask: np.ndarray, weights: str, seed: str) -> Dataset:
    sources, slices = sorted_headers(folder, uid)
    if len(slices) > len(sources) > 1:
        raise BadInputError(folder, f"a DICOM SEG names one Enhanced CT file as its source, here are {len(sources)}")
    first, positions = slices[0], None
    places = [np.asarray(slice.ImagePositionPatient, float) for slice in slices[:2]]
    thickness = float(first.get("SliceThickness") or 0) or float(np.linalg.norm(places[-1] - places[0])) or 1.0
    # what is the same for all slices within the reader's tolerance, and has to be to the last digit for highdicom
    orientation, spacing = list(first.ImageOrientationPatient), list(first.PixelSpacing)
    for source in sources:
        for name in NAMES:
            value = source.get(name) or source.file_meta.get(f"MediaStorage{name}")
            if not value:
                raise BadInputError(source.filename, f"{name} is missing, by which a DICOM SEG would be filed")
            setattr(source, name, value)
        source.Modality = source.get("Modality") or "CT"
        for name in FILED_BY:
            if name not in source:
                setattr(source, name, "")
        if "FrameOfReferenceUID" not in source:
            source.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(source.SeriesInstanceUID), "frame"])
        if "PerFrameFunctionalGroupsSequence" not in source:
            source.ImageOrientationPatient, source.PixelSpacing, source.SliceThickness = orientation, spacing, thickness
        else:
            shared = (source.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
            shared.PlaneOrientationSequence = hd.PlaneOrientationSequence("PATIENT", orientation)
            shared.PixelMeasuresSequence = hd.PixelMeasuresSequence(spacing, thickness)
            source.SharedFunctionalGroupsSequence = [shared]
            positions = [hd.PlanePositionSequence("PATIENT", slice.ImagePositionPatient) for slice in slices]
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Lung opacity",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.DCM.Opacity,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="scoat_fast",
            version=__version__,
            family=codes.DCM.ArtificialIntelligence,
            parameters={"weights": weights},
        ),
        tracking_id="Lung opacity",
        tracking_uid=generate_uid(entropy_srcs=[seed, "tracking"]),
    )
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(mask.transpose(2, 1, 0).astype(np.uint8)),
        plane_positions=positions,  # of frames, in an order of their own
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=generate_uid(entropy_srcs=[str(sources[0].SeriesInstanceUID), seed, "series"]),
        series_number=SERIES_NUMBER,
        series_description="Lung opacity, research only",
        sop_instance_uid=generate_uid(entropy_srcs=[str(sources[0].SeriesInstanceUID), seed, "instance"]),
        instance_number=1,
        manufacturer="scoat_fast",
        manufacturer_model_name="SCOAT-Net",
        software_versions=__version__,
        device_serial_number="0",
        content_description="Not for clinical use",
        omit_empty_frames=False,  # a reader sees which slices were looked at
    )
    organization = generate_uid(entropy_srcs=[seed, "dimensions"])
    date, time = sources[0].StudyDate or "19000101", sources[0].StudyTime or "000000"

    def settle(dataset, element) -> None:
        """Takes what differs from run to run from what does not."""
        if element.keyword == "DimensionOrganizationUID":
            element.value = organization
        elif element.keyword in TIMES:
            element.value = {"DA": date, "TM": time, "DT": f"{date}{time}"}[element.VR]

    segmentation.walk(settle)
    return segmentation
