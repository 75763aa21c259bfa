"""The table of `make mutants` names what there is."""

from __future__ import annotations

import pytest

from tests.mutants import CORE, ROOT, main


@pytest.mark.parametrize("module", CORE)
def test_core_modules_and_their_tests_exist(module: str) -> None:
    assert [path for path in (module, *CORE[module].split()) if not (ROOT / path).exists()] == []


def test_another_module_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stages/cake.py"]) == 2
    assert "not one of the core modules" in capsys.readouterr().err
