"""The direction of imports (docs/decisions.md, "Layout"), and what the library must never touch."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block

ROOT = Path(__file__).parents[2]
STAGES = ROOT / "stages"
FILES = sorted(STAGES.rglob("*.py"))
SETTINGS = sorted((STAGES / "settings").glob("*.py"))
COMMANDS = sorted((ROOT / "edgetrain_cli" / "commands").glob("*.py"))

MAY_IMPORT = {
    "artifacts": {"errors"},
    "operators": {"errors"},
    "graphs": {"errors", "artifacts", "operators", "engines.torch.reference"},
    "engines": {"errors", "artifacts", "graphs", "operators", "models.deploy"},
    "models": {"errors", "artifacts", "engines", "graphs", "losses", "operators"},
    "cost": {"errors", "artifacts", "graphs", "operators", "engines.native.lowering", "engines.native.memory"},
    "planning": {"errors", "artifacts", "cost", "graphs", "operators"},
    "data": {"errors", "artifacts", "randomness"},
    "fsl": {
        "errors",
        "artifacts",
        "data",
        "engines.torch.reference",
        "graphs",
        "losses",
        "models",
        "operators",
        "planning.policies",
        "planning.precision",
        "randomness",
    },
    "importance": {
        "errors",
        "artifacts",
        "engines",
        "fsl",
        "graphs",
        "models",
        "operators",
        "owncode",
        "randomness",
    },
    "training": {"errors", "artifacts", "engines", "fsl", "graphs", "losses", "models", "operators", "randomness"},
    "measurement": {"errors", "artifacts", "cost", "engines", "graphs", "models", "operators"},
    "methods": {
        "errors",
        "artifacts",
        "cost",
        "data",
        "engines",
        "fsl",
        "graphs",
        "importance",
        "measurement.energy",
        "models",
        "operators",
        "planning",
        "randomness",
        "training",
    },
    "bare_metal": {"errors", "artifacts", "engines", "models", "planning", "training"},
    "valuation": {
        "errors",
        "artifacts",
        "cost",
        "data",
        "engines",
        "graphs",
        "models",
        "operators",
        "owncode",
        "randomness",
        "training",
    },
}
"""Domain package -> what of `stages` it may import besides itself. Stage modules may import every package.

Capture compares what it found with the plain interpreter; engines run the deploy form's `Backbone`."""

ARCHITECTURES = (
    "blocks", "efficientnet_lite", "mcunet", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3", "proxyless", "resnet",
    "small", "squeezenet", "vit",
)  # fmt: skip
TORCH = [
    *(STAGES / "engines" / "torch").glob("*.py"),
    *(STAGES / "graphs" / f"{name}.py" for name in ("calls", "capture", "onnx_reader", "onnx_patterns", "opaque")),
    *(STAGES / "models" / f"{name}.py" for name in (*ARCHITECTURES, "registry", "modules", "matching", "calibration")),
    *(
        STAGES / "fsl" / f"{name}.py"
        for name in ("meta_training", "optimizing", "settling", "simulated_bits", "slicing", "trainer", "team")
    ),
    STAGES / "methods" / "lite_residual_net.py",
    STAGES / "pretraining.py",
    STAGES / "importing.py",
]
"""What needs torch by nature: its engine, capture, models as torch modules, meta-training, a baseline."""
IN_FUNCTIONS = [
    *(STAGES / "operators").glob("*.py"),
    STAGES / "engines" / "choice.py",
    STAGES / "exporting.py",
    STAGES / "methods" / "tinytl.py",
    STAGES / "models" / "state.py",
    STAGES / "randomness.py",
]
"""What imports it in functions that compute with it (or for type checkers): the operators' torch rules, for one."""
NO_TORCH = [path for path in FILES if path not in TORCH]


BESIDE = {"pretrain_fsl": {"importing"}}
"""Command -> a second stage that it calls: meta-training may begin with `import`. `inspecting` makes tables of all."""


def imports(path: Path, *, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check():
    assert len(FILES) > 40
    assert len(COMMANDS) > 10
    assert len(SETTINGS) > 5
    assert {path.relative_to(STAGES).parts[0] for path in FILES} >= set(MAY_IMPORT)
    assert len(NO_TORCH) > 100
    assert all(path.exists() for path in (*TORCH, *IN_FUNCTIONS))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_stages_do_not_know_the_command_line(path):
    roots = {module.split(".")[0] for module in imports(path)}
    assert roots.isdisjoint({"typer", "rich", "tqdm", "edgetrain_cli", "argparse", "matplotlib"})
    if path != STAGES / "artifacts" / "hdf5.py":
        assert "h5py" not in roots


@pytest.mark.parametrize("path", FILES, ids=name)
def test_packages_import_along_the_arrows(path):
    used = {module.removeprefix("stages.") for module in imports(path) if module.startswith("stages.")}
    package = path.relative_to(STAGES).parts[0]
    if package in MAY_IMPORT:
        allowed = MAY_IMPORT[package] | {package}
        wrong = {module for module in used if not any((module + ".").startswith(way + ".") for way in allowed)}
        assert not wrong
    elif package != "settings" and path.stem not in (
        "pipeline",
        "errors",
        "losses",
        "owncode",
        "randomness",
        "__init__",
    ):
        stage_modules = {file.stem for file in STAGES.glob("*.py")} - {
            "errors",
            "losses",
            "owncode",
            "randomness",
            "__init__",
        }
        assert stage_modules.isdisjoint(module.split(".")[0] for module in used), "a stage imports a stage"


@pytest.mark.parametrize("path", NO_TORCH, ids=name)
def test_the_device_half_needs_no_torch(path):
    tops = path in IN_FUNCTIONS
    assert "torch" not in {module.split(".")[0] for module in imports(path, top_level_only=tops)}


def test_what_needs_no_torch_imports_nothing_that_does():
    names = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in NO_TORCH]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "False", result.stderr


SEEDS = {"np.random.seed", "torch.manual_seed", "random.seed"}
SURROUNDINGS = {"sys.stdin", "sys.stdout", "sys.stderr", "sys.argv", "os.environ", "os.getenv"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_stages_touch_neither_streams_nor_arguments_nor_environment(path):
    tree = ast.parse(path.read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called.isdisjoint({"print", "input"})
    used = attributes(tree)
    assert used.isdisjoint(SURROUNDINGS)
    assert used.isdisjoint(SEEDS) or "fork_rng" in path.read_text(), "seeds the process's generator"


def attributes(tree: ast.AST) -> set[str]:
    """Every `name.attribute` of a module."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return {f"{node.value.id}.{node.attr}" for node in nodes}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_module_is_named_like_the_standard_library(path):
    if path.stem != "__init__":
        assert path.stem not in sys.stdlib_module_names
        assert path.stem != "utils"


@pytest.mark.parametrize("path", COMMANDS, ids=name)
def test_commands_import_nothing_heavy_at_the_top(path):
    roots = {module.split(".")[0] for module in imports(path, top_level_only=True)}
    assert roots.isdisjoint({"torch", "numpy", "h5py", "matplotlib", "scipy", "PIL", "rich", "tqdm"})


def heavy_imports(arguments):
    """What of the large libraries a command line imports."""
    code = (
        "import sys, runpy; sys.argv = ['edgetrain', *sys.argv[1:]]\n"
        "try: runpy.run_module('edgetrain_cli', run_name='__main__')\n"
        "finally: print('heavy:', *sorted({'torch', 'numpy', 'h5py', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("heavy:")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["filter", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    assert heavy_imports(arguments) == set()


@pytest.mark.parametrize(
    "arguments", [["filter"], ["filter", "--strategy", "camel"], ["join"], ["inspect"]], ids=" ".join
)
def test_what_computes_no_features_imports_no_torch(tmp_path, arguments):
    """Torch is most of such a process's memory and start, and `filter` runs beside training."""
    file = tmp_path / "samples.h5"
    file.write_bytes(encode(Block(np.zeros((120, 4), np.float32), np.arange(120) % 3, "ND")))
    out = [] if arguments == ["inspect"] else ["-o", str(tmp_path / "out.h5")]
    assert heavy_imports([*arguments, str(file), *out]) == {"numpy", "h5py"}
