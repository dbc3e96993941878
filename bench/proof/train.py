"""Trains the model of the proof: 16 layers of DSA with the dimensions of the real kernels, on the text of text.py.

    python bench/proof/train.py --text TEXT --out MODEL --seed 0 --minutes 6

The stages of DeepSeek-V3.2 (see `indexcache_ext.demo.dsa`); in the sparse one the FP8 kernels of this package select,
as they do when the model is measured. Weights in f32, products in bf16; the layers' matrices learn by Muon, the rest by
AdamW.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from indexcache_ext.demo.dsa import STAGES, IndexerInputs, TrainableDsa, run_stage
from indexcache_ext.integrations._transformers_attention import _select_quantised
from indexcache_ext.integrations._transformers_forward import Forward, IntegrationInfo, make_windows
from indexcache_ext.integrations.calibration import CalibrationLoss
from indexcache_ext.integrations.checkpoints import load_model, read_calibration
from indexcache_ext.schedule import LayerPattern
from torch import Tensor, nn
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

SHARE_OF_TIME = {"language": 0.42, "warm-up": 0.2, "sparse": 0.38}
SEQUENCES = {"language": 16, "warm-up": 4, "sparse": 8}  # per step
RATES = {
    "language": {"matrices": 2e-3, "rest": 2e-3},
    "warm-up": {"indexer": 2e-3},
    "sparse": {"matrices": 4e-4, "rest": 4e-4, "indexer": 1e-3},
}


@dataclass
class Sizes:
    context: int = 4096
    layers: int = 16
    hidden: int = 512
    heads: int = 8
    topk: int = 256
    index_heads: int = 32
    kl_rows: int = 512  # queries of a sequence whose KL counts; half as many in the sparse stage
    windows: int = 24  # of held-out text


SMOKE = Sizes(context=192, layers=4, hidden=64, heads=2, topk=24, index_heads=8, kl_rows=32, windows=2)


def config_of(sizes: Sizes, vocabulary: int) -> GlmMoeDsaConfig:
    return GlmMoeDsaConfig(
        vocab_size=vocabulary, hidden_size=sizes.hidden, intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers, first_k_dense_replace=sizes.layers, indexer_types=["full"] * sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads, q_lora_rank=sizes.hidden // 2,
        kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128,
        index_topk=sizes.topk, index_n_heads=sizes.index_heads, index_head_dim=128,
        max_position_embeddings=2 * sizes.context, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def batches(tokens: Tensor, context: int, sequences: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(context + 1, device=tokens.device)
    while True:
        offsets = torch.randint(len(tokens) - context, (sequences, 1), generator=generator)
        window = tokens[offsets.to(tokens.device) + span].long()
        yield window[:, :-1], window[:, 1:]


def optimizers_of(model: nn.Module, stage: str) -> list[torch.optim.Optimizer]:
    parts: dict[str, list[nn.Parameter]] = {"matrices": [], "rest": [], "indexer": []}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and ".layers." in name
        part = "indexer" if ".indexer." in name else "matrices" if matrix else "rest"
        parameter.requires_grad_(part in RATES[stage])
        parts[part].append(parameter)
    made: list[torch.optim.Optimizer] = []
    for part, peak in RATES[stage].items():
        group = [{"params": parts[part], "lr": peak, "peak": peak}]
        if part == "matrices":
            made.append(torch.optim.Muon(group, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
        else:
            made.append(torch.optim.AdamW(group, weight_decay=0.0, betas=(0.9, 0.95), fused=True))
    return made


def serve(inputs: IndexerInputs, topk: int) -> Tensor:
    """What the kernels select when the model is served: a `Selector`."""
    batch, length, _ = inputs.hidden.shape
    device = inputs.hidden.device
    info = IntegrationInfo(LayerPattern("F"), True, topk, 0, 0)
    windows = make_windows(batch, length, 0, length, None, None, device)
    out = torch.empty(batch * length, topk, dtype=torch.int32, device=device)
    layer = SimpleNamespace(indexer=inputs.indexer, interleaved=True, layer_idx=0)
    forward = Forward(info, windows, None)
    _select_quantised(layer, forward, inputs.hidden, inputs.q_resid, inputs.position_embeddings, None, out)
    selected = torch.zeros(batch, length, length + 1, dtype=torch.bool, device=device)
    return selected.scatter_(2, windows.to_positions(out).long() + 1, True)[..., 1:]  # column 0 takes the -1


def bf16_products(device: torch.device):
    # No cache of bf16 weights: it would outlive the optimizer's steps.
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def dense_loss(model: nn.Module, windows: Tensor) -> float:
    """Nats per token with dense attention."""
    total = 0.0
    with TrainableDsa(model, "language"), bf16_products(model.device):
        for window in windows.to(model.device):
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
            total += F.cross_entropy(logits, window[1:]).item()
    return total / len(windows)


def save(model: GlmMoeDsaForCausalLM, text: Path, out: Path, log: dict) -> None:
    half = GlmMoeDsaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text / name, out)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def train(
    text: Path, out: Path, *, seed: int, minutes: float, steps: list[int] | None, sizes: Sizes, compiled: bool
) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 4 * sizes.layers
    saved = np.load(text / "tokens.npz")
    tokens = torch.from_numpy(saved["tokens"].astype(np.int32)).to(device)
    model = GlmMoeDsaForCausalLM(config_of(sizes, len(saved["token_bytes"]))).to(device)
    log = {
        "seed": seed,
        "sizes": vars(sizes),
        "parameters": sum(p.numel() for p in model.parameters()),
        "indexer_parameters": sum(p.numel() for name, p in model.named_parameters() if ".indexer." in name),
        "training_tokens": len(tokens),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "stages": [],
    }
    save(model, text, out, log)  # the tokenizer is read from there
    windows = read_calibration(out, [text / "heldout.txt"], sizes.context, sizes.windows)
    for i, stage in enumerate(STAGES):
        rows = sizes.kl_rows if stage == "warm-up" else sizes.kl_rows // 2
        for layer in model.model.layers if compiled and device.type == "cuda" else ():
            # The other stages differentiate inside the forward, which would break the graph.
            layer._compiled_call_impl = None
            if stage == "language":
                layer.compile(dynamic=False)
        with bf16_products(device):
            log["stages"].append(
                run_stage(
                    TrainableDsa(model, stage, kl_rows=rows, select=serve),
                    batches(tokens, sizes.context, SEQUENCES[stage], seed + i),
                    optimizers_of(model, stage),
                    steps=None if steps is None else steps[i],
                    seconds=60 * minutes * SHARE_OF_TIME[stage],
                )
            )
        if device.type == "cuda":
            log["stages"][-1]["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 1)
    log["steps"] = [entry["steps"] for entry in log["stages"]]
    log["held_out"] = {"windows": len(windows), "dense_nats_per_token": dense_loss(model, windows)}
    save(model, text, out, log)
    read = load_model(out, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sparse = CalibrationLoss(read, windows)(LayerPattern("F" * sizes.layers))
    log["held_out"]["sparse_nats_per_token"] = sparse
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log["held_out"]), file=sys.stderr, flush=True)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="what text.py wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=6.0, help="training time, shared by the stages (6)")
    parser.add_argument("--steps", type=int, nargs=3, metavar="N", help="steps of each stage, instead of --minutes")
    parser.add_argument("--compile", action="store_true", help="compile the layers for the language stage")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script on a CPU")
    args = parser.parse_args()
    train(
        args.text, args.out, seed=args.seed, minutes=args.minutes, steps=args.steps,
        sizes=SMOKE if args.smoke else Sizes(), compiled=args.compile,
    )  # fmt: skip


if __name__ == "__main__":
    main()
