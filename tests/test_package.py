"""The package as a whole: what it imports, which way its parts depend, what its help costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import scoat_fast
from scoat_fast import cli
from scoat_fast.cli import main

ROOT = Path(scoat_fast.__file__).parent
HEAVY = {"torch", "nibabel", "pydicom", "PIL", "numpy", "safetensors", "triton", "lightning_fabric", "monai"}
# what each part may import of the package: data flows one way
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "imaging": {"errors", "files"},
    "ops": {"_C", "errors"},
    "recompute": {"ops"},
    "winograd": {"_C", "ops"},
    "convolutions": {"ops", "winograd"},
    "layers": {"convolutions", "ops", "recompute"},
    "model": {"layers", "pretrained", "recompute"},  # from_pretrained, inside the function
    "pretrained": {"errors", "files", "imaging", "model", "weights"},
    "clock": set(),
    "engine": {"_C", "clock", "convolutions", "errors", "files", "layers", "model", "ops"},
    "segmentation": {"engine", "errors", "files", "imaging", "model"},
    "report": {"errors", "files", "imaging", "segmentation"},
    "train": {"errors", "files", "imaging", "layers", "model", "pretrained", "segmentation", "winograd"},
    "study": {"errors", "files", "imaging", "layers", "model", "ops", "report", "segmentation", "train"},
    "weights": set(),
    "nnunet": set(),
    "info": {"weights"},
    "export": {"errors", "files", "model"},
    "doctor": {"engine", "errors", "files", "info", "model", "ops", "winograd"},
    "bench": {
        "clock",
        "doctor",
        "engine",
        "errors",
        "files",
        "imaging",
        "model",
        "ops",
        "pretrained",
        "segmentation",
        "train",
    },
    "cli": {
        "bench",
        "doctor",
        "errors",
        "export",
        "imaging",
        "info",
        "pretrained",
        "report",
        "segmentation",
        "study",
        "train",
    },
}


def modules_after(code: str) -> set[str]:
    text = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return set(text.split())


def test_importing_the_package_and_the_command_line_is_lean():
    assert not HEAVY & modules_after("import scoat_fast, scoat_fast.cli")


def test_help_is_lean():
    code = "import scoat_fast.cli as c\ntry: c.main(['segment', '--help'])\nexcept SystemExit: pass"
    assert not HEAVY & modules_after(code)


def test_info_is_lean_and_true(capsys):
    code = "from scoat_fast.cli import main; main(['info', '--json'])"
    assert not modules_after(code) & HEAVY
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scoat_fast"] == scoat_fast.__version__ and found["packages"]["torch"] == metadata.version("torch")
    net = scoat_fast.SCOATNet.from_pretrained("scoat-w16")
    facts = found["weights"]["scoat-w16"]
    assert (facts["width"], facts["size"]) == (net.width, net.pretrained.size)
    assert facts["window"] == list(net.pretrained.window) and facts["licence"] == net.pretrained.licence
    assert main(["info"]) == 0
    assert "weights scoat-w16: width 16, 256x256, window -1250 to 250 HU" in capsys.readouterr().out


def test_the_network_needs_no_image_library():
    assert not (HEAVY - {"torch", "numpy"}) & modules_after("import scoat_fast; scoat_fast.SCOATNet(width=3)")


def test_loading_weights_leaves_the_compiler_of_pytorch_out():
    """It takes seconds to import: of the start of every command."""
    modules_after(
        "import scoat_fast; scoat_fast.SCOATNet.from_pretrained('scoat-w16'); assert 'torch._dynamo' not in sys.modules"
    )


def test_the_command_line_knows_what_there_is():
    """Its choices are spelled out there, so that asking for help imports nothing."""
    from scoat_fast.ops import ALL
    from scoat_fast.train.losses import LOSSES

    assert tuple(LOSSES) == cli.LOSSES
    assert tuple(op.name for op in ALL) == cli.OPERATIONS


@pytest.mark.parametrize("name", scoat_fast.__all__)
def test_public_names_exist(name):
    assert getattr(scoat_fast, name) is not None


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="nothing_like_this"):
        scoat_fast.nothing_like_this  # noqa: B018


def test_parts_depend_one_way():
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT).with_suffix("").parts
        if inside == ("__init__",):
            continue
        allowed = MAY_IMPORT[inside[0]] | {inside[0]}
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            here = ("scoat_fast", *inside)[: -node.level]
            target = (*here, *(node.module or "").split("."))[1:2]
            targets = [target[0]] if target and target[0] else [alias.name for alias in node.names]
            for name in targets:
                assert name in allowed or name == "__version__", f"{path.relative_to(ROOT)} imports {name}"


def test_an_operation_knows_no_other_and_its_variants_not_their_caller():
    for folder in (path for path in (ROOT / "ops").iterdir() if path.is_dir() and not path.name.startswith("__")):
        others = {path.name for path in folder.parent.iterdir() if path.is_dir()} - {folder.name}
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                    assert not others & names, path
                    assert path.name == "op.py" or "op" not in names, path


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == scoat_fast.__version__
    for command in ("segment", "prepare", "train", "validate", "doctor"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--quiet" in capsys.readouterr().out


def test_modules_have_docstrings():
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_container_gets_what_it_names():
    """No engine builds images here: what can be checked without one."""
    root = Path(__file__).parent.parent
    lines = (root / "Containerfile").read_text().replace("\\\n", "").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert all((root / name).exists() for name in copied)
    let_through = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_through == set(copied)
    extras = next(line for line in lines if "scoat_fast-*.whl" in line).partition("[")[2].partition("]")[0].split(",")
    assert set(extras) <= set(metadata.metadata("scoat-fast").get_all("Provides-Extra"))
