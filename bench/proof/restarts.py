"""What a search saves by starting runs at the layer that changes.

    PYTHONPATH=tests python bench/proof/restarts.py [--layers 16 47]     # tiny random models on one CPU thread
    PYTHONPATH=tests python bench/proof/restarts.py --proof              # random weights, the proof's sizes, on a GPU

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
PROOF_WINDOWS, PROOF_VOCABULARY = 2, 8192


def searched(loss, layers: int) -> tuple[SearchTrace, float]:
    start = time.perf_counter()
    trace = greedy_search(loss, layers)
    return trace, time.perf_counter() - start


def text(vocabulary: int, windows: int, context: int) -> torch.Tensor:
    return torch.randint(1, vocabulary, (windows, context), generator=torch.Generator().manual_seed(5))


def compare(name: str, loss: CalibrationLoss, layers: int) -> None:
    trace, restarted = searched(loss, layers)
    whole, taken = searched(lambda pattern: loss(pattern), layers)
    assert trace.flips == whole.flips, "restarts change the losses"
    print(f"{name}, {layers} layers: {restarted:.1f} s instead of {taken:.1f}, {restarted / taken:.2f}", flush=True)


def proof_loss() -> tuple[CalibrationLoss, int]:
    from train import Sizes, config_of
    from transformers import GlmMoeDsaForCausalLM

    sizes = Sizes()
    torch.manual_seed(0)
    model = GlmMoeDsaForCausalLM(config_of(sizes, PROOF_VOCABULARY)).to("cuda", torch.bfloat16)
    windows = text(PROOF_VOCABULARY, PROOF_WINDOWS, sizes.context)
    loss = CalibrationLoss(model, windows, batch_size=PROOF_WINDOWS)
    return loss, sizes.layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 47], metavar="N")
    parser.add_argument("--proof", action="store_true", help="the proof's sizes, on a GPU")
    args = parser.parse_args()
    if args.proof:
        loss, layers = proof_loss()
        compare("the proof's sizes", loss, layers)
        return
    torch.set_num_threads(1)
    for layers in args.layers:
        compare("tiny", CalibrationLoss(tiny_model("glm", layers=layers), text(VOCAB, 1, CONTEXT)), layers)


if __name__ == "__main__":
    main()
