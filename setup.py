"""Builds the native engine's C library beside its Python files; everything else stands in pyproject.toml.

It is an ordinary shared library that ctypes loads: no Python header is needed and one wheel serves every Python 3.
Without a compiler the install goes on, and PyTorch's engine serves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

SOURCES = Path("stages/engines/native/c")
FILES = ("width_1", "width_4", "width_8", "width_16", "check", "image", "run", "optimiser", "heads")
FLAGS = (
    "-std=gnu99", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-strict-aliasing", "-Wall", "-Wextra",
)  # fmt: skip
BUILDS = {
    "libedgetrain.so": ("-ffp-contract=fast",),
    "libedgetrain_same_bits.so": ("-ffp-contract=off", "-DET_SAME_BITS"),
}
"""Library -> the flags that make it: with fused products and sums, or with the same bits on every machine."""


class BuildLibrary(build_ext):
    """Compiles the library twice, with whatever `$CC`, Python's own compiler, cc, gcc or clang is there."""

    def run(self) -> None:
        compiler = _compiler()
        if compiler is None:
            return self._go_without("no C compiler was found")
        target = Path("stages/engines/native")
        if not (self.inplace or self.editable_mode):
            target = Path(self.build_lib) / target
        target.mkdir(parents=True, exist_ok=True)
        try:
            for name, flags in BUILDS.items():
                self._compile(compiler, name, flags, target)
        except (OSError, subprocess.CalledProcessError) as error:
            return self._go_without(f"{compiler[0]} failed ({error})")
        return None

    def _compile(self, compiler: list[str], name: str, flags: tuple[str, ...], target: Path) -> None:
        work = Path(self.build_temp) / name
        work.mkdir(parents=True, exist_ok=True)
        objects = [str(work / f"{file}.o") for file in FILES]
        for file, made in zip(FILES, objects, strict=True):
            subprocess.run([*compiler, *FLAGS, *flags, "-c", str(SOURCES / f"{file}.c"), "-o", made], check=True)
        linked = work / name  # moved into place whole: a running process may hold the old one
        subprocess.run([*compiler, "-shared", *objects, "-o", str(linked)], check=True)
        os.replace(shutil.copy(linked, target / f"{name}.new"), target / name)

    def _go_without(self, why: str) -> None:
        print(f"edgetrain: the native engine was not built: {why}; PyTorch's engine serves", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return sorted(str(path) for path in SOURCES.iterdir())


def _compiler() -> list[str] | None:
    for candidate in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        if candidate and shutil.which(candidate.split()[0]):
            return candidate.split()
    return None


class Wheel(bdist_wheel):
    """A wheel for this platform and any Python 3: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    """A distribution that is not the same on every platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=WithLibrary,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    ext_modules=[Extension("stages.engines.native.libedgetrain", [str(SOURCES / "run.c")], optional=True)],
)
