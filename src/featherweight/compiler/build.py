"""Call the C compiler: flags of each target, a cache by content, clear errors."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from featherweight.errors import DataError, FeatherweightError, MissingExtraError

LIBRARY, WASM_MODULE = "libmodel.so", "model.wasm"
COMMON = ("-O3", "-fno-strict-aliasing", "-fwrapv", "-fno-math-errno", "-fno-trapping-math")
SHARED = ("-fPIC", "-shared", "-fvisibility=default", "-s", "-fno-asynchronous-unwind-tables")
"""A library without what only a debugger reads: a fifth of its size."""
WASM = ("-nostdlib", "-mexec-model=reactor", "-fvisibility=default")
WASM_LINK = ("-Wl,--no-entry,--export-dynamic,--export=__heap_base,--stack-first", "-Wl,-z,stack-size=262144")
"""A module without imports: its own memory, the stack at the bottom so that an overflow traps."""
BUILD_SECONDS = 900
MISSING = (
    "file not found",
    "No such file or directory",
    "cannot find -l",
    "unable to find library",
    "wasm-ld",
)
"""What compilers say when a part of their package is absent."""


@dataclass(frozen=True)
class Target:
    """A machine to compile for: the compilers that can, their flags, floats of a vector, how to link."""

    name: str
    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    vector: int
    package: str
    runs_here: bool = True
    link: tuple[str, ...] = SHARED
    libraries: tuple[str, ...] = ("-lm",)
    library: str = LIBRARY
    threads: bool = True


_X86 = ("cc", "gcc", "clang")
TARGETS = {
    target.name: target
    for target in (
        Target("native", _X86, ("-std=gnu99", "-march=native"), 0, "gcc"),
        Target("x86-64-v3", _X86, ("-std=gnu99", "-march=x86-64-v3"), 8, "gcc"),
        Target("x86-64-v4", _X86, ("-std=gnu99", "-march=x86-64-v4", "-mprefer-vector-width=512"), 16, "gcc"),
        Target(
            "aarch64",
            ("aarch64-linux-gnu-gcc",),
            ("-std=gnu99", "-march=armv8.2-a+dotprod"),
            4,
            "gcc-aarch64-linux-gnu",
            runs_here=False,
        ),
        Target(
            "wasm32",
            ("clang",),
            ("-std=gnu99", "--target=wasm32-wasi", "-msimd128"),
            4,
            "clang lld wasi-libc",
            runs_here=False,
            link=(*WASM, *WASM_LINK),
            libraries=("-lm", "-lc"),
            library=WASM_MODULE,
            threads=False,
        ),
        Target("generic-c", _X86, ("-std=c99", "-pedantic", "-DFW_GENERIC"), 1, "gcc"),
    )
}


def target_named(name: str) -> Target:
    """Return a target.

    Raises:
        DataError: no target has this name.
    """
    if name not in TARGETS:
        raise DataError(f"No target '{name}'; expected one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def find_compiler(target: Target) -> str:
    """Return the path of a compiler for the target; `CC` names one for the machine itself.

    Raises:
        MissingExtraError: none is installed; the message names the package.
    """
    chosen = os.environ.get("CC") if target.runs_here else None
    for name in [chosen, *target.compilers] if chosen else target.compilers:
        found = shutil.which(name) if name else None
        if found:
            return found
    raise MissingExtraError(
        f"No C compiler for target {target.name}: looked for {', '.join(target.compilers)}. "
        f"Install one: apt install {target.package}"
    )


@lru_cache(maxsize=8)
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


@lru_cache(maxsize=8)
def vector_floats(target: Target) -> int:
    """Return how many float32 a vector of the target holds: 16 with AVX-512, 8 with AVX, else 4 or 1."""
    if target.vector:
        return target.vector
    compiler = find_compiler(target)
    done = subprocess.run(
        [compiler, *target.flags, "-dM", "-E", "-x", "c", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    macros = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("#define ")}
    if "__AVX512F__" in macros:
        return 16
    return 8 if "__AVX2__" in macros else 4


def runs_on_this_machine(target: Target) -> bool:
    """Say whether this machine has the instructions of a target."""
    if not target.runs_here:
        return False
    needed = {"x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}.get(target.name)
    return needed is None or needed in _cpu_info().split()


def cache_folder() -> Path:
    """Return where built libraries and tuned tiles are kept; `FEATHERWEIGHT_CACHE` names another place."""
    chosen = os.environ.get("FEATHERWEIGHT_CACHE")
    root = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "featherweight"
    return root / "compiler"


def _cpu_info() -> str:
    """Return what the system says about its first processor."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return sys.platform


def processor() -> str:
    """Return a short key of this processor: libraries for `native` run only on the same kind."""
    names = ("model", "flags", "cpu family", "Features")
    kept = [line for line in _cpu_info().splitlines() if line.startswith(names)]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]


def build_library(
    sources: Sequence[Path], library: Path, target: Target, threads: int = 1, extra: Sequence[str] = ()
) -> bool:
    """Compile C files into a shared library, or copy it from the cache.

    Args:
        sources: C files; headers lie beside them.
        library: the file to write.
        target: whose compiler and flags to use.
        threads: more than one links pthread.
        extra: further flags.

    Returns:
        Whether the cache had it.

    Raises:
        MissingExtraError: no compiler, or one without the target's C library.
        FeatherweightError: the compiler failed or took longer than 15 minutes.
    """
    compiler = find_compiler(target)
    flags = [*COMMON, *target.flags, *(["-pthread"] if threads > 1 else []), *extra]
    key = hashlib.sha256("\0".join([_version(compiler), *flags, *target.link]).encode())
    if target.name == "native":
        key.update(processor().encode())
    for path in sources:
        key.update(path.read_bytes())
    cached = cache_folder() / f"{key.hexdigest()[:32]}{library.suffix}"
    if cached.is_file():
        _replace(cached, library)
        return True
    command = [compiler, *flags, *target.link, "-o"]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / library.name
        call_compiler([*command, str(built), *map(str, sources), *target.libraries], target)
        cached.parent.mkdir(parents=True, exist_ok=True)
        _replace(built, cached)
        _replace(built, library)
    return False


def call_compiler(command: list[str], target: Target) -> None:
    """Run a compiler; errors are those of `build_library`."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise FeatherweightError(f"{command[0]} did not finish within {BUILD_SECONDS} s.") from error
    if done.returncode and any(words in done.stderr for words in MISSING):
        raise MissingExtraError(
            f"{command[0]} lacks a part that target {target.name} needs. "
            f"Install it: apt install {target.package}"
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[
            -1:
        ]
        raise FeatherweightError(f"{command[0]} failed: {'; '.join(lines[:3])}")


def _replace(source: Path, target: Path) -> None:
    """Copy a program so that a reader sees the old or the new one, never a part."""
    write_whole(target, source.read_bytes(), 0o755)


def write_whole(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old or the new one, never a part; a link is replaced itself.

    Raises:
        OSError: the folder cannot be written; no part is left behind.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
