#!/usr/bin/env python3
"""Makes the PTX beside this script of every `src/ops/<op>/<op>.cu`, and `manifest.rs`, which embeds it.

    make.py           installs the pinned compiler into `.nvcc` at the root unless it is there, and makes the PTX of what changed
    make.py --check   assembles what is committed for every architecture that it is meant for: prints registers, spills and
                      shared memory of each kernel, and fails where one spills

A module is made for sm_80, which every card behind it takes; and for sm_90a too where its source says so in a line
`// PTX: sm_90a`. The compiler is pinned: the PTX of a newer one is refused by drivers that the older one is made for.
"""

import argparse
import hashlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CRATE = Path(__file__).resolve().parent.parent
PTX = CRATE / "ptx"
TOOLS = CRATE.parent / ".nvcc"
BIN = TOOLS / "nvidia" / "cu13" / "bin"
WHEELS = [
    f"{name}==13.0.*"
    for name in ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
]
# No contraction: the emulator of kernels/emulator rounds the same.
FLAGS = ["-ptx", "-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
# What a PTX target is assembled for when it is checked.
ASSEMBLED_FOR = {"sm_80": ["sm_80", "sm_86", "sm_89", "sm_90a"], "sm_90a": ["sm_90a"]}
RUST_NAME = {"sm_80": "Sm80", "sm_90a": "Sm90a"}


def install():
    """The compiler, or None where it cannot be had."""
    if not (BIN / "nvcc").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TOOLS), *WHEELS]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
    version = subprocess.run([BIN / "nvcc", "--version"], capture_output=True, text=True)
    return BIN / "nvcc" if "release 13.0" in version.stdout else None


def sources():
    """Every module: its name, its `.cu`, and its PTX targets."""
    for path in sorted(CRATE.glob("src/ops/*/*.cu")):
        if path.stem == path.parent.name:
            has_hopper = re.search(r"^// PTX: sm_90a$", path.read_text(), re.MULTILINE)
            yield path.stem, path, ["sm_80", "sm_90a"] if has_hopper else ["sm_80"]


def source_hash(path):
    """SHA-256 of the compiler's flags, then of a source and of all that it includes, depth first, each once."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    seen = set()

    def add(file):
        if file in seen:
            return
        seen.add(file)
        text = file.read_bytes()
        digest.update(text)
        for name in re.findall(rb'^#include "([^"]+)"$', text, re.MULTILINE):
            beside, shared = file.parent / name.decode(), CRATE / "include" / name.decode()
            if beside.exists():
                add(beside)
            elif shared.exists():
                add(shared)

    add(path)
    return digest.hexdigest()


def compile_module(nvcc, name, path, target):
    out = PTX / f"{name}.{target}.ptx"
    arch = target.replace("sm_", "compute_")
    command = [nvcc, *FLAGS, f"-arch={arch}", f"-I{CRATE / 'include'}", str(path), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{path.name} for {target}:\n{result.stdout}{result.stderr}")
    return out


def is_made(name, path, target, manifest):
    """Whether the PTX is there, is what the manifest says, and was made of these sources."""
    out = PTX / f"{name}.{target}.ptx"
    hashes = rf'include_bytes!\("{re.escape(out.name)}"\),\s+sha256: "(\w+)",\s+source_sha256: "(\w+)"'
    found = re.search(hashes, manifest)
    return bool(found) and out.exists() and found[1] == hashlib.sha256(out.read_bytes()).hexdigest() and found[2] == source_hash(path)


def make(nvcc):
    modules = [(name, path, target) for name, path, targets in sources() for target in targets]
    manifest_path = PTX / "manifest.rs"
    manifest = manifest_path.read_text() if manifest_path.exists() else ""
    stale = [module for module in modules if not is_made(*module, manifest)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda module: compile_module(nvcc, *module), stale))
    outs = [PTX / f"{name}.{target}.ptx" for name, _, target in modules]
    for unknown in set(PTX.glob("*.ptx")) - set(outs):
        unknown.unlink()
    lines = ["// Made by make.py together with the files that it names: do not edit.", "&["]
    for (name, path, target), out in zip(modules, outs):
        lines += [
            "    PtxModule {",
            f'        name: "{name}",',
            f"        arch: Arch::{RUST_NAME[target]},",
            f'        text: include_bytes!("{out.name}"),',
            f'        sha256: "{hashlib.sha256(out.read_bytes()).hexdigest()}",',
            f'        source_sha256: "{source_hash(path)}",',
            "    },",
        ]
    manifest_path.write_text("\n".join([*lines, "]", ""]))
    print(f"made {len(stale)} of {len(outs)} modules")


def assemble(module):
    """What ptxas says of each kernel, as (kernel, registers, spilled bytes, shared bytes, stack bytes)."""
    path, arch = module
    command = [BIN / "ptxas", "-v", f"-arch={arch}", str(path), "-o", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{path.name} for {arch}:\n{result.stderr}")
    kernels = []
    for part in re.split(r"Compiling entry function '", result.stderr)[1:]:
        number = lambda pattern: int((re.search(pattern, part) or [0, 0])[1])
        spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        registers, shared, stack = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), number(r"(\d+) bytes stack")
        kernels.append((part.split("'")[0], registers, spilled, shared, stack))
    return kernels


def check():
    modules = [
        (path, arch) for path in sorted(PTX.glob("*.ptx")) for arch in ASSEMBLED_FOR[path.name.split(".")[1]]
    ]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(assemble, modules))
    table = {}
    for (path, arch), kernels in zip(modules, results):
        for kernel, *numbers in kernels:
            table.setdefault((path.name, kernel), {})[arch] = numbers
    has_spill = False
    print(f"{'kernel':<44} registers / shared bytes by architecture")
    for (file, kernel), by_arch in table.items():
        cells = []
        for arch, (registers, spilled, shared, stack) in by_arch.items():
            note = f" SPILLS {spilled}" if spilled else ""
            has_spill |= spilled > 0
            cells.append(f"{arch} {registers} / {shared}{f' stack {stack}' if stack else ''}{note}")
        print(f"{file.split('.')[0] + '::' + kernel:<44} {', '.join(cells)}")
    if has_spill:
        sys.exit("a kernel spills registers")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="assemble what is committed")
    arguments = parser.parse_args()
    nvcc = install()
    if nvcc is None:
        message = "the pinned CUDA compiler cannot be had here"
        if arguments.check:
            print(f"skipped: {message}")
            return
        sys.exit(message)
    if arguments.check:
        check()
    else:
        make(nvcc)


if __name__ == "__main__":
    main()
