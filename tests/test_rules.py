"""The rules of the code base that a machine can check: layers, sizes, what the libraries need, spills, stubs."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

import indexcache_ext
from indexcache_ext._library import library_path

ROOT = Path(__file__).parent.parent
CODE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".py", ".pyi"}
SYSTEM_LIBRARIES = {
    "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
    "libpthread.so.0", "libdl.so.2", "librt.so.1",
}  # fmt: skip


def code_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in CODE_SUFFIXES]
    assert found, f"no code under {folders}"
    return sorted(found)


def test_core_includes_neither_torch_nor_python():
    bindings = (ROOT / "csrc/torch", ROOT / "csrc/pybind")
    core = [path for path in code_files("include", "csrc") if not any(b in path.parents for b in bindings)]
    forbidden = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11)')
    assert [str(path) for path in core if forbidden.search(path.read_text())] == []


def test_public_headers_compile_alone_and_without_torch(tmp_path):
    for header in sorted((ROOT / "include/indexcache").glob("*.h")):
        source = tmp_path / "alone.cpp"
        source.write_text(f'#include "indexcache/{header.name}"\n')
        command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-fsyntax-only", "-I", str(ROOT / "include"), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{header.name}: {result.stderr}"


@pytest.mark.parametrize("path", code_files("include", "csrc", "python", "tests", "bench"), ids=lambda p: p.name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) < 400


class Elf:
    """What the dynamic linker will ask of a shared library."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            elf = ELFFile(file)
            dynamic = next(s for s in elf.iter_sections() if isinstance(s, DynamicSection))
            self.needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
            symbols = [s for s in elf.get_section_by_name(".dynsym").iter_symbols() if s.name]
            versions = elf.get_section_by_name(".gnu.version")
            self.undefined = {s.name: s["st_info"]["bind"] for s in symbols if s["st_shndx"] == "SHN_UNDEF"}
            self.exported = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF"}
            needs = next((s for s in elf.iter_sections() if isinstance(s, GNUVerNeedSection)), None)
            self.versioned = self._versioned(elf, versions, needs)

    @staticmethod
    def _versioned(elf, versions, needs) -> set[str]:
        """Undefined symbols that name the system library that brings them."""
        indices = {aux["vna_other"] for _, entries in needs.iter_versions() for aux in entries} if needs else set()
        table = elf.get_section_by_name(".dynsym")
        return {
            table.get_symbol(i).name for i in range(table.num_symbols()) if versions.get_symbol(i)["ndx"] in indices
        }


@pytest.fixture(scope="module")
def ops_library() -> Elf:
    return Elf(library_path())


def sanitized() -> bool:
    return b"__asan_init" in library_path().read_bytes()


@pytest.mark.skipif(sanitized(), reason="the sanitizers' runtime is needed on purpose")
def test_ops_library_needs_only_libtorch_and_the_system(ops_library):
    assert "libtorch.so" in ops_library.needed
    assert ops_library.needed - {"libtorch.so"} <= SYSTEM_LIBRARIES


@pytest.mark.skipif(sanitized(), reason="the sanitizers' runtime is needed on purpose")
def test_ops_library_asks_only_for_torchs_stable_abi(ops_library):
    strong = {name for name, bind in ops_library.undefined.items() if bind != "STB_WEAK"} - ops_library.versioned
    foreign = {name for name in strong if not name.startswith(("aoti_torch_", "torch_"))}
    assert foreign == set(), "not of the stable ABI, and not of the system"
    only_in_cuda_builds = ("cuda_stream", "c10_cuda")
    assert not {name for name in strong if any(part in name for part in only_in_cuda_builds)}
    assert ops_library.undefined["aoti_torch_get_current_cuda_stream"] == "STB_WEAK"


def test_ops_library_hides_its_own_symbols(ops_library):
    assert not {name for name in ops_library.exported if "10indexcache" in name}


def test_plain_module_needs_no_torch():
    from indexcache_ext import _C

    elf = Elf(Path(_C.__file__))
    assert elf.needed <= SYSTEM_LIBRARIES
    assert not {name for name in elf.undefined if name.startswith(("aoti_", "torch_"))}


def stub_functions() -> dict[str, list[str]]:
    tree = ast.parse((ROOT / "python/indexcache_ext/_C.pyi").read_text())
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = [arg.arg for arg in node.args.args + node.args.kwonlyargs]
    return functions


def test_stub_names_what_the_module_has():
    from indexcache_ext import _C

    for name, arguments in stub_functions().items():
        signature = getattr(_C, name).__doc__.splitlines()[0]
        assert signature.startswith(name + "(")
        assert re.findall(r"[(,] ?(\w+):", signature) == arguments, name
    public = {name for name in dir(_C) if not name.startswith("_")} - {"Error", "DeviceArray"}
    assert public == set(stub_functions())


def build_logs() -> list[Path]:
    """What setup.py kept of the compilers' output."""
    return sorted((ROOT / "build").glob("*/build.log"))


def test_cuda_kernels_do_not_spill():
    from indexcache_ext import _C

    if not _C.build_info()["cuda"]:
        pytest.skip("this library holds no CUDA code")
    text = "".join(log.read_text() for log in build_logs())
    if "ptxas info" not in text:
        pytest.skip("no compile log: the library was built elsewhere")
    spilling = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert spilling, "the log holds no register report"
    assert {pair for pair in spilling if pair != ("0", "0")} == set()


def test_capabilities_name_every_op_once_per_backend():
    rows = [(row["op"], row["backend"]) for row in indexcache_ext.capabilities()]
    assert len(rows) == len(set(rows))
    assert {op for op, _ in rows} == {op for op, backend in rows if backend == "cpu"}
