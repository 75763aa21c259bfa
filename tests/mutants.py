"""Mutation testing of the core: change one thing at a time and see whether a test notices.

    make mutants                                            every core module: hours
    make mutants MODULES=stages/planning/problem.py         one of them: some minutes

Cosmic Ray changes the modules of a copy, in build/mutants, never those of the checkout. A survivor is printed as a
diff: either a test is missing, or the change makes no difference (an early exit that only saves time, a message).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
NOT_COPIED = (".*", "build", "demo-out", "*.egg-info", "__pycache__")

CORE = {
    "stages/artifacts/codec.py": "tests/artifacts",
    "stages/artifacts/schema.py": "tests/artifacts",
    "stages/artifacts/stream.py": "tests/artifacts",
    "stages/cost/training.py": "tests/cost tests/engines/torch/test_net.py",
    "stages/engines/torch/suffix.py": "tests/engines/torch",
    "stages/graphs/graph.py": "tests/graphs tests/engines/torch/test_net.py",
    "stages/planning/budget.py": "tests/planning",
    "stages/planning/channels.py": "tests/planning/test_channels.py tests/planning/test_layers.py",
    "stages/planning/coupling.py": "tests/planning/test_layers.py",
    "stages/planning/greedy.py": "tests/planning/test_layers.py",
    "stages/planning/knapsack.py": "tests/planning/test_layers.py",
    "stages/planning/problem.py": "tests/planning/test_layers.py",
    "stages/training/updates.py": "tests/training/test_updates.py",
    "stages/valuation/allocation.py": "tests/valuation",
    "stages/valuation/demand.py": "tests/valuation/test_demand.py",
    "stages/valuation/designs.py": "tests/valuation",
    "stages/valuation/shares.py": "tests/valuation",
    "stages/valuation/strata.py": "tests/valuation",
}
"""Module -> the tests that should notice any change to it."""

MAKES_NO_DIFFERENCE = (
    "core/ReplaceBinaryOperator_BitOr_.*",  # mostly in annotations, which are not evaluated
    "core/RemoveDecorator",  # a cached property that is computed again
    "core/ReplaceComparisonOperator_.*_Is(Not)?",  # of small numbers the same as equality
)

CONFIG = """
[cosmic-ray]
module-path = {module!r}
timeout = 120.0
excluded-modules = []
test-command = "{python} -m pytest -q -x -p no:cacheprovider {tests}"
distributor.name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {excluded}
"""


def survivors(module: str) -> Iterator[str]:
    """Run every mutant of a module in a fresh copy of the project; the diffs of those that no test noticed.

    Raises `CalledProcessError` where the tests fail without any change.
    """
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(ROOT, WORK, ignore=shutil.ignore_patterns(*NOT_COPIED))
    text = CONFIG.format(module=module, python=sys.executable, tests=CORE[module], excluded=list(MAKES_NO_DIFFERENCE))
    (WORK / "mutants.toml").write_text(text)
    for step in ("baseline mutants.toml", "init mutants.toml mutants.sqlite"):
        _tool("cosmic-ray", *step.split())
    _tool("cr-filter-operators", "mutants.sqlite", "mutants.toml")
    _tool("cosmic-ray", "exec", "mutants.toml", "mutants.sqlite")
    for line in _tool("cosmic-ray", "dump", "mutants.sqlite").splitlines():
        _, result = json.loads(line)
        if result is not None and result["test_outcome"] == "survived":
            yield result["diff"]


def _tool(name: str, *arguments: str) -> str:
    """What one of Cosmic Ray's commands prints."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    return subprocess.run(command, cwd=WORK, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(modules: list[str]) -> int:
    """Print the survivors of the modules, all core modules where none is named; 1 where there are any."""
    unknown = [module for module in modules if module not in CORE]
    if unknown:
        print(f"{unknown[0]}: not one of the core modules, {', '.join(CORE)}", file=sys.stderr)
        return 2
    found = 0
    for module in modules or CORE:
        print(f"== {module}", flush=True)
        for diff in survivors(module):
            found += 1
            print(diff, flush=True)
    print(f"{found} survived")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
