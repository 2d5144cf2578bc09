"""The paper's experiments on anybody's data: metrics, networks to compare with, cross-validation, tables, figures."""
