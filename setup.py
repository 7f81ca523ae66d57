"""Finds the packages and builds the extension perta_fast._C with ninja; all else is in pyproject.toml.

The CPU part needs a C++17 compiler only. The CUDA part is added where nvcc is found (CUDA_HOME, CUDA_PATH or
PATH). Environment: CXX; PERTA_CUDA=0 leaves CUDA out, PERTA_CUDA=1 insists on it; PERTA_CUDA_ARCHS, such as
"80;90", replaces the list of architectures. torch is needed for none of it.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# No contraction and no fast-math: every instruction set must give the same bits. The other flags let the
# compiler vectorise: errno and traps are not used, and `omp simd` marks loops whose elements have nothing in common.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-Wall",
    "-Wextra",
]
INSTRUCTION_SETS = {"portable": []}
if X86:
    CXX_FLAGS.append("-DPERTA_HAVE_X86")
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mf16c", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]
# Sources compiled once per instruction set, with flags of their own: products and sums may be fused in the
# Fisher alone, which is held to a tolerance and not to bits.
PER_INSTRUCTION_SET = {
    "accumulate_block": [],
    "blake3_block": [],
    "fisher_block": ["-ffp-contract=fast"],
    "rescaled_subtract_block": [],
}
CUDA_ARCHS = ("80", "90", "100")


@dataclass
class Cuda:
    """A compiler for the device and the static runtime to link with."""

    nvcc: str
    library: Path
    archs: list[str]


def stop(message: str) -> None:
    """End the build with one sentence instead of a traceback."""
    print(f"\nperta_fast: {message}\n", file=sys.stderr)
    sys.exit(1)


def find_compiler() -> str:
    """The C++ compiler: CXX, or the first common name on PATH."""
    if sys.platform == "win32":
        stop("Windows is not supported, as files are mapped, locked and flushed by POSIX calls; use WSL.")
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    tried = f"CXX is {wanted}" if wanted else "tried c++, g++, clang++"
    stop(
        f"no C++ compiler was found ({tried}). Install one: "
        "'apt install g++' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora), 'xcode-select --install' (macOS)."
    )
    raise AssertionError


def find_cuda() -> Cuda | None:
    """nvcc and its static runtime, or None with a line that says why."""
    choice = os.environ.get("PERTA_CUDA", "")
    if choice == "0":
        return None
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home] + ["nvcc"]
    nvcc = next((found for name in candidates if (found := shutil.which(name))), None)
    if nvcc is None:
        if choice == "1":
            stop("PERTA_CUDA=1, but no nvcc was found; set CUDA_HOME or put nvcc on PATH.")
        return None
    library = _cuda_library(nvcc)
    if library is None:
        if choice == "1":
            stop(f"PERTA_CUDA=1, but libcudart_static.a was not found beside {nvcc}.")
        print(f"perta_fast: {nvcc} has no libcudart_static.a beside it; building without CUDA", file=sys.stderr)
        return None
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    asked = os.environ.get("PERTA_CUDA_ARCHS", "").replace(",", ";").split(";")
    archs = [arch for arch in asked if arch] or [a for a in CUDA_ARCHS if f"compute_{a}" in listed]
    return Cuda(nvcc, library, archs)


def _cuda_library(nvcc: str) -> Path | None:
    """The directory of libcudart_static.a, as nvcc itself would find it (nvcc may be a wrapper script)."""
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    tops = [line.split("=", 1)[1].strip() for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
    for top in [*map(Path, tops), Path(nvcc).resolve().parent.parent]:
        for folder in (top / "lib64", top / "lib", *top.glob("targets/*/lib")):
            if (folder / "libcudart_static.a").exists():
                return folder
    return None


def ninja_text(compiler: str, cuda: Cuda | None, module: Path) -> str:
    """The build file: one edge a source file, and some once an instruction set."""
    import pybind11

    includes = [ROOT / "csrc", ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"]
    external = [Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    flags = [*CXX_FLAGS, *(f"-I{path}" for path in includes), *(f"-isystem {path}" for path in external)]
    link = ["-shared", "-pthread"]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined dynamic_lookup"]
    elif sys.platform == "linux":
        link.append("-ldl")  # older C libraries keep dlsym apart
    if cuda is not None:
        flags.append("-DPERTA_WITH_CUDA")
        link += [f"-L{cuda.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    lines = [
        f"cxx = {compiler}",
        f"flags = {' '.join(flags)}",
        "rule cxx",
        "  command = $cxx $flags $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
        "rule link",
        f"  command = $cxx $in {' '.join(link)} -o $out",
        "  description = link $out",
    ]
    edges: list[tuple[str, str, Path, list[str]]] = [("bindings.o", "cxx", ROOT / "csrc" / "bindings.cpp", [])]
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.stem in PER_INSTRUCTION_SET:
            for name, more in INSTRUCTION_SETS.items():
                flags_of_its_own = [f"-DPERTA_ISA={name}", *more, *PER_INSTRUCTION_SET[source.stem]]
                edges.append((f"{source.stem}_{name}.o", "cxx", source, flags_of_its_own))
        else:
            edges.append((f"{source.stem}.o", "cxx", source, []))
    if cuda is not None:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda.archs]
        newest = cuda.archs[-1]
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        lines += [
            f"nvcc = {cuda.nvcc}",
            "rule nvcc",
            "  command = $nvcc -std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden "
            f"{' '.join(f'-I{path}' for path in includes)} {' '.join(targets)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
        ]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            edges.append((f"cuda_{source.stem}.o", "nvcc", source, []))
    for output, rule, source, more in edges:
        lines.append(f"build {output}: {rule} {_escaped(source)}")
        if more:
            lines.append(f"  more = {' '.join(more)}")
    objects = " ".join(output for output, *_ in edges)
    lines += [f"build {_escaped(module)}: link {objects}", f"default {_escaped(module)}", ""]
    return "\n".join(lines)


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """build_ext that hands the one extension to ninja, so that rebuilds are parallel and incremental."""

    def build_extension(self, extension: Extension) -> None:
        module = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve() / "ninja"
        folder.mkdir(parents=True, exist_ok=True)
        module.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_text(find_compiler(), find_cuda(), module))
        if subprocess.run([*_ninja(), "-C", str(folder)]).returncode:
            stop("the extension did not compile; the compiler's own message is above.")


def _ninja() -> list[str]:
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        return ["ninja"]


setup(
    packages=[*find_packages(include=["perta_fast*"]), "perta_fast.kernels"],
    ext_modules=[Extension("perta_fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
