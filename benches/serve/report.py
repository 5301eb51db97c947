"""What a report has beside its numbers: the machine, what else ran on it, tables."""

import os
import platform
from pathlib import Path


def machine():
    """The processor, its cores that may be used, its vector instructions, and memory."""
    info = Path("/proc/cpuinfo").read_text()
    field = lambda name: next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith(name)), "")
    known = set(field("flags").split())
    simd = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in known]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    processor = field("model name") or platform.machine()
    system = f"{platform.system()} {platform.release()}"
    return f"{cores} cores of {processor} ({', '.join(simd) or 'no AVX2'}), {memory:.0f} GiB, {system}"


def busy():
    """CPU seconds that others, or the host, had since the machine started: all but this script and its children."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _waiting, *more = [int(n) for n in file.readline().split()[1:9]]
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def markdown(header, lines):
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
