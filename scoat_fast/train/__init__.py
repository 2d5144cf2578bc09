"""Training on folders of slices: see ``data.py`` for their layout and ``trainer.py`` for the loop."""
