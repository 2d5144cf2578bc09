"""SCOATNet in nnU-Net, from images to predictions; where nnU-Net is installed (it brings torchvision)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scoat_fast.nnunet

pytest.importorskip("nnunetv2")
CASES, SIZE = 5, 64
QUICK = """
from nnUNetTrainerSCOAT import nnUNetTrainerSCOAT

class nnUNetTrainerQuick(nnUNetTrainerSCOAT):
    width = 3
    def initialize(self):
        super().initialize()
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 4, 20, 2
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A dataset of bright discs, planned and preprocessed, and a trainer that is quick."""
    root = tmp_path_factory.mktemp("nnunet")
    names = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    data = root / "nnUNet_raw" / "Dataset001_Discs"
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (data / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for k in range(CASES):
        disc = (y - 20 - 5 * k) ** 2 + (x - 30) ** 2 < 150
        grey = (random.normal(60, 10, disc.shape) + 100 * disc).clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).save(data / "imagesTr" / f"disc{k}_0000.png")
        Image.fromarray(disc.astype(np.uint8)).save(data / "labelsTr" / f"disc{k}.png")
    Image.fromarray(grey).save(data / "imagesTs" / "last_0000.png")
    facts = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "disc": 1}, "numTraining": CASES}
    (data / "dataset.json").write_text(json.dumps(facts | {"file_ending": ".png"}))
    (root / "quick").mkdir()
    (root / "quick" / "nnUNetTrainerQuick.py").write_text(QUICK)
    folders = [str(root / "quick"), scoat_fast.nnunet.__path__[0]]
    (root / "start").mkdir()  # of every Python process
    (root / "start" / "sitecustomize.py").write_text("import torchvision_on_cpu\n\ntorchvision_on_cpu.declare()\n")
    paths = [folders[1], str(root / "start"), str(Path(__file__).parent)]
    settings = {"nnUNet_extTrainer": os.pathsep.join(folders), "PYTHONPATH": os.pathsep.join(paths)}
    environment = os.environ | names | settings
    run(environment, "nnUNetv2_plan_and_preprocess", "-d", 1, "-c", "2d", "-np", 1, "-npfp", 1)
    return environment


def run(environment: dict[str, str], name: str, *arguments) -> str:
    program = [Path(sys.executable).with_name(name), *arguments]
    done = subprocess.run(list(map(str, program)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_trains_and_predicts(environment, tmp_path):
    alone = environment | {"nnUNet_n_proc_DA": "0"}  # augmentation in the process that trains
    run(alone, "nnUNetv2_train", 1, "2d", "all", "-tr", "nnUNetTrainerQuick", "-device", "cpu")
    tests = Path(environment["nnUNet_raw"]) / "Dataset001_Discs" / "imagesTs"
    options = ["-d", 1, "-c", "2d", "-f", "all", "-tr", "nnUNetTrainerQuick", "-device", "cpu", "-npp", 1, "-nps", 1]
    run(environment, "nnUNetv2_predict", "-i", tests, "-o", tmp_path, *options)
    found = np.asarray(Image.open(tmp_path / "last.png")) > 0
    truth = np.asarray(Image.open(tests.parent / "labelsTr" / f"disc{CASES - 1}.png")) > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.9


def test_volumes_are_refused():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", scoat_fast.nnunet.__path__[0])
        trainer = recursive_find_trainer_class_by_name("nnUNetTrainerSCOAT")
    volumes = type("Configuration", (), {"patch_size": (16, 64, 64)})
    with pytest.raises(ValueError, match="use configuration 2d"):
        trainer.build_network_architecture(None, volumes, 1, 2)
    slices = type("Configuration", (), {"patch_size": (64, 64)})
    assert trainer.build_network_architecture(None, slices, 3, 2).out_channels == 2
