"""Trains the demonstration model: a small `GlmMoeDsaForCausalLM` on the source of the Python standard library.

    python -m indexcache_ext.demo.train --out DIR --seed 0 --minutes 5

The stages and how they work are in `dsa`. The checkpoint is read back and measured with stock code only. Needs torch
and transformers, not the compiled library, and also runs as a plain script.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention

if __package__:
    from .dsa import STAGES, TrainableDsa, run_stage
    from .text import heldout_text, training_text, windows
else:
    from dsa import STAGES, TrainableDsa, run_stage
    from text import heldout_text, training_text, windows

START = 256  # the token before the first byte of a window; never a target
SHARE_OF_TIME = {"language": 0.5, "warm-up": 0.25, "sparse": 0.25}
TOKENS_PER_STEP = {"language": 65_536, "warm-up": 16_384, "sparse": 32_768}


def demo_config(context: int = 2048, **overrides) -> GlmMoeDsaConfig:
    """The demonstration model: 8 layers, each with an indexer that keeps 64 tokens; a vocabulary of bytes and START."""
    values = dict(
        vocab_size=257, hidden_size=160, intermediate_size=384, num_hidden_layers=8, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=96, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=96,
        routed_scaling_factor=1.0, index_topk=64, index_n_heads=8, index_head_dim=32,
        max_position_embeddings=max(4096, context), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.04, bos_token_id=START, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    values.update(overrides)
    values.setdefault("indexer_types", ["full"] * values["num_hidden_layers"])
    return GlmMoeDsaConfig(**values)


def tokens_and_targets(batch: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, S] -> tokens and targets, both int64 [B, S]: token i is byte i - 1 and target i is byte i."""
    targets = batch.long()
    return F.pad(targets[:, :-1], (1, 0), value=START), targets


def random_batches(text: Tensor, context: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(context, device=text.device)
    while True:
        offsets = torch.randint(len(text) - context + 1, (batch, 1), generator=generator)
        yield tokens_and_targets(text[offsets.to(text.device) + span])


def optimizer_for(model: nn.Module, stage: str) -> torch.optim.AdamW:
    """AdamW over the weights that the stage trains; matrices decay, norms do not, nor do indexers."""
    rates = {
        "language": {"backbone": 3e-3},
        "warm-up": {"indexer": 3e-3},
        "sparse": {"backbone": 3e-4, "indexer": 5e-4},
    }[stage]
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = "indexer" if ".indexer." in name else "backbone"
        parameter.requires_grad_(part in rates)
        if part in rates:
            decay = 0.1 if parameter.dim() > 1 and part == "backbone" else 0.0
            groups.setdefault((part, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "lr": rates[part], "peak": rates[part], "weight_decay": decay}
            for (part, decay), params in groups.items()
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def train_stage(model, stage: str, text: Tensor, context: int, seed: int, steps: int | None, seconds: float) -> dict:
    """One stage on windows of `text` that `seed` draws; see `run_stage`."""
    batch = max(1, TOKENS_PER_STEP[stage] // context) if text.is_cuda else 2
    batches = random_batches(text, context, batch, seed)
    optimizer = optimizer_for(model, stage)
    return run_stage(TrainableDsa(model, stage), batches, [optimizer], steps=steps, seconds=seconds)


@torch.no_grad()
def heldout_loss(model: GlmMoeDsaForCausalLM, text: bytes, context: int, *, topk: int | None = None, limit=64) -> float:
    """Loss in nats per byte over at most `limit` windows, with stock code; `topk` >= `context` makes it dense."""
    indexers = [m.indexer for m in model.modules() if isinstance(m, GlmMoeDsaAttention) and m.indexer is not None]
    stock_topk = model.config.index_topk
    device = next(model.parameters()).device
    total, parts = 0.0, windows(text, context, limit)
    try:
        for indexer in indexers:
            indexer.index_topk = topk or stock_topk
        for window in parts:
            tokens, targets = tokens_and_targets(torch.tensor([list(window)], dtype=torch.uint8, device=device))
            logits = model(input_ids=tokens, use_cache=False).logits.float()
            total += F.cross_entropy(logits[0], targets[0]).item()
    finally:
        for indexer in indexers:
            indexer.index_topk = stock_topk
    return total / len(parts)


def save(model: GlmMoeDsaForCausalLM, folder: Path, log: dict, heldout: bytes, context: int, limit: int) -> None:
    """Writes the checkpoint in bf16, reads it back, and writes its held-out losses with the log to training.json."""
    device = next(model.parameters()).device
    half = GlmMoeDsaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    read = GlmMoeDsaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    )
    read.to(device).eval()
    log["held_out_nats_per_byte"] = {
        "windows": len(windows(heldout, context, limit)),
        "dense": round(heldout_loss(read, heldout, context, topk=context, limit=limit), 4),
        "sparse": round(heldout_loss(read, heldout, context, limit=limit), 4),
    }
    print(json.dumps(log["held_out_nats_per_byte"]), file=sys.stderr, flush=True)
    (folder / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def train(
    out: Path,
    *,
    seed: int = 0,
    minutes: float = 5.0,
    steps: list[int] | None = None,
    context: int = 2048,
    device: torch.device | str | None = None,
    limit: int = 64,
    config: GlmMoeDsaConfig | None = None,
    library: Path | None = None,
) -> dict:
    """Trains the model into the folder `out` (config.json, model.safetensors, training.json) and returns the log.

    Args:
        steps: steps of each stage, which make a run repeatable; without them the stages share `minutes`.
        context: bytes per training window.
        limit: windows of held-out text to measure.
        config: another model than `demo_config(context)`.
        library: another folder of Python source than the running interpreter's standard library.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    source, heldout = training_text(library), heldout_text(library)
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).to(device)
    model = GlmMoeDsaForCausalLM(config or demo_config(context)).to(device)
    out.mkdir(parents=True, exist_ok=True)
    command = f"python -m indexcache_ext.demo.train --out DIR --seed {seed} --context {context}"
    log = {
        "command": f"{command} " + (f"--minutes {minutes:g}" if steps is None else f"--steps {_joined(steps)}"),
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "context": context,
        "training_bytes": len(source),
        "held_out_bytes": len(heldout),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "stages": [],
    }
    for i, stage in enumerate(STAGES):
        seconds = 60 * minutes * SHARE_OF_TIME[stage]
        count = None if steps is None else steps[i]
        log["stages"].append(train_stage(model, stage, text, context, seed + i, count, seconds))
        log["repeat"] = f"{command} --steps {_joined([entry['steps'] for entry in log['stages']])}"
        save(model, out, log, heldout, context, limit)  # after every stage: a run that is cut short leaves a checkpoint
    return log


def _joined(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the demonstration model of indexcache.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and training.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0, help="training time, shared by the stages (default 5)")
    parser.add_argument("--steps", help="steps of each stage, such as 3000,1500,1500, instead of --minutes")
    parser.add_argument("--context", type=int, default=2048, help="bytes per training window (default 2048)")
    args = parser.parse_args(arguments)
    steps = None
    if args.steps is not None:
        parts = args.steps.split(",")
        if len(parts) != len(STAGES) or not all(part.isdecimal() and int(part) > 0 for part in parts):
            parser.error(f"--steps: expected three positive numbers such as 3000,1500,1500, got {args.steps!r}")
        steps = [int(part) for part in parts]
    train(args.out, seed=args.seed, minutes=args.minutes, steps=steps, context=args.context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
