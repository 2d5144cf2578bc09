"""The weights that ship with the package; see the model cards beside them."""
