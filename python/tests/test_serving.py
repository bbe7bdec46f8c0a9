"""The serving engine of the examples: whichever cache it runs over, each answer is what the request gets alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from world import ROOT

import vattn

torch = pytest.importorskip("torch", reason="SKIP: PyTorch is not installed")
FOLDER = ROOT / "python" / "examples" / "serving"
sys.path.insert(0, str(FOLDER))

from engine import Engine, Request  # noqa: E402
from model import Config, Model  # noqa: E402
from sampling import Sampling, sample  # noqa: E402
from store import Shape, Store  # noqa: E402
from store_paged import Paged  # noqa: E402
from store_static import Static  # noqa: E402
from store_vattn import Vattn  # noqa: E402

CONFIG = Config.tiny()


def shape(tokens: int) -> Shape:
    """Room for so many tokens, of requests of at most 256."""
    of = CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim, torch.float32, torch.device("cpu")
    token = Shape(*of, budget=0, longest=256, most=16).token_bytes
    return Shape(*of, budget=tokens * token, longest=256, most=16)


def requests(count: int = 20) -> list[Request]:
    draw = random.Random(1)
    return [
        Request([draw.randrange(CONFIG.vocab) for _ in range(draw.randrange(1, 120))], draw.randrange(1, 60))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.random(CONFIG, 256, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    """What each request is answered by itself."""
    answers = []
    for request in requests():
        Engine(model, Static(shape(2 * 256))).run([request])
        answers.append(request.tokens)
    return answers


def driver() -> vattn.Driver:
    """A granule is 16 tokens of the tiny model's keys in all layers."""
    return vattn.HostDriver("64MiB", granule=4096)


STORES: dict[str, Callable[[], Store]] = {
    "paged, tight": lambda: Paged(shape(500)),
    "paged, pages of 64": lambda: Paged(shape(2000), page_tokens=64),
    "static": lambda: Static(shape(5 * 256)),
    "vattn, tight": lambda: Vattn(shape(600), driver=driver()),
    "vattn": lambda: Vattn(shape(4000), driver=driver()),
    "vattn, per layer": lambda: Vattn(shape(4000), driver=driver(), layout="per_layer"),
}


@pytest.mark.parametrize("name", STORES)
def test_every_answer_is_what_the_request_gets_alone(name: str, model: Model, alone: list[list[int]]) -> None:
    store = STORES[name]()
    try:
        serve(store, model, alone, tight="tight" in name)
    finally:
        store.close()


def serve(store: Store, model: Model, alone: list[list[int]], tight: bool) -> None:
    served = requests()
    told: list[int] = []
    served[0].on_token = told.append
    report = Engine(model, store, chunk=64).run(served)
    assert [request.tokens for request in served] == alone
    assert told == alone[0]
    assert all(len(request.times) == len(request.tokens) for request in served)
    assert report.preempted or not tight
    if isinstance(store, Vattn):
        assert store.cache.stats().active_slots == 0
    else:
        # All pages and slots but the spare one.
        count = store.pool.shape[2] - 1  # type: ignore[attr-defined]
        assert len(store.free) == count  # type: ignore[attr-defined]


def test_a_request_that_can_never_fit_is_refused(model: Model) -> None:
    with pytest.raises(MemoryError, match="raise the budget"):
        Engine(model, Paged(shape(64))).run([Request([1] * 100, 10)])


def test_top_p_draws_from_the_likeliest_tokens_alone() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 200))
    drawn = sample(logits, [Sampling(temperature=1.0, top_p=0.7)] * 200)
    assert set(drawn) == {0, 1}
    assert set(sample(logits, [Sampling()] * 200)) == {0}
    with pytest.raises(ValueError, match="top_p is 0"):
        Sampling(1.0, 0.0)


def test_the_bench_and_the_page(tmp_path: Path) -> None:
    trace = tmp_path / "short.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2023-11-16 18:15:4{at}.6805900,{20 + at},{5 + at}\n" for at in range(6))
    )
    results = tmp_path / "short.json"

    def run(*command: Any) -> None:
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    run(FOLDER / "bench.py", "--tiny", "--trace", trace, "--rounds", 1, "--load", 100, "--longest", 256, "--most", 8,
        "--budget", 0.06, "--json", results)  # fmt: skip
    pytest.importorskip("matplotlib", reason="SKIP: matplotlib is not installed")
    run(FOLDER / "report.py", results, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 5 and "vattn (reference, reference)" in page
