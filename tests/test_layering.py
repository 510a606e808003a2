"""The folder list is the architecture: imports point up the list only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder may import itself and what stands before it; errors.py, registry.py and secrets.py are everyone's, and cli.py
# sees all.
LAYERS = ["config", "data", "models", "bank", "losses", "build", "optim", "checkpoints", "runs", "ranks", "profile"]
LAYERS += ["autotune", "engine", "report", "evaluation", "export", "doctor", "ablation", "commands"]
ONE_FILE = {
    "nvidia": "data/stream/dali_loader.py",
    "xformers": "models/memory_efficient.py",
    "apex": "optim/optimizer.py",
    "torchmetrics": "evaluation/detection/precision.py",
    "submitit": "ranks/slurm.py",
    "huggingface_hub": "export/hub.py",
    "segmentation_models_pytorch": "evaluation/segmentation/model.py",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: imports by more than one dot"
            found.add(node.module if node.level == 0 else ".".join(("", node.module or "")))
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("ccmim_fast"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_up(path):
    layer = path.relative_to(ROOT / "ccmim_fast").parts[0]
    if layer not in LAYERS:
        return
    allowed = {*LAYERS[: LAYERS.index(layer) + 1], "errors", "registry", "secrets"}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("ccmim_fast.")}
    assert used <= allowed, f"{path.name} imports {used - allowed}"


@pytest.mark.parametrize("path", sources("kernels/ccmim_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_nothing_of_ours(path):
    assert not any(name.split(".")[0] == "ccmim_fast" for name in imports(path))


@pytest.mark.parametrize("library", ONE_FILE)
def test_optional_libraries_are_imported_in_one_file(library):
    users = [
        str(path.relative_to(ROOT / "ccmim_fast"))
        for path in sources("ccmim_fast")
        if any(name.split(".")[0] == library for name in imports(path))
    ]
    assert users in ([], [ONE_FILE[library]])


def test_no_import_package_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_host_sync_in_the_step():
    """`.item()`, `.cpu()`, `.tolist()`, print and synchronize would make the host wait for the device."""
    tree = ast.parse((ROOT / "ccmim_fast" / "engine" / "step.py").read_text())
    called = {
        n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
    }
    assert not called & {"item", "cpu", "tolist", "numpy", "print", "synchronize", "float", "bool"}


def test_files_stay_readable():
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*sources("ccmim_fast"), *sources("kernels")]
        if (n := len(p.read_text().splitlines())) > 300
    }
    assert not long


def test_functions_fit_a_screen_and_a_half():
    long = {
        f"{p.relative_to(ROOT)}::{node.name}": lines
        for p in [*sources("ccmim_fast"), *sources("kernels")]
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > 60
    }
    assert not long
