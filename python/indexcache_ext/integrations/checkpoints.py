"""Checkpoints and texts for measurements on a model: read once, refused early, with messages that say what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

BYTE_START = 256  # of models on bytes: the token before a text
_BYTE_VOCABULARY = 257


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message says why and what to do about it."""


class CalibrationError(ValueError):
    """The calibration text cannot be used; the message says why and what to do about it."""


def read_config(folder: Path) -> dict:
    """What config.json says. Raises CheckpointError if there is no checkpoint, or it cannot be read."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(_missing(folder, "config.json"))
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds no config, but {type(config).__name__}")
    return config


def _missing(folder: Path, name: str) -> str:
    return f"no checkpoint in {folder}: {name} is missing; name another folder with --model DIR"


def load_model(
    folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """The causal language model in `folder`, for inference.

    Raises:
        CheckpointError: there is none, it is damaged or incomplete.
    """
    read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(_missing(folder, "model.safetensors"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # a damaged file shows up as many kinds of exception
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the checkpoint in {folder} cannot be loaded, it is damaged: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"the checkpoint in {folder} lacks {len(missing)} weights, {missing[0]} among them")
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"the checkpoint in {folder} is damaged: {broken[0]} holds NaN or infinite values")
    return model.to(device).eval()


def fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits that tell two models apart: of the names, shapes and a sample of every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].cpu().float()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:12]


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if torch sees one. Raises CheckpointError if there is no GPU to put the model on."""
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device cuda: torch sees no GPU here; leave --device out to run on the CPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def read_calibration(folder: Path, files: Sequence[Path], context: int, windows: int) -> Tensor:
    """At most `windows` windows of `context` tokens, evenly spaced over the files' text: int64 [windows, context].

    The text is tokenised as the checkpoint in `folder` says; a model on bytes (a vocabulary of 257 and no tokenizer)
    gets its start token before each window.

    Raises:
        CalibrationError: a file cannot be read, or the text is shorter than one window.
        CheckpointError: the checkpoint has no tokenizer.
    """
    parts = []
    for file in files:
        try:
            parts.append(file.read_bytes())
        except OSError as error:
            raise CalibrationError(f"--calibration: {file} cannot be read: {error.strerror}") from error
    text = b"\n".join(parts)
    if read_config(folder).get("vocab_size") == _BYTE_VOCABULARY and not (folder / "tokenizer.json").is_file():
        tokens, start = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else _NONE, [BYTE_START]
    else:
        tokens, start = _tokenised(folder, text.decode(errors="replace")), []
    length = context - len(start)
    if len(tokens) < length:
        raise CalibrationError(
            f"the calibration text has {len(tokens):,} tokens, fewer than one window of {length:,}: give more text, or"
            " a smaller --context"
        )
    count = min(windows, len(tokens) // length)
    step = (len(tokens) - length) // max(count - 1, 1)
    rows = [torch.cat([torch.tensor(start, dtype=torch.long), tokens[i * step :][:length]]) for i in range(count)]
    return torch.stack(rows)


_NONE = torch.empty(0, dtype=torch.long)


def _tokenised(folder: Path, text: str) -> Tensor:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the checkpoint in {folder} has no tokenizer that can be loaded: {reason}") from error
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
