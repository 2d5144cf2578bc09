"""SCOATNet in nnU-Net v2: the folder of this file is one for nnU-Net's ``nnUNet_extTrainer``.

    export nnUNet_extTrainer=$(python -c "import scoat_fast.nnunet as it; print(it.__path__[0])")
    nnUNetv2_train DATASET 2d FOLD -tr nnUNetTrainerSCOAT

Nothing else may lie here: nnU-Net imports every module of that folder.
"""
