"""What a search saves by starting runs at the layer that changes: tiny random models on one CPU thread.

    PYTHONPATH=tests python bench/proof/restarts.py [--layers 16 47]

Prints the share of the time of whole runs. Both searches must find the same losses, bit for bit.
"""

from __future__ import annotations

import argparse
import time

import torch
from hf_models import VOCAB, tiny_model
from indexcache_ext.integrations.calibration import CalibrationLoss
from indexcache_ext.search import SearchTrace, greedy_search

CONTEXT = 256


def searched(loss, layers: int) -> tuple[SearchTrace, float]:
    start = time.process_time()
    trace = greedy_search(loss, layers)
    return trace, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 47], metavar="N")
    torch.set_num_threads(1)
    for layers in parser.parse_args().layers:
        text = torch.randint(1, VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(5))
        loss = CalibrationLoss(tiny_model("glm", layers=layers), text)
        trace, restarted = searched(loss, layers)
        whole, taken = searched(lambda pattern, loss=loss: loss(pattern), layers)
        assert trace.flips == whole.flips, "restarts change the losses"
        print(f"{layers} layers: {restarted:.1f} s instead of {taken:.1f}, {restarted / taken:.2f}", flush=True)


if __name__ == "__main__":
    main()
