"""Trains the demonstration model: a small `GlmMoeDsaForCausalLM` on the source of the Python standard library.

    python -m indexcache_ext.demo.train --out DIR --seed 0 --minutes 5

Three stages, after DeepSeek-V3.2 (arXiv 2512.02556, section 2.1):

- `language`: next-byte loss with dense attention; the indexers do not take part.
- `warm-up`: only the indexers train, each by KL(p || softmax(I)) over the whole causal row, where p is its layer's
  dense attention averaged over the heads and I its own scores.
- `sparse`: every layer attends to its indexer's top-k; the next-byte loss trains the rest, and KL on the selected
  set trains the indexers. Indexer inputs and p are detached, so neither loss reaches the other's weights.

The model is the one of transformers. Its attention is replaced through transformers' attention interface and its
indexers' `forward` is replaced while training, because the stock indexer runs without gradients; the checkpoint is
then read back and measured with stock code only. Needs torch and transformers, not the compiled library, and also
runs as a plain script.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention, apply_rotary_pos_emb_interleave

if __package__:
    from .text import heldout_text, training_text, windows
else:
    from text import heldout_text, training_text, windows

START = 256  # the token before the first byte of a window; never a target
STAGES = ("language", "warm-up", "sparse")
SHARE_OF_TIME = {"language": 0.5, "warm-up": 0.25, "sparse": 0.25}
TOKENS_PER_STEP = {"language": 65_536, "warm-up": 16_384, "sparse": 32_768}
LR_WARM_UP_STEPS = 100
PACE_STEPS = (10, 30)  # the steps between which the pace is measured


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


def all_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert on every token, weighted by the router: with four experts faster than sorting the tokens."""
    shares = hidden.new_zeros(len(hidden), experts.num_experts).scatter(1, top_k_index, top_k_weights.to(hidden.dtype))
    gate, up = torch.einsum("th,eih->tei", hidden, experts.gate_up_proj).chunk(2, dim=-1)
    return torch.einsum("tei,ehi->th", experts.act_fn(gate) * up * shares.unsqueeze(-1), experts.down_proj)


def kl_per_row(p: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """Mean over rows of KL(p || softmax(scores over visible)); p is 0 and no score counts where not visible."""
    log_q = scores.masked_fill(~visible, -torch.inf).log_softmax(-1).masked_fill(~visible, 0)
    return (torch.xlogy(p, p) - p * log_q).sum(-1).mean()


def indexer_scores(indexer: nn.Module, hidden: Tensor, q_resid: Tensor, position_embeddings: tuple) -> Tensor:
    """The stock indexer's scores [B, S, S] before masking, with gradients to the indexer's weights."""
    batch, length, _ = hidden.shape
    rope = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_resid).view(batch, length, indexer.n_heads, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
    cos, sin = position_embeddings
    q_rope, k_rope = apply_rotary_pos_emb_interleave(q[..., :rope], k[..., :rope], cos, sin, unsqueeze_dim=2)
    q = torch.cat([q_rope, q[..., rope:]], dim=-1)
    k = torch.cat([k_rope, k[..., rope:]], dim=-1).squeeze(2)
    weights = indexer.weights_proj(hidden) * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    products = torch.einsum("bshd,btd->bsht", q, k)
    return torch.einsum("bsh,bsht->bst", weights, F.relu(products))


class TrainableDsa:
    """Puts a stock model on an attention whose indexers learn, as a context manager; `stage` is one of STAGES.

    Each layer's KL is differentiated at once, so one layer's scores are held at a time; `kl` holds the layers' values
    of the last forward.
    """

    NAME = "indexcache_training"

    def __init__(self, model: GlmMoeDsaForCausalLM, stage: str):
        self.model = model
        self.stage = stage
        self.kl: list[Tensor] = []
        self.indexers = [layer.self_attn.indexer for layer in model.model.layers]
        ALL_ATTENTION_FUNCTIONS.register(self.NAME, self.attention)
        # The attention below is causal by itself, but the model slices its mask.
        ALL_MASK_ATTENTION_FUNCTIONS.register(self.NAME, lambda *args, **kwargs: torch.empty(1, 1, 1, 1))
        ALL_EXPERTS_FUNCTIONS.register(self.NAME, all_experts)

    def __enter__(self) -> TrainableDsa:
        self.stock = self.model.config._attn_implementation, self.model.config._experts_implementation
        self.model.config._attn_implementation_internal = self.NAME
        self.model.config._experts_implementation_internal = self.NAME
        for indexer in self.indexers:
            indexer.forward = self.indexer_forward(indexer)
        self.hooks = [
            layer.mlp.gate.register_forward_hook(balance_experts)
            for layer in self.model.model.layers
            if hasattr(layer.mlp, "gate") and self.stage != "warm-up"
        ]
        return self

    def __exit__(self, *exception) -> None:
        self.model.config._attn_implementation_internal, self.model.config._experts_implementation_internal = self.stock
        for indexer in self.indexers:
            del indexer.forward
        for hook in self.hooks:
            hook.remove()

    def indexer_forward(self, indexer: nn.Module) -> Callable:
        def forward(hidden_states, q_resid, position_embeddings, *args, **kwargs):
            if self.stage == "language":
                return None
            with torch.enable_grad():
                return indexer_scores(indexer, hidden_states.detach(), q_resid.detach(), position_embeddings)

        return forward

    def attention(self, module, query, key, value, attention_mask, *, scaling: float, indices: Tensor | None, **kwargs):
        """What transformers calls in each layer; `indices` is whatever the indexer returned: here its scores."""
        scores, visible = indices, None
        if scores is not None:
            if module.layer_idx == 0:
                self.kl = []
            length = query.shape[2]
            visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            if self.stage == "sparse":
                topk = min(self.model.config.index_topk, length)
                picks = scores.detach().masked_fill(~visible, -torch.inf).topk(topk)
                visible = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picks.indices, True) & visible
            self.learn(scores, query.detach(), key.detach(), visible, scaling)
        mask = visible.unsqueeze(1) if self.stage == "sparse" else None
        half = torch.bfloat16 if query.is_cuda else query.dtype
        out = F.scaled_dot_product_attention(
            query.to(half), key.to(half), value.to(half), attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    def learn(self, scores: Tensor, query: Tensor, key: Tensor, visible: Tensor, scaling: float) -> None:
        with torch.no_grad():
            hidden = ~visible if visible.dim() == 2 else ~visible.unsqueeze(1)
            logits = (query @ key.transpose(-1, -2) * scaling).masked_fill_(hidden, -torch.inf)
            p = logits.softmax(-1).mean(1)
            del logits
        with torch.enable_grad():
            loss = kl_per_row(p, scores, visible)
            if self.model.training:
                loss.backward()
        self.kl.append(loss.detach())


@torch.no_grad()
def balance_experts(gate: nn.Module, inputs: tuple, outputs: tuple) -> None:
    """Moves the router's selection bias towards equal loads, as DeepSeek-V3 does (arXiv 2412.19437, section 2.1.2)."""
    if gate.training:
        load = F.one_hot(outputs[2].flatten(), gate.num_experts).float().sum(0)
        gate.e_score_correction_bias += 1e-3 * torch.sign(load.mean() - load)


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


def rate(step: int, total: int | None) -> float:
    """Fraction of the peak learning rate: a linear rise, then a cosine down to 2 %; with no total yet, the rise."""
    rise = LR_WARM_UP_STEPS if total is None else min(LR_WARM_UP_STEPS, max(total // 10, 1))
    if step < rise or total is None:
        return min(1.0, (step + 1) / rise)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def seconds_now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_stage(model, stage: str, text: Tensor, context: int, seed: int, steps: int | None, seconds: float) -> dict:
    """Runs one stage for `steps` steps, or for as many as fit into `seconds` at the pace of its first ones."""
    batch = max(1, TOKENS_PER_STEP[stage] // context) if text.is_cuda else 2
    batches = random_batches(text, context, batch, seed)
    optimizer = optimizer_for(model, stage)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    start, step, history = seconds_now(text.device), 0, []
    with TrainableDsa(model, stage) as dsa:
        while steps is None or step < steps:
            if steps is None and step == PACE_STEPS[0]:
                pace_start = seconds_now(text.device)
            if steps is None and step == PACE_STEPS[1]:
                now = seconds_now(text.device)
                pace = (now - pace_start) / (PACE_STEPS[1] - PACE_STEPS[0])
                steps = step + max(0, int((seconds - (now - start)) / pace))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, steps)
            tokens, targets = next(batches)
            with torch.set_grad_enabled(stage != "warm-up"):
                logits = model(input_ids=tokens, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            if stage != "warm-up":
                loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 100 == 0 or step in (1, steps):
                entry = {"step": step, "loss": round(loss.item(), 4)}
                if dsa.kl:
                    entry["kl"] = round(torch.stack(dsa.kl).mean().item(), 4)
                history.append(entry)
                elapsed = time.perf_counter() - start
                print(f"{stage:9} {entry} of {steps} steps, {elapsed:.0f} s", file=sys.stderr, flush=True)
    model.requires_grad_(True).eval()
    return {
        "stage": stage,
        "steps": step,
        "batch": batch,
        "tokens": step * batch * context,
        "seconds": round(seconds_now(text.device) - start, 1),
        "history": history,
    }


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
