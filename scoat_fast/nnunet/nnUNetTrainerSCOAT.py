"""nnU-Net's own training, with SCOATNet as the network. nnU-Net finds the class by the name of this file's module."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from scoat_fast import SCOATNet


class nnUNetTrainerSCOAT(nnUNetTrainer):
    """For configuration ``2d``, with nnU-Net's preprocessing, patches, augmentation, loss and optimizer.

    One head: SCOATNet's four give full resolution all, where nnU-Net's deep supervision wants a pyramid. ``width`` is
    the paper's; a subclass may set another. nnU-Net predicts patch by patch, so that the channel attention sees
    patches, in training too: a trained network belongs to nnU-Net, not to ``scoat-fast segment``.

    Raises:
        ValueError: for a configuration that is not in two dimensions.
    """

    width = 32

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008, as in nnU-Net
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Called by nnU-Net, also to predict."""
        patch = configuration_manager.patch_size
        if len(patch) != 2:
            raise ValueError(f"nnUNetTrainerSCOAT works on slices: use configuration 2d (the patch is {list(patch)})")
        return SCOATNet(num_input_channels, num_output_channels, cls.width)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is one head, so there is nothing to switch."""
