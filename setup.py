"""Builds the C++ and CUDA ops through CMakeLists.txt, or installs without them where there is no compiler.

After `pip install -e .`, rebuild with `python setup.py build_ext --inplace`. Environment:
SVEL_CUDA=0 leaves CUDA out, SVEL_CUDA=1 insists on it (default: where nvcc is found);
SVEL_CUDA_ARCHITECTURES, as CMAKE_CUDA_ARCHITECTURES ("90a" or "80;90a"); CXX, CUDACXX, CUDA_HOME and
CMAKE_BUILD_PARALLEL_LEVEL as everywhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "stablevelocity_kernels"
MIN_TORCH = (2, 11)
NO_HEADERS = "Python.h was not found, so build information and the planner are missing; the ops are compiled"


def torch_package() -> tuple[Path, str] | None:
    """Folder and version of a torch that is new enough: the target environment's first, then the build environment's.

    pip's build isolation hides the target environment from sys.path, but sysconfig still names it. torch is not
    imported: its dependencies are hidden too.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and re.search(r"include-system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path(kind, vars=base) for kind in ("purelib", "platlib")]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    for folder in dict.fromkeys([*folders, *sys.path]):
        version_file = Path(folder, "torch", "version.py")
        if version_file.is_file():
            version = re.search(r"__version__ = '([^']+)'", version_file.read_text())
            if version and tuple(map(int, re.findall(r"\d+", version[1])[:2])) >= MIN_TORCH:
                return version_file.parent, version[1]
    return None


def why_not_native() -> str | None:
    """What keeps the extensions from being built, or None."""
    if sys.platform != "linux":
        return f"the compiled ops are for Linux, this is {sys.platform}"
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    return None


def has_python_headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def missing_build_requirements() -> list[str]:
    """What pip has to bring into the build environment, beside pyproject.toml's list."""
    needed = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
    return needed if torch_package() else [*needed, "torch>={}.{}".format(*MIN_TORCH)]


def record(folder: Path, reason: str | None) -> None:
    """Leave beside the package why it has no extension module (None: it has one), for build_info()."""
    (folder / PACKAGE).mkdir(parents=True, exist_ok=True)
    (folder / PACKAGE / "_build.json").write_text(json.dumps({"reason": reason}) + "\n")


class BuildPython(build_py):
    """Records how the build went, which without a compiler is all there is to do."""

    def run(self):
        super().run()
        reason = why_not_native()
        if reason:
            print(f"\n*** stablevelocity: pure Python, Triton on a GPU and plain torch elsewhere: {reason} ***\n")
            record(ROOT if self.editable_mode else Path(self.build_lib), reason)


class BuildNative(build_ext):
    """Runs CMake and Ninja in build/cmake-<python>, then installs into the source tree or the wheel."""

    def run(self):
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        with (build / ".lock").open("w") as lock:  # two builds at once wait for each other
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.configure(build)
            self.cmake("--build", build)
            for stale in (target / PACKAGE).glob("libsvel_*.so"):  # of a build that had CUDA, say
                stale.unlink()
            self.cmake("--install", build, "--prefix", target)
        record(target, None if has_python_headers() else NO_HEADERS)

    def configure(self, build: Path) -> None:
        found = torch_package()
        if not found:
            raise RuntimeError("no torch 2.11 or later to build against: install it, or build with pip's isolation")
        torch_dir, torch_version = found
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "SVEL_TORCH_DIR": torch_dir,
            "SVEL_TORCH_VERSION": torch_version,
            "SVEL_VERSION": self.distribution.get_version(),
            "SVEL_CUDA": {"0": "OFF", "1": "ON"}.get(os.environ.get("SVEL_CUDA", ""), "AUTO"),
            "SVEL_CUDA_ARCHITECTURES": os.environ.get("SVEL_CUDA_ARCHITECTURES", ""),
            "SVEL_HOST_MODULE": "ON" if has_python_headers() else "OFF",
            "Python_EXECUTABLE": sys.executable,
        }
        try:
            import pybind11

            settings["pybind11_DIR"] = pybind11.get_cmake_dir()
        except ImportError:  # without build isolation; CMake then looks for itself
            pass
        self.cmake("-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items()))

    def cmake(self, *args) -> None:
        try:
            subprocess.run(["cmake", *map(str, args)], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit(
                "stablevelocity: the build of the compiled ops failed, see above. SVEL_CUDA=0 leaves CUDA out."
            ) from None


native = why_not_native() is None
setup(
    packages=[*find_packages(".", include=[PACKAGE, f"{PACKAGE}.*"]), *find_packages("python")],
    package_dir={"stablevelocity": "python/stablevelocity"},
    package_data={PACKAGE: ["_build.json"], "stablevelocity": ["configs/*.yaml"]},
    ext_modules=[Extension(f"{PACKAGE}._C", [])] if native else [],
    setup_requires=missing_build_requirements() if native else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    zip_safe=False,
)
