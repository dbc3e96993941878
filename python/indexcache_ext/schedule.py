"""Which layers of a DeepSeek Sparse Attention model run their own indexer, and whose selection the others reuse.

A pattern is one letter per layer, as in IndexCache (arXiv 2603.12201, section 3.1): `F` (Full) runs its indexer,
`S` (Shared) attends to the tokens that the nearest preceding Full layer selected. The first layer is always Full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LETTERS = {"full": "F", "shared": "S", "F": "F", "S": "S"}
_TYPES = {"F": "full", "S": "shared"}
_PATTERN_KEYS = ("indexer_types", "index_topk_pattern")  # in order of precedence
_DEFAULT_OFFSET = 2


@dataclass(frozen=True)
class LayerPattern:
    """An immutable schedule of Full and Shared layers, e.g. `LayerPattern("FFSSSFSSSFSS")`.

    `str(p)` is the letters, `len(p)` the number of layers, iteration yields the letters in layer order; patterns
    compare equal and hash by their letters. Layers are numbered from 0 over the whole model.

    Raises TypeError for anything but a string, and ValueError for an empty string, a letter other than F or S, or a
    first layer that is Shared (there is no earlier selection that it could reuse).
    """

    letters: str

    def __post_init__(self) -> None:
        if not isinstance(self.letters, str):
            raise TypeError(
                f"LayerPattern: expected a string of F and S, got {type(self.letters).__name__}; "
                "LayerPattern.from_config reads lists such as indexer_types"
            )
        if not self.letters:
            raise ValueError("LayerPattern: expected one letter per layer, got an empty string")
        for position, letter in enumerate(self.letters):
            if letter not in _TYPES:
                raise ValueError(
                    f"LayerPattern: expected only F (Full) and S (Shared), got {letter!r} at position {position}"
                    f" of {self.letters!r}"
                )
        if self.letters[0] == "S":
            raise ValueError(
                f"LayerPattern: layer 0 of {self.letters!r} is Shared, but no earlier layer selects for it; "
                "write F at position 0"
            )

    @classmethod
    def uniform(cls, n: int, keep_every: int | None = 4, offset: int = _DEFAULT_OFFSET) -> LayerPattern:
        """The frequency rule of the engines: layer i is Shared iff `max(i - offset + 1, 0) % keep_every != 0`.

        So layers 0 … offset-1 are Full, and after them every `keep_every`-th: `uniform(10)` is `FFSSSFSSSF`. Configs
        call the two numbers `index_topk_freq` and `index_skip_topk_offset`; GLM-5.2 is `uniform(78, 4, offset=3)`, with
        21 Full layers. `keep_every` None or 1 makes every layer Full.

        Raises ValueError for n < 1, keep_every < 1, or an offset that makes layer 0 Shared.
        """
        n = _integer("LayerPattern.uniform", "n", n, at_least=1)
        every = 1 if keep_every is None else _integer("LayerPattern.uniform", "keep_every", keep_every, at_least=1)
        offset = _integer("LayerPattern.uniform", "offset", offset)
        letters = "".join("S" if max(i - offset + 1, 0) % every else "F" for i in range(n))
        if letters[0] == "S":
            raise ValueError(
                f"LayerPattern.uniform: offset {offset} with keep_every {every} makes layer 0 Shared; offset is the "
                "number of leading Full layers, use 1 or more"
            )
        return cls(letters)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any) -> LayerPattern:
        """The pattern of a model config: a dict (`config.json`) or a Hugging Face config object.

        The keys, first match wins: `indexer_types` (a list of "full" and "shared"), `index_topk_pattern` (letters),
        `index_topk_freq` with `index_skip_topk_offset` (default 2), else all Full. A key that is absent or null, and
        a frequency of 1, which is the engines' default, say nothing.

        Raises ValueError if two keys describe different patterns, if a pattern is not `num_hidden_layers` long, or if
        the config does not tell the number of layers.
        """
        what = "LayerPattern.from_config"
        get = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
        found = {key: cls(_letters(key, get(key))) for key in _PATTERN_KEYS if get(key) is not None}
        layers = get("num_hidden_layers")
        if layers is None:
            if not found:
                raise ValueError(f"{what}: the number of layers is unknown; the config needs num_hidden_layers")
            layers = len(next(iter(found.values())))
        layers = _integer(what, "num_hidden_layers", layers, at_least=1)
        for key, pattern in found.items():
            if len(pattern) != layers:
                raise ValueError(f"{what}: {key} describes {len(pattern)} layers, the model has {layers}")

        freq, offset = get("index_topk_freq"), get("index_skip_topk_offset")
        if freq is not None and _integer(what, "index_topk_freq", freq, at_least=1) > 1:
            offset = _DEFAULT_OFFSET if offset is None else _integer(what, "index_skip_topk_offset", offset)
            found["index_topk_freq"] = cls.uniform(layers, freq, offset)
        if not found:
            return cls("F" * layers)

        winner, pattern = next(iter(found.items()))
        for key, other in found.items():
            for layer, (letter, rival) in enumerate(zip(pattern, other, strict=True)):
                if letter != rival:
                    raise ValueError(
                        f"{what}: {winner} and {key} disagree: layer {layer} is {_TYPES[letter]} by {winner}, "
                        f"{_TYPES[rival]} by {key}; remove one key, or pass the LayerPattern you mean"
                    )
        return pattern

    def __str__(self) -> str:
        return self.letters

    def __len__(self) -> int:
        return len(self.letters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.letters)

    def is_full(self, layer: int) -> bool:
        """Whether this layer runs its own indexer. Raises IndexError outside 0 … len-1, as source() does."""
        return self.letters[self._checked(layer)] == "F"

    def source(self, layer: int) -> int:
        """The layer whose selection this layer attends to: itself if Full, else the nearest preceding Full layer."""
        return self.letters.rindex("F", 0, self._checked(layer) + 1)

    def share(self, layer: int) -> LayerPattern:
        """The same pattern with this layer Shared. Raises ValueError for layer 0, which has nobody to reuse."""
        layer = self._checked(layer)
        return LayerPattern(f"{self.letters[:layer]}S{self.letters[layer + 1 :]}")

    def groups(self) -> dict[int, range]:
        """Each Full layer, in order, with the layers that it serves: `{0: range(0, 1), 1: range(1, 5), …}`.

        A Full layer serves itself and the Shared layers up to the next Full one, so the ranges join to 0 … len-1.
        """
        full = [layer for layer, letter in enumerate(self.letters) if letter == "F"]
        return {first: range(first, end) for first, end in zip(full, [*full[1:], len(self)], strict=True)}

    @property
    def retention(self) -> float:
        """The share of layers that keep their indexer, in (0, 1]."""
        return self.letters.count("F") / len(self)

    def to_config(self) -> dict[str, Any]:
        """The config keys in both spellings: `indexer_types` (transformers) and `index_topk_pattern` (SGLang, vLLM)."""
        return {"indexer_types": [_TYPES[letter] for letter in self.letters], "index_topk_pattern": self.letters}

    def check_stages(self, layers_per_stage: int | Sequence[int]) -> None:
        """Refuse a split into pipeline stages in which a stage starts with a Shared layer.

        Such a stage needs the selection of a layer that runs elsewhere: an engine that does not hand indices over
        (`IndexCache.export` and `load` do) must not run it. `layers_per_stage` is the size of each stage, or one size
        for all of them, the last stage taking what remains.

        Raises ValueError naming each such stage, or if the sizes do not add up to the number of layers.
        """
        what = "LayerPattern.check_stages"
        if isinstance(layers_per_stage, int):
            size = _integer(what, "layers_per_stage", layers_per_stage, at_least=1)
            sizes = [min(size, len(self) - first) for first in range(0, len(self), size)]
        else:
            sizes = [_integer(what, f"layers_per_stage[{i}]", s, at_least=1) for i, s in enumerate(layers_per_stage)]
        if sum(sizes) != len(self):
            raise ValueError(f"{what}: stages of {sizes} hold {sum(sizes)} layers, the pattern has {len(self)}")

        firsts = [sum(sizes[:stage]) for stage in range(len(sizes))]
        shared = [(stage, first) for stage, first in enumerate(firsts) if not self.is_full(first)]
        if shared:
            stages = "; ".join(
                f"stage {stage} starts at layer {first}, which reuses the selection of layer {self.source(first)}"
                for stage, first in shared
            )
            raise ValueError(f"{what}: {stages}. Make these layers Full, or hand the indices over between stages")

    def _checked(self, layer: int) -> int:
        layer = _integer("LayerPattern", "layer", layer)
        if not 0 <= layer < len(self):
            raise IndexError(f"LayerPattern: expected a layer in 0…{len(self) - 1}, got {layer}")
        return layer


def _letters(key: str, value: Any) -> str:
    """A pattern as a config spells it: a string of letters, or a list of "full" / "shared" (or letters)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise TypeError(f"LayerPattern.from_config: expected {key} to be a list or a string, got {value!r}")
    for position, entry in enumerate(value):
        if not isinstance(entry, str) or entry not in _LETTERS:
            raise ValueError(
                f"LayerPattern.from_config: expected {key} to hold 'full' or 'shared', got {entry!r} at {position}"
            )
    return "".join(_LETTERS[entry] for entry in value)


def _integer(what: str, name: str, value: Any, *, at_least: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what}: expected {name} to be an int, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{what}: expected {name} to be at least {at_least}, got {value}")
    return value
