"""bench/nsight.py: what it reads out of pages of Nsight Compute 2025 (CUDA 13.0, H200), shortened here."""

from __future__ import annotations

import csv
import io
import stat
from pathlib import Path

import pytest
import scripts

nsight = scripts.load("nsight")

DETAILS = """\
[762] program@127.0.0.1
  void long_rows_kernel<float, 1, FewRows>(TopkParams) (128, 1, 1)x(512, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Elapsed Cycles                cycle       19,381
    DRAM Throughput                   %        27.07
    Duration                         us        12.99
    ----------------------- ----------- ------------

    OPT   This kernel grid is too small to fill the available resources on this device, resulting in only 1.0
          waves across all SMs. Look at Launch Statistics for more details.

    Section: Launch Statistics
    -------------------------------- --------------- ---------------
    Metric Name                          Metric Unit    Metric Value
    -------------------------------- --------------- ---------------
    Block Size                                                   512
    Cluster Scheduling Policy                           PolicySpread
    Registers Per Thread             register/thread              72
    -------------------------------- --------------- ---------------

  void dense_kernel<Tile<64, 4, 128>>(DenseCall) (132, 1, 1)x(384, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Duration                         ms         4.02
    ----------------------- ----------- ------------
"""


def source_page(*kernels: list[tuple[str, int, dict[str, int]]]) -> str:
    out = io.StringIO()
    write = csv.writer(out, quoting=csv.QUOTE_ALL).writerow
    stalls = ["stall_barrier", "stall_long_sb", "stall_selected", "stall_wait"]
    for kernel in kernels:
        write(["Kernel Name", "void f<float, (int)1>(Params)", ""])
        write(["Address", "Source", "# Samples", "Instructions Executed", *stalls, "stall_barrier (Not Issued)"])
        for i, (instruction, executed, states) in enumerate(kernel):
            counts = [states.get(name.removeprefix("stall_"), 0) for name in stalls]
            write([f"0x{i:x}0", f"      {instruction}", sum(counts), executed, *counts, 99])
    return out.getvalue()


def test_details() -> None:
    first, second = nsight.read_details(DETAILS.splitlines())
    assert first == {
        "kernel": "void long_rows_kernel<float, 1, FewRows>(TopkParams)", "grid": (128, 1, 1), "block": (512, 1, 1),
        "us": 12.99, "DRAM %": 27.07, "registers": 72.0,
    }  # fmt: skip
    assert second["us"] == pytest.approx(4020) and second["grid"] == (132, 1, 1)


def test_source() -> None:
    loop = [("@!P3 LDS R9, [R12]", 8192, {"barrier": 50, "wait": 6}), ("EXIT", 2048, {}), ("IADD", 1, {"selected": 4})]
    first, second = nsight.read_source(source_page(loop, [("EXIT", 16, {})]).splitlines(), hot=5)
    assert first["samples"] == 60
    assert first["states"] == {"barrier": 50 / 60, "fixed latency": 6 / 60, "issuing": 4 / 60}
    assert [(hot["instruction"], hot["state"], hot["executed"]) for hot in first["hot"]] == [
        ("@!P3 LDS R9, [R12]", "barrier", 8192),
        ("IADD", "issuing", 1),
    ]
    assert second == {"samples": 0, "states": {}, "hot": []}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ncu that writes a report when it is told to, and prints the pages above."""
    (tmp_path / "details").write_text(DETAILS)
    (tmp_path / "source").write_text(source_page([("LDS", 7, {"barrier": 3, "wait": 1})], [("EXIT", 16, {})]))
    ncu = tmp_path / "ncu"
    ncu.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'case "$*" in *"--page details"*) cat {tmp_path}/details;; *"--page source"*) cat {tmp_path}/source;;\n'
        '*nothing*) echo "No kernels were profiled.";;\n'
        '*) while [ "$1" != -o ]; do shift; done; : > "$2.ncu-rep";; esac\n'
    )
    ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_command(stub: Path, capsys) -> None:
    assert nsight.main(["topk and cuda", "--out", str(stub / "kept"), "--launches", "2"]) == 0
    assert (stub / "kept.ncu-rep").exists()
    assert "-k topk and cuda --benchmark-disable" in (stub / "calls").read_text().splitlines()[0]
    assert capsys.readouterr().out.splitlines() == [
        "void long_rows_kernel<float, 1, FewRows>(TopkParams)  128 blocks of 512",
        "  us 13.0, DRAM 27.1 %, registers 72",
        "  warps: 75% barrier, 25% fixed latency (4 samples)",
        f"  100.0%  {'LDS':72}  barrier",
        "void dense_kernel<Tile<64, 4, 128>>(DenseCall)  132 blocks of 384",
        "  us 4,020",
        "  warps: not sampled (0 samples)",
    ]


def test_nothing_profiled(stub: Path) -> None:
    with pytest.raises(SystemExit, match=r"No kernels were profiled\.\nnsight: no report; does 'nothing' pick"):
        nsight.main(["nothing"])


def test_a_report_that_does_not_add_up(stub: Path) -> None:
    (stub / "source").write_text(source_page([("EXIT", 16, {})]))
    with pytest.raises(SystemExit, match=r"kept.ncu-rep tells of 2 launches and the samples of 1"):
        nsight.main(["--read", str(stub / "kept.ncu-rep")])


def test_no_ncu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", "")
    assert nsight.main(["topk"]) == 2
    assert "nsight: ncu is not on the PATH" in capsys.readouterr().err
