"""The text of the proof: Python source and its documentation strings from pinned wheels, as tokens.

    pip download --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux_2_27_x86_64 --python-version 3.12 -d WHEELS -r bench/proof/wheels.txt
    python bench/proof/text.py --wheels WHEELS --out TEXT

Writes to TEXT: tokenizer.json (BPE over bytes, trained on the training text), tokens.npz (the training text),
calibration-0.txt … -2.txt and heldout.txt (files that were kept out, dealt to four disjoint texts), and text.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import zipfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192
HELD_OUT_ONE_IN = 15
FILE_BYTES = 1_000, 600_000
SKIPPED_FOLDERS = {"test", "tests", "testing"}
CALIBRATION_SETS = 3
SEED = 0  # of the deal of held-out files


def source_files(wheels: Path) -> dict[str, str]:
    """The `.py` files of the wheels by name; of equal ones the first, no tests, nothing very short or long."""
    found, seen = {}, set()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith(".py") or SKIPPED_FOLDERS & set(name.split("/")):
                    continue
                data = archive.read(name)
                digest = hashlib.sha256(data).digest()
                if not FILE_BYTES[0] <= len(data) <= FILE_BYTES[1] or digest in seen:
                    continue
                seen.add(digest)
                found[name] = data.decode(errors="replace").replace("\r\n", "\n")
    return found


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of the text that each token stands for: a character of a byte-level token is a byte."""
    return np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts)])


def prepare(wheels: Path, out: Path, vocabulary: int = VOCABULARY, most_files: int | None = None) -> dict:
    files = list(source_files(wheels).items())[:most_files]
    training = [text for name, text in files if not is_held_out(name)]
    held_out = [text for name, text in files if is_held_out(name)]
    random.Random(SEED).shuffle(held_out)
    out.mkdir(parents=True, exist_ok=True)
    dealt = [held_out[i :: 2 * CALIBRATION_SETS] for i in range(2 * CALIBRATION_SETS)]
    parts = {f"calibration-{i}.txt": dealt[i] for i in range(CALIBRATION_SETS)}
    parts["heldout.txt"] = sum(dealt[CALIBRATION_SETS:], [])
    tokenizer = train_tokenizer("\n".join(training), vocabulary)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    tokens = encode(tokenizer, [text + "\n" for text in training])
    np.savez_compressed(out / "tokens.npz", tokens=tokens, token_bytes=token_bytes(tokenizer))
    about = {
        "wheels": sorted(path.name for path in wheels.glob("*.whl")),
        "vocabulary": tokenizer.get_vocab_size(),
        "training": {"files": len(training), "tokens": len(tokens), "sha256": hashlib.sha256(tokens).hexdigest()},
    }
    for name, texts in parts.items():
        text = "\n".join(texts)
        (out / name).write_text(text)
        about[name] = {"files": len(texts), "tokens": len(tokenizer.encode(text).ids)}
    about["training"]["bytes"] = int(token_bytes(tokenizer)[tokens].sum())
    (out / "text.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--files", type=int, metavar="N", help="no more than so many source files, for a trial")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="N")
    args = parser.parse_args()
    print(json.dumps(prepare(args.wheels, args.out, args.vocabulary, args.files), indent=1))


if __name__ == "__main__":
    main()
