"""Training on microcontrollers: the exported programs of three nets on an emulated Cortex-M7, and on Arm's Linux.

    python examples/bench/mcu.py           # writes docs/results/bare_metal.md, about three minutes
    python examples/bench/mcu.py --check   # the same, printed only; fails where a machine gives other bits

Each net has TinyTrain's plan (1 MB, 15 % of full backward MACs). Its program is exported for SGD and for Adam, built
with the same bits for this machine, for a Cortex-M7 (`arm-none-eabi-gcc`, QEMU's board mps2-an500) and for aarch64 and
armv7 (user-mode emulation), and makes three updates with a made-up picture: hashes of features, live values and head
must agree. RAM is what the linker gave out, and the deepest that the stack went; instructions are what QEMU counted by
the system timer (-icount), which is no time: caches, flash and wait states are not emulated.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from engine import NETS, ROOT, load, task, tinytrain

from stages.artifacts.records import Head, LayerUpdate, Model, Plan, Run
from stages.bare_metal.program import Program, Programming, make_program, source_of
from stages.cost.model import paper_peak_bytes
from stages.cost.training import memory_bytes
from stages.models.deploy import Backbone, store
from stages.training.optimizers import Optimizing

CLASSES = 5
INSTRUCTIONS_A_TICK = 40
"""-icount shift=0 lets one nanosecond pass per instruction; the board's timer counts at 25 MHz."""
PROGRAMS = {
    "SGD": Programming(optimizing=Optimizing(optimizer="sgd", learning_rate=0.02)),
    "Adam": Programming(optimizing=Optimizing(optimizer="adam", learning_rate=1e-3)),
}
LIMITS = {"SGD": 440 * 1024, "Adam": 1 << 20}
"""Bytes of RAM that MCUNet's program may take."""
ARENA_LIMIT = 174_080
LINUX = {
    "aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64-static"),
    "armv7": ("arm-linux-gnueabihf-gcc", "qemu-arm-static"),
}
BOARD = ("arm-none-eabi-gcc", "qemu-system-arm")
PACKAGES = "Debian: gcc-arm-none-eabi, libnewlib-arm-none-eabi, qemu-system-arm"


def run_of(backbone: Backbone, updates: Sequence[LayerUpdate]) -> Run:
    """A run with this plan and a head of made-up prototypes."""
    rows = np.random.default_rng(0).standard_normal((CLASSES, backbone.graph.feature_dim)).astype(np.float32)
    head = Head("prototypes", np.arange(CLASSES), rows, np.zeros(CLASSES, np.float32), np.ones(CLASSES, bool))
    model = store(Model("", {}, backbone.input, "deploy", {}, head=head), backbone)
    return Run(model, plan=Plan("tinytrain", tuple(updates), 0, "paper", 0))


@dataclass(frozen=True)
class Board:
    """What the emulated board said of a program."""

    ram: int
    """Bytes: initialised data, zeroed data and the deepest stack."""
    flash: int
    code: int
    """Bytes of flash beside the net's own constants."""
    prefix: int
    step: int
    """Instructions of the frozen part, and of a whole update."""


def results_of(said: str) -> list[str]:
    """The lines that every machine must give."""
    return [line for line in said.splitlines() if line.startswith(("features", "step"))]


def run_host(folder: Path) -> list[str]:
    call(["make", "-s", "-j2", "-C", str(folder), "BITS=same", "CFLAGS=-O1"])
    return results_of(call([str(folder / "network"), "check"]))


def run_linux(folder: Path, compiler: str, emulator: str) -> list[str]:
    call(["make", "-s", "-j2", "-C", str(folder), "BITS=same", "CFLAGS=-O1", f"CC={compiler}", "LDFLAGS=-static"])
    return results_of(call([emulator, str(folder / "network"), "check"]))


def run_board(folder: Path, program: Program) -> tuple[list[str], Board]:
    sizes = call(["make", "-s", "-C", str(folder), "cortex-m", "BITS=same"]).splitlines()[-1].split()
    text, data, bss = map(int, sizes[:3])
    words = "enable=on,target=native,arg=network,arg=check"
    said = call([
        BOARD[1], "-M", "mps2-an500", "-nographic", "-icount", "shift=0", "-semihosting-config", words,
        "-kernel", str(folder / "network.elf"),
    ])  # fmt: skip
    prefix, step = (INSTRUCTIONS_A_TICK * number(said, what) for what in ("prefix", "whole step"))
    stack, constants = number(said, "stack"), program.flash_bytes
    return results_of(said), Board(data + bss + stack, text + data, text + data - constants, prefix, step)


def number(said: str, what: str) -> int:
    found = re.search(rf"{what} (\d+)", said)
    assert found is not None, said
    return int(found[1])


def call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{command[0]}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def report(nets: Iterable[str], wrong: list[str]) -> Iterator[str]:
    """The page; what does not agree or is too large goes to `wrong`."""
    machines = [name for name, tools in LINUX.items() if all(map(shutil.which, tools))]
    yield from [
        "# On a microcontroller",
        "",
        "Written by `make bench-mcu`. Exported programs with the same bits, at 128 x 128,",
        f"{CLASSES} classes, one sample per update, updates made during the backward pass. Emulated by QEMU: Cortex-M7 "
        "(mps2-an500)" + "".join(f", {name}" for name in machines) + ".",
        "",
        "* *RAM* is all of it: arena, live values, the room for a piece of the gradient, optimiser, head, a row of the "
        "picture, stack.",
        "* *paper*: the accounting of TinyTrain for the same plan (live values, their gradients and state, and the",
        "  larger of what is saved and of the inference peak); the peak alone stands beside it.",
        "* *flash*: constants and code; *instructions*: of the scalar kernels, without time for caches or wait states.",
        "",
        "| net | update | RAM, bytes | paper, bytes | its inference peak | arena | flash | code "
        "| instructions: frozen part | whole update | same bits |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for net in nets:
        backbone = load(net)
        updates = tinytrain(backbone, task(backbone, 25))
        made_from = source_of(run_of(backbone, updates), same_bits=True)
        for name, how in PROGRAMS.items():
            program = make_program(made_from, how)
            with TemporaryDirectory() as place:
                folder = Path(place)
                for path, data in program.files.items():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(data)
                host = run_host(folder)
                lines, board = run_board(folder, program)
                results = {"Cortex-M7": lines} | {each: run_linux(folder, *LINUX[each]) for each in machines}
            alike = [each for each, found in results.items() if found == host and len(host) == 4]
            wrong += [f"{net}, {name}: {each} gives other bits" for each in results if each not in alike]
            if net == "mcunet-5fps":
                wrong += [f"{net}, {name}: {board.ram:,} bytes of RAM"] * (board.ram > LIMITS[name])
                wrong += [f"{net}: an arena of {program.ram['arena']:,} bytes"] * (program.ram["arena"] > ARENA_LIMIT)
            paper = memory_bytes(backbone.graph, updates, optimizer=how.optimizing.optimizer)
            yield (
                f"| {net} | {name} | {board.ram:,} | {paper:,} | {paper_peak_bytes(backbone.graph):,} "
                f"| {program.ram['arena']:,} | {board.flash:,} | {board.code:,} | {board.prefix / 1e6:.1f} M "
                f"| {board.step / 1e6:.1f} M | {', '.join(alike)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print only; fail where bits differ or RAM is exceeded")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "bare_metal.md")
    options = parser.parse_args()
    missing = [tool for tool in BOARD if shutil.which(tool) is None]
    if missing:
        print(f"mcu: skipped, no {' and no '.join(missing)} ({PACKAGES})")
        return
    wrong: list[str] = []
    lines = []
    for line in report(options.nets, wrong):
        print(line, flush=True)
        lines.append(line)
    if not options.check:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
