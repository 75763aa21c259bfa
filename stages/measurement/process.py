"""How much memory this process holds, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def process_memory(proc: Path = Path("/proc")) -> dict[str, int]:
    """Bytes of this process: `uss` (its own pages), `pss` (shared pages divided among their users), `rss` (all
    resident) and `peak_rss`. Empty where the kernel does not say (`/proc/self/smaps_rollup` is Linux's).
    """
    rollup = _sizes(proc / "self/smaps_rollup")
    if not {"Rss", "Pss", "Private_Clean", "Private_Dirty"} <= rollup.keys():
        return {}
    found = {
        "process_uss_bytes": rollup["Private_Clean"] + rollup["Private_Dirty"],
        "process_pss_bytes": rollup["Pss"],
        "process_rss_bytes": rollup["Rss"],
    }
    peak = _sizes(proc / "self/status").get("VmHWM")
    return found if peak is None else {**found, "process_peak_rss_bytes": peak}


def _sizes(path: Path) -> dict[str, int]:
    """`Name:   123 kB` lines of a file as bytes; empty where the file cannot be read."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in fields if len(words) == 3 and words[2] == "kB"}
