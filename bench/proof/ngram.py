"""The bar for the proof's model: interpolated modified Kneser-Ney n-grams on the same tokens.

    python bench/proof/ngram.py --text TEXT [--order 5] [--context 4096] [--windows 24]

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 4.1.6: three
discounts for each order, and continuation counts below the highest. Counts the training tokens, and prints nats per
token and per byte over the windows of heldout.txt that the model is measured on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from text import token_bytes
from tokenizers import Tokenizer

UNSEEN = -1


class KneserNey:
    """Probabilities of tokens 0 … vocabulary-1 after up to order-1 others."""

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int) -> None:
        self.vocabulary, self.order = vocabulary, order
        self.keys: list[np.ndarray] = []  # of each order: (context, token) of every n-gram seen, sorted
        self.counts: list[np.ndarray] = []
        ends = np.arange(len(tokens))
        ids = np.zeros(len(tokens) + 1, dtype=np.int64)  # of the n-gram that ends before each position
        for n in range(order):
            ends = ends[1:] if n else ends
            keys, first, inverse, counts = np.unique(
                ids[ends] * vocabulary + tokens[ends], return_index=True, return_inverse=True, return_counts=True
            )
            if n:  # below the highest order an n-gram counts once for each token seen before it
                self.counts[-1] = np.bincount(ids[ends[first] + 1], minlength=len(self.keys[-1]))
            self.keys.append(keys)
            self.counts.append(counts)
            ids[ends + 1] = inverse
        self.discounts = [self._discounts(counts) for counts in self.counts]
        self.totals, self.left = zip(*(self._contexts(n) for n in range(order)), strict=True)

    @staticmethod
    def _discounts(counts: np.ndarray) -> np.ndarray:
        """What is taken off counts of 0, 1, 2, and 3 or more."""
        n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
        y = n[1] / max(n[1] + 2 * n[2], 1)
        return np.array([0.0, *(i - (i + 1) * y * n[i + 1] / max(n[i], 1) for i in (1, 2, 3))])

    def _contexts(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each context: the sum of counts, and what the discounts leave for the lower order."""
        contexts, counts = self.keys[n] // self.vocabulary, self.counts[n]
        size = 1 if n == 0 else len(self.keys[n - 1])
        taken = self.discounts[n][np.minimum(counts, 3)]
        return np.bincount(contexts, counts, size), np.bincount(contexts, taken, size)

    def _find(self, n: int, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        keys = np.where(contexts == UNSEEN, UNSEEN, contexts * self.vocabulary + tokens)
        at = np.minimum(np.searchsorted(self.keys[n], keys), len(self.keys[n]) - 1)
        return np.where(self.keys[n][at] == keys, at, UNSEEN)

    def probabilities(self, window: np.ndarray) -> list[np.ndarray]:
        """Of each order, the probability of each token but the first after those before it in the window."""
        window = window.astype(np.int64)
        contexts = np.zeros(len(window), dtype=np.int64)  # the n-gram that ends before each position
        lower, found = np.full(len(window), 1 / self.vocabulary), []
        for n in range(self.order):
            at = self._find(n, contexts, window)
            counts = np.where(at == UNSEEN, 0, self.counts[n][at])
            seen = contexts != UNSEEN
            total = np.where(seen, self.totals[n][contexts], 0)
            known = total > 0
            total = np.where(known, total, 1)
            own = (counts - self.discounts[n][np.minimum(counts, 3)]) / total
            lower = np.where(known, own + self.left[n][contexts] / total * lower, lower)
            found.append(lower[1:])
            contexts = np.concatenate([[UNSEEN], at[:-1]])
        return found


def measure(folder: Path, order: int, context: int, windows: int) -> dict:
    saved = np.load(folder / "tokens.npz")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    held_out = np.array(tokenizer.encode((folder / "heldout.txt").read_text()).ids)
    model = KneserNey(saved["tokens"].astype(np.int64), tokenizer.get_vocab_size(), order)
    count = min(windows, len(held_out) // context)
    step = (len(held_out) - context) // max(count - 1, 1)
    nats, size = np.zeros(order), 0
    parts = np.stack([held_out[i * step :][:context] for i in range(count)])
    for window in parts:
        nats -= [np.log(p).sum() for p in model.probabilities(window)]
        size += token_bytes(tokenizer)[window[1:]].sum()
    targets = count * (context - 1)
    return {
        "text": json.loads((folder / "text.json").read_text()),
        "windows": f"{count} of {context} tokens",
        "calibration": hashlib.sha256(parts).hexdigest()[:12],  # as CalibrationLoss.identity has it
        "bytes_per_token": size / targets,
        "orders": {
            n + 1: {"nats_per_token": total / targets, "nats_per_byte": total / size} for n, total in enumerate(nats)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="what text.py wrote")
    parser.add_argument("--order", type=int, default=5, metavar="N")
    parser.add_argument("--context", type=int, default=4096, metavar="N")
    parser.add_argument("--windows", type=int, default=24, metavar="N")
    args = parser.parse_args()
    print(json.dumps(measure(args.text, args.order, args.context, args.windows), indent=1))


if __name__ == "__main__":
    main()
