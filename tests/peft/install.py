"""Installs requirements.txt into a folder, which appears whole or not at all.

    python3 tests/peft/install.py FOLDER

For Linux, PyPI has PyTorch only with CUDA: 4 GB of libraries that nothing calls on a CPU, but that must be there for
the loader. Libraries of the same names stand in for them here, made with the C compiler: each has the functions that
PyTorch looks for, and each function ends the program. CUDA's runtime and profiler, which are called at start, are small
and real.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def stand_in(name, wanted, folder):
    """Makes the library `name` with those of the `wanted` functions that are looked for in it."""
    version = "NVSHMEM" if "nvshmem" in name else name
    # Some libraries have no versions, so it is not known which function is whose: each of them gets all.
    functions = [f for f, v in wanted if v == version] or [f for f, v in wanted if not v]
    source = "".join(f"void {f}(void) {{ __builtin_trap(); }}\n" for f in functions)
    versions = folder / "versions"
    versions.write_text(f"{version} {{ *; }};")
    link = [f"-Wl,-soname,{name}", f"-Wl,--version-script,{versions}"]
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / name, *link], input=source, text=True, check=True
    )
    versions.unlink()


def without_cuda(folder):
    libraries = folder / "torch" / "lib"
    there = {path.name for path in folder.rglob("*.so*")}
    needed, wanted = set(), set()
    for path in libraries.glob("*.so"):
        needed.update(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv|nccl)[^]]*)\]", output("readelf", "-dW", path)))
        wanted.update(re.findall(r" U ((?:cu|nv|nccl)\w*)(?:@(\S+))?", output("nm", "-D", path)))
    for name in sorted(needed - there):
        stand_in(name, wanted, libraries)


def main():
    folder = Path(sys.argv[1])
    part = folder.with_name(folder.name + ".part")
    for old in [folder, part]:
        shutil.rmtree(old, ignore_errors=True)
    requirements = Path(__file__).with_name("requirements.txt")
    # A cache would only keep the wheels, which are not asked for again.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-deps", "--target", part]
    subprocess.run([*pip, "--requirement", requirements], check=True)
    if sys.platform == "linux":
        without_cuda(part)
    environment = os.environ | {"PYTHONPATH": str(part)}
    subprocess.run([sys.executable, "-c", "import peft, transformers"], env=environment, check=True)
    (part / "ready").touch()
    part.rename(folder)


main()
