"""The scripts of the proof (bench/proof): n-grams against counts, who selects in training, the whole chain, tiny."""

from __future__ import annotations

import importlib
import json
import random
import sys
import sysconfig
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from indexcache_ext.integrations.transformers import apply, record_selections

PROOF = Path(__file__).parents[1] / "bench" / "proof"


@pytest.fixture(scope="module")
def proof():
    """Imports a script of bench/proof, which import each other by their bare names."""
    sys.path.insert(0, str(PROOF))
    yield importlib.import_module
    sys.path.remove(str(PROOF))
    for name in ("text", "ngram", "train", "measure", "page"):
        sys.modules.pop(name, None)


def kneser_ney(tokens: list[int], vocabulary: int, order: int, before: list[int], token: int) -> float:
    """The probability of `token` after `before`, from counts of tuples."""
    counts = [Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(order + 1)]
    found = 1 / vocabulary
    for n in range(1, order + 1):
        own = counts[n] if n == order else Counter(gram[1:] for gram in counts[n + 1])
        of = Counter(own.values())
        y = of[1] / (of[1] + 2 * of[2])
        discounts = [0.0] + [i - (i + 1) * y * of[i + 1] / of[i] for i in (1, 2, 3)]
        context = tuple(before[len(before) - n + 1 :])
        follow = {gram[-1]: count for gram, count in own.items() if gram[:-1] == context}
        if follow:
            count, total = follow.get(token, 0), sum(follow.values())
            kept = sum(discounts[min(c, 3)] for c in follow.values()) / total
            found = (count - discounts[min(count, 3)]) / total + kept * found
    return found


def test_ngram_against_counts(proof) -> None:
    draw = random.Random(3)
    tokens = [min(int(draw.paretovariate(0.7)), 80) - 1 for _ in range(1500)]
    for i in range(1, 1500):
        if draw.random() < 0.5:
            tokens[i] = (tokens[i - 1] * 7 + 3) % 80
    model = proof("ngram").KneserNey(torch.tensor(tokens).numpy(), 80, 3)
    for _ in range(200):
        window = [draw.randrange(80) for _ in range(5)]
        expected = kneser_ney(tokens, 80, 3, window[:-1], window[-1])
        assert model.probabilities(torch.tensor(window).numpy())[-1][-1] == pytest.approx(expected, rel=1e-9)
    totals = [model.probabilities(torch.tensor([tokens[5], tokens[6], w]).numpy())[-1][-1] for w in range(80)]
    assert sum(totals) == pytest.approx(1)


def test_kendall_tau(proof) -> None:
    tau = proof("measure").kendall_tau
    assert tau([3, 1, 2], [3, 1, 2]) == 1 and tau([1, 2, 3], [3, 2, 1]) == -1
    assert tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_training_selects_what_is_served(proof) -> None:
    train = proof("train")
    torch.manual_seed(0)
    model = train.GlmMoeDsaForCausalLM(train.config_of(train.SMOKE, 300)).eval()
    tokens = torch.randint(300, (2, 150), generator=torch.Generator().manual_seed(1))
    masks = []

    def select(inputs, topk: int) -> torch.Tensor:
        masks.append(train.serve(inputs, topk))
        return masks[-1]

    with torch.no_grad():
        with train.TrainableDsa(model, "sparse", select=select):
            trained = model(input_ids=tokens, use_cache=False).logits
        apply(model, "FFFF")
        with record_selections(model) as recorded:
            served = model(input_ids=tokens, use_cache=False).logits
    first = torch.zeros(2, 150, 151).scatter(2, recorded[0][0].long() + 1, 1.0)[..., 1:] > 0
    assert torch.equal(masks[0], first)  # later layers start from sums in another order
    assert masks[0].sum(-1).max() == train.SMOKE.topk
    torch.testing.assert_close(trained, served, rtol=1e-3, atol=1e-3)


def test_the_chain(proof, tmp_path: Path) -> None:
    """A wheel of sources in, a model, searches and a page out."""
    pytest.importorskip("matplotlib")
    library = Path(sysconfig.get_path("stdlib"))
    wheels, text, model, out = (tmp_path / name for name in ("wheels", "text", "model", "out"))
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "library-1-py3-none-any.whl", "w") as wheel:
        for file in sorted((library / "asyncio").glob("*.py")) + sorted((library / "email").glob("*.py")):
            wheel.write(file, f"{file.parent.name}/{file.name}")
    module = proof("text")
    module.HELD_OUT_ONE_IN = 3  # of these few files
    about = module.prepare(wheels, text, vocabulary=300)
    train = proof("train")
    log = train.train(text, model, seed=0, minutes=0, steps=[3, 2, 2], sizes=train.SMOKE, compiled=False)
    assert log["held_out"]["sparse_nats_per_token"] < 6 and [s["steps"] for s in log["stages"]] == [3, 2, 2]
    measure = proof("measure")
    args = Namespace(model=model, text=text, out=out, windows=2, heldout_windows=2, swaps=True)
    measure.Measurement(args).run()
    found = json.loads((out / "measured.json").read_text())
    assert found["restarts"]["same_order"] and found["restarts"]["losses_with_the_same_bits"] == 6
    assert [sorted(search["order"]) for search in found["searches"]] == [[1, 2, 3]] * 3
    assert {name for row in found["held_out"]["patterns"] for name in row["chosen"]} >= {"full", "searched 2, 1 Full"}
    counts = [about[f"calibration-{i}.txt"]["files"] for i in range(3)] + [about["heldout.txt"]["files"]]
    assert min(counts) > 0
    ngram = proof("ngram").measure(text, 5, train.SMOKE.context, train.SMOKE.windows)
    assert ngram["calibration"] == found["held_out"]["identity"]["calibration"]  # the same windows
    assert ngram["orders"][1]["nats_per_token"] > ngram["orders"][3]["nats_per_token"]
