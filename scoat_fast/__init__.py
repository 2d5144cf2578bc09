"""SCOAT-Net for lung opacification on chest CT, fast. Research only, never for clinical use.

The names below load what they need when they are first used, so that importing the package stays cheap.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "SCOATNet": "model",
    "Segmentation": "segmentation.inference",
    "compile": "engine.runner",
    "segment": "segmentation.inference",
    "BadInputError": "errors",
    "OutputError": "errors",
    "ScoatFastError": "errors",
    "WeightsError": "errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
