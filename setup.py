"""Drives CMake, which owns the build (see CMakeLists.txt). Imports neither torch nor cmake at module level.

Environment: INDEXCACHE_BUILD_DIR keeps the build tree (default: build/<python tag>), INDEXCACHE_CMAKE_ARGS adds
options such as "-DINDEXCACHE_CUDA=OFF -DINDEXCACHE_PYBIND=OFF", MAX_JOBS bounds the compile jobs.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GIB_PER_JOB = 3  # a CuTe kernel takes up to about this much memory to compile


def version() -> str:
    return re.search(r"project\(indexcache VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)


def jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_JOB)))


def cmake() -> list[str]:
    """The cmake of the environment (>= 3.31); the system's may be too old for CUDA C++20."""
    try:
        import cmake

        return [str(Path(cmake.CMAKE_BIN_DIR) / "cmake")]
    except ImportError:
        return ["cmake"]


class CMakeBuild(build_ext):
    def run(self) -> None:
        tag = f"{sys.implementation.cache_tag}"
        build = Path(os.environ.get("INDEXCACHE_BUILD_DIR", ROOT / "build" / tag)).resolve()
        target = Path(self.get_ext_fullpath("indexcache_ext._C")).parent.resolve()
        configure = [
            *cmake(), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DINDEXCACHE_OUTPUT_DIR={build / 'indexcache_ext'}",
            *shlex.split(os.environ.get("INDEXCACHE_CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        log = build / "build.log"  # a test reads ptxas' register and spill report from it
        compile_ = [*cmake(), "--build", str(build), "--parallel", str(jobs())]
        with log.open("a") as file, subprocess.Popen(compile_, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                file.write(line)
                if not line.startswith("ptxas") and "bytes stack frame" not in line:
                    print(line, end="")
        if process.returncode:
            raise SystemExit(f"cmake --build failed; the whole log is in {log}")
        target.mkdir(parents=True, exist_ok=True)
        for library in (build / "indexcache_ext").glob("*.so"):
            self.copy_file(str(library), str(target / library.name))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "indexcache_ext").glob("*.so")]


setup(
    version=version(),
    ext_modules=[Extension("indexcache_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
