"""`indexcache demo`: a small DSA language model on a text, with all of its indexers and with fewer.

Every layer first runs its own indexer; then 1/2, 1/4 and 1/8 of the layers do, spread uniformly and, if the checkpoint
has the trace of an `indexcache search` beside it, as that found best; the layers between them attend to what the
nearest one before them selected. Runs on the operators of this package through
`indexcache_ext.integrations.transformers`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import GlmMoeDsaForCausalLM

from ..integrations import checkpoints
from ..integrations.checkpoints import CheckpointError, choose_device, read_config
from ..integrations.transformers import apply, cache_bytes
from ..schedule import LayerPattern
from ..search import SearchTrace
from .text import TextError, heldout_text, windows

CHECKPOINT = Path(__file__).parent / "checkpoint"
KEEP_EVERY = (1, 2, 4, 8)
START = 256  # the token before the first byte, as in training
VOCABULARY = 257
TEXT_LIMIT = 64 << 20  # bytes read of a text
TEMPERATURE = 0.5
_MADE_BY = "the demo runs checkpoints that indexcache_ext.demo.train made"


@dataclass
class Measurement:
    """What one pattern costs and gives; `decode_ms` is for one token at the full context."""

    pattern: str
    chosen: str  # how the pattern was: all, uniform or searched
    indexers: int
    loss: float  # nats per byte
    indexer_calls_per_token: float
    index_key_bytes_per_token: float
    prefill_ms: float
    decode_ms: float
    generated: str


def load_model(folder: Path, device: torch.device) -> GlmMoeDsaForCausalLM:
    """The checkpoint in `folder`, in f32 on `device`.

    Raises:
        CheckpointError: there is none, it is damaged or incomplete, or it is another kind of model.
    """
    config = read_config(folder)
    found = [config.get(key) for key in ("model_type", "vocab_size")]
    if found != ["glm_moe_dsa", VOCABULARY]:
        raise CheckpointError(
            f"{folder / 'config.json'}: expected model_type 'glm_moe_dsa' with vocab_size {VOCABULARY} (bytes), "
            f"got {found[0]!r} with {found[1]!r}; {_MADE_BY}"
        )
    return checkpoints.load_model(folder, device)


def read_text(file: Path | None) -> tuple[str, bytes]:
    """A description of the text and its bytes: those of `file`, or the held-out part of Python's library.

    Raises:
        TextError: the text cannot be read or is empty.
    """
    if file is None:
        return f"held-out source of Python {platform.python_version()}'s library", heldout_text()
    try:
        with file.open("rb") as stream:
            text = stream.read(TEXT_LIMIT)
    except OSError as error:
        raise TextError(f"--text: {file} cannot be read: {error.strerror}") from error
    if not text:
        raise TextError(f"--text: {file} is empty; give a file with some text in it")
    return str(file), text


def choose_context(asked: int | None, folder: Path, config: transformers.PretrainedConfig) -> int:
    """Bytes per window: what was asked for, else what the model was trained on, which training.json says.

    Raises:
        TextError: the model cannot take that many, or its indexers would select all of them.
    """
    least, most = config.index_topk + 1, config.max_position_embeddings
    if asked is not None:
        if not least <= asked <= most:
            raise TextError(f"--context: expected {least} to {most} bytes for this model, got {asked}")
        return asked
    try:
        trained = int(json.loads((folder / "training.json").read_text())["context"])
    except (OSError, ValueError, KeyError, TypeError):
        trained = 2048
    return min(max(trained, least), most)


def choose_patterns(folder: Path, layers: int) -> dict[LayerPattern, str]:
    """The patterns to show, and how each was chosen: fewer and fewer Full layers, the searched after the uniform one.

    Raises:
        CheckpointError: the trace beside the checkpoint is damaged, or of another model.
    """
    found = {LayerPattern.uniform(layers, every, offset=1): "uniform" if every > 1 else "all" for every in KEEP_EVERY}
    if (folder / "trace.json").exists():
        try:
            trace = SearchTrace.load(folder / "trace.json")
            searched = [trace.pattern(1 / every) for every in KEEP_EVERY]
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if trace.num_layers != layers:
            raise CheckpointError(f"{folder / 'trace.json'} is of a model of {trace.num_layers} layers, not {layers}")
        found |= {pattern: "searched" for pattern in searched if pattern not in found}
    return dict(sorted(found.items(), key=lambda item: (-str(item[0]).count("F"), item[1] == "searched")))


def tokens_of(text: bytes, device: torch.device) -> torch.Tensor:
    """[1, 1 + bytes]: START and the bytes."""
    return torch.tensor([[START, *text]], device=device)


@torch.no_grad()
def measure(
    model: GlmMoeDsaForCausalLM,
    pattern: LayerPattern,
    chosen: str,
    parts: list[bytes],
    prompt: bytes,
    new_bytes: int,
    progress: Callable[[int], object],
) -> Measurement:
    """Loss over the windows `parts` of one length, then `new_bytes` sampled after `prompt`, under one pattern."""
    device = model.device
    info = apply(model, pattern)

    def timed(tokens: torch.Tensor, cache: transformers.Cache | None = None) -> tuple[object, float]:
        start = _now(device)
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        elapsed = _now(device) - start
        progress(tokens.shape[1])
        return out, 1e3 * elapsed

    timed(tokens_of(parts[0], device)[:, :-1])  # the first call sets things up
    losses, prefill = [], []
    for part in parts:
        tokens = tokens_of(part, device)
        out, elapsed = timed(tokens[:, :-1])
        losses.append(F.cross_entropy(out.logits[0].float(), tokens[0, 1:]).item())
        prefill.append(elapsed)

    generator = torch.Generator().manual_seed(0)
    out, _ = timed(tokens_of(prompt, device))
    generated, decode = bytearray(), []
    for _ in range(new_bytes):
        chances = (out.logits[0, -1, :START].float() / TEMPERATURE).softmax(-1)
        generated.append(int(torch.multinomial(chances.cpu(), 1, generator=generator)))
        out, elapsed = timed(torch.tensor([[generated[-1]]], device=device), out.past_key_values)
        decode.append(elapsed)
    held = cache_bytes(out.past_key_values)
    return Measurement(
        pattern=str(pattern),
        chosen=chosen,
        indexers=str(pattern).count("F"),
        loss=statistics.fmean(losses),
        indexer_calls_per_token=info.indexer_calls_per_token,
        index_key_bytes_per_token=held.index_keys / held.tokens,
        prefill_ms=statistics.median(prefill),
        decode_ms=statistics.median(decode),
        generated=generated.decode(errors="replace"),
    )


@torch.no_grad()
def choose_threads(model: GlmMoeDsaForCausalLM, part: bytes) -> None:
    """Sets torch to the number of CPU threads that runs `part` fastest, of at most as many as it is set to.

    A model this small gains little from many threads, and loses much where other programs keep the cores busy.
    """
    tokens, most, best = tokens_of(part, model.device)[:, :-1], torch.get_num_threads(), None
    for threads in sorted({1, min(4, most), most}):
        torch.set_num_threads(threads)
        model(input_ids=tokens, use_cache=False)  # starts the threads
        start = time.perf_counter()
        model(input_ids=tokens, use_cache=False)
        elapsed = time.perf_counter() - start
        if best is not None and elapsed > best[0]:
            break
        best = elapsed, threads
    torch.set_num_threads(best[1])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def demonstrate(args: argparse.Namespace) -> dict:
    """Runs everything; see `indexcache demo --help` for `args`. Returns what `--json` prints."""
    device = choose_device(args.device)
    folder = args.model or CHECKPOINT
    source, text = read_text(args.text)
    model = load_model(folder, device)
    context = choose_context(args.context, folder, model.config)
    if len(text) < context:
        raise TextError(
            f"the text has {len(text):,} bytes, the model reads windows of {context:,}: give a longer text, or a "
            f"smaller window with --context N (more than {model.config.index_topk}, what an indexer selects)"
        )
    new_bytes = args.generate or min(160, context // 2)
    if new_bytes >= context:
        raise TextError(f"--generate: expected fewer bytes than the context of {context:,}, got {new_bytes:,}")
    parts = windows(text, context, max(1, (args.tokens or 16_384) // context))
    prompt = text[: context - new_bytes]
    prompt = prompt[: prompt.rfind(b"\n", len(prompt) // 2) + 1] or prompt  # stop after a line, if there is one

    layers = model.config.num_hidden_layers
    patterns = choose_patterns(folder, layers)
    each = context * (len(parts) + 1) + len(prompt) + 1 + new_bytes
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(total=each * len(patterns), unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr)
    rows = []
    with bar:
        if device.type == "cpu":
            bar.set_description("choosing CPU threads")
            apply(model)
            choose_threads(model, parts[0][:512])
        for pattern, chosen in patterns.items():
            bar.set_description(f"{str(pattern).count('F')} of {layers} indexers")
            rows.append(measure(model, pattern, chosen, parts, prompt, new_bytes, bar.update))
    return {
        "model": {
            "path": str(folder),
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": layers,
            "index_topk": model.config.index_topk,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "text": {"source": source, "windows": len(parts), "context": context, "bytes": context * len(parts)},
        "prompt_end": prompt[-80:].decode(errors="replace"),
        "patterns": [asdict(row) for row in rows],
    }


def table(result: dict) -> str:
    """The result of `demonstrate` for a reader."""
    model, text, rows = result["model"], result["text"], result["patterns"]
    where = result["device"] if result["device"] != "cpu" else f"CPU threads: {result['threads']}"
    lines = [
        f"model  {model['layers']} layers, {model['parameters'] / 1e6:.1f} M parameters, each query attends to "
        f"{model['index_topk']} tokens of up to {text['context']:,}; {where}",
        f"text   {text['source']}: {text['windows']} windows of {text['context']:,} bytes",
        "",
        f"{'':18} {'loss':>9} {'change':>9} {'indexer':>9} {'index keys':>11} {'prefill':>8} {'decode':>7}",
        f"{'indexers':18} {'nats/byte':>9} {'to all':>9} {'calls/tok':>9} {'bytes/tok':>11} {'ms':>8} {'ms/tok':>7}"
        "  pattern",
    ]
    for row in rows:
        lines.append(
            f"{row['indexers']} of {model['layers']:<3} {row['chosen']:10} {row['loss']:9.4f} "
            f"{row['loss'] - rows[0]['loss']:+9.4f} "
            f"{row['indexer_calls_per_token']:9.2f} {row['index_key_bytes_per_token']:11.0f} "
            f"{row['prefill_ms']:8.1f} {row['decode_ms']:7.2f}  {row['pattern']}"
        )
    for row in (rows[0], rows[-1]) if len(rows) > 1 else rows:
        lines += ["", f"after these lines, {row['indexers']} of {model['layers']} indexers ({row['pattern']}) write:"]
        lines += ["  | " + line for line in result["prompt_end"].strip("\n").splitlines()[-2:]]
        lines += ["  > " + line for line in row["generated"].strip("\n").splitlines()]
    return "\n".join(lines)


def printable(words: str, encoding: str | None) -> str:
    """`words` without what a terminal would obey or cannot show: a model of bytes may write anything."""
    words = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in words)
    return words.encode(encoding or "ascii", "replace").decode(encoding or "ascii")


def main(args: argparse.Namespace) -> None:
    """Prints the table, or with `args.json` the JSON, to stdout."""
    threads = torch.get_num_threads()
    try:
        result = demonstrate(args)
    finally:
        torch.set_num_threads(threads)
    print(json.dumps(result, indent=1) if args.json else printable(table(result), sys.stdout.encoding))
