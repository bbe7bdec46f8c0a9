"""The serving engine of the examples: whichever cache it runs over, each answer is what the request gets alone."""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from world import ROOT

import vattn

torch = pytest.importorskip("torch", reason="SKIP: PyTorch is not installed")
FOLDER = ROOT / "python" / "examples" / "serving"
sys.path.insert(0, str(FOLDER))

import check
import head_to_head
import kernel_times
import kernels
import step_kernels
from bench import fresh, summary
from choices import Choice
from engine import Chunk, Engine, Request
from model import Config, Model
from passes import Mixed, Room, wide
from sampling import Sampling, sample
from store import Shape, Store
from store_paged import Paged
from store_static import Static
from store_vattn import Vattn

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


class StrictDecode(kernels.ReferenceDecode):
    """Is asked for a whole batch, and leaves no number in its padding."""

    def __init__(self, store: Any, heads: int, width: int) -> None:
        super().__init__(store, heads, width)
        self.width = width

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        assert len(query) == len(out) == self.width
        out.fill_(torch.nan)
        super().run(layer, query, out)


class Replayed(Mixed):
    """Passes from stretches that are replayed one by one, as from graphs."""

    captures: list[int]

    def capture(self, width: int) -> None:
        super().capture(width)
        self.captures = [*getattr(self, "captures", ()), width]
        layers = self.model.config.layers
        assert self.graphs[width] == list(range(layers)) + [None]
        under_way: list[Iterator[int]] = []

        def first() -> None:
            under_way[:] = [self.stretches(width)]
            next(under_way[0])

        def on() -> None:
            next(under_way[0], None)

        self.graphs[width] = [SimpleNamespace(replay=replay) for replay in (first, *[on] * layers)]


@pytest.mark.parametrize("chunk", [128, 200])
@pytest.mark.parametrize("name", ["paged, tight", "vattn"])
def test_a_padded_pass_answers_the_same(
    name: str, chunk: int, model: Model, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("passes.aside", nullcontext)
    # What a stretch returns stands for its graph.
    monkeypatch.setattr("passes.recorded", lambda run, pool: (run(), None))
    monkeypatch.setitem(kernels.DECODE, "strict", StrictDecode)
    store = STORES[name]()
    try:
        served, engine = requests(), Engine(model, store, decode="strict", chunk=chunk)
        engine.mixed = mixed = Replayed(model, store, chunk, engine.room, pool=(0, 0))
        # Before any request has memory: padding reaches nobody's.
        engine.prepare()
        engine.prepare()
        widths = [128] if chunk == 128 else [256, 128]
        assert mixed.captures == widths
        engine.run(served)
        assert [request.tokens for request in served] == alone
        assert mixed.captures == widths
        del mixed.graphs[128]
        again = fresh(served[:1])
        engine.run(again)
        assert again[0].tokens == alone[0]
        assert mixed.captures == [*widths, 128]
    finally:
        store.close()


def test_wide_passes_are_launched_kernel_by_kernel(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = Mixed(model, Static(shape(512)), 4096, Room(model, Mixed.needed(4096)), pool=(0, 0))
    replayed = [count for count in (1, 128, 129, 2048, 2049, 4096) if mixed.replayed(count)]
    assert replayed == [1, 128, 129, 2048]
    widths: list[int] = []
    monkeypatch.setattr(Mixed, "capture", lambda mixed, width: widths.append(width))
    mixed.prepare()
    assert widths == list(range(2048, 0, -128))
    # Behind them, the padding of any batch.
    assert len(mixed.room.query) == 4096 + max(wide(count) - count for count in range(1, 1009))
    without = Mixed(model, Static(shape(512)), 4096, mixed.room, pool=None)
    assert not without.replayed(1)


def test_a_plan_waits_until_the_one_before_it_was_copied(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of one token let the same batch be planned for a mixed step, and again beside it."""
    log: list[str] = []

    class NotingDecode(kernels.ReferenceDecode):
        def plan(self, places: Any, totals: Any) -> None:
            log.append("plan")
            super().plan(places, totals)

    class WithEvents(Engine):
        def batch(self, count: int, captured: bool = True) -> Any:
            batch = super().batch(count, captured)
            if not batch.copied:
                note = {name: lambda name=name: log.append(name) for name in ("synchronize", "record")}
                batch.copied = SimpleNamespace(**note)
            return batch

    monkeypatch.setitem(kernels.DECODE, "noting", NotingDecode)
    asked = [Request([5] * 4, 12), Request([7] * 4, 12), *(Request([9] * 4, 1) for _ in range(4))]
    report = WithEvents(model, Static(shape(256 * 6)), decode="noting", chunk=8).run(asked)
    assert log == ["synchronize", "plan", "record"] * (len(log) // 3)
    assert len(log) >= 3 * (report.steps - 1)


def test_a_request_that_can_never_fit_is_refused(model: Model) -> None:
    with pytest.raises(MemoryError, match="raise the budget"):
        Engine(model, Paged(shape(64))).run([Request([1] * 100, 10)])


def test_top_p_draws_from_the_likeliest_tokens_alone() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 200))
    drawn = sample(logits, [Sampling(temperature=1.0, top_p=0.7)] * 200)
    assert set(drawn.tolist()) == {0, 1}
    assert set(sample(logits, [Sampling()] * 200).tolist()) == {0}
    with pytest.raises(ValueError, match="top_p is 0"):
        Sampling(1.0, 0.0)


def times() -> dict[str, Any]:
    """As a kernel would take that does 1,000 pairs of tokens a microsecond, and of decodes 5 us a step, 2 a request and
    1 for 100 tokens."""
    grid = [(new, total) for new in kernel_times.NEW for total in kernel_times.TOTAL if new <= total]
    return {
        "store": "vattn",
        "page_tokens": 16,
        "prefill_kernel": "fa3",
        "decode_kernel": "flashinfer",
        "prefill": [{"new": n, "total": t, "us": kernel_times.work(n, t) / 1000} for n, t in grid],
        "decode": [
            {"requests": n, "tokens": t, "us": 5 + 2 * n + n * t / 100} for n, t in kernel_times.DECODES
        ],
    }


def test_the_time_of_a_kernel_lies_between_those_measured_around_it() -> None:
    found = kernel_times.Times(times())
    # A prompt of 2 tokens: the first sees itself, the second both.
    assert kernel_times.work(2, 2) == 3
    assert found.prefill(3, 5) == found.prefill(64, 64)
    for new, total in ((2048, 8192), (700, 700), (1000, 50_000), (8192, 131_072), (8192, 400_000)):
        assert found.prefill(new, total) == pytest.approx(kernel_times.work(new, total) / 1000)
    assert found.decode(10, 30, 5000) == pytest.approx(50 + 60 + 50)
    slower = times()
    for each in slower["prefill"]:
        each["us"] *= 1.5 if each["total"] == 8192 else 1
    middle = kernel_times.Times(slower).prefill(2048, 16_384) / found.prefill(2048, 16_384)
    assert 1 < middle < 1.5
    run = {"prefills": [(2048, 8192)], "decodes": {"steps": 1, "requests": 2, "tokens": 100}}
    prefill, decode = found.attention(run, layers=4)
    assert prefill == pytest.approx(4e-6 * kernel_times.work(2048, 8192) / 1000)
    assert decode == pytest.approx(4e-6 * 10)
    paged = [{**times(), "store": "paged", "page_tokens": pages} for pages in (16, 64)]
    assert found.decode_error < 1e-6
    for each in paged[1]["decode"]:
        each["us"] *= 0.9
    for each in paged[1]["prefill"]:
        each["us"] *= 1.1
    work = head_to_head.expected([Request([1] * 3000, 5)], chunk=2048, most=4)
    assert work["prefills"] == [(2048, 2048), (952, 3000)]
    assert work["decodes"] == {"steps": 5, "requests": 5, "tokens": 5 * 3002.5}
    assert kernel_times.best(paged, "paged", [work], layers=1) == "paged:16:fa3:flashinfer"
    work["prefills"] = []
    assert kernel_times.best(paged, "paged", [work], layers=1) == "paged:64:fa3:flashinfer"


def test_a_choice_names_what_it_does_not_know() -> None:
    assert str(Choice.read("paged:64:flashinfer-fa2")) == "paged:64:flashinfer-fa2"
    for text, said in (
        ("pagd", "no store 'pagd'"),
        ("paged:0", "'0' is no number"),
        ("paged:16:x", "no kernel"),
    ):
        with pytest.raises(ValueError, match=said):
            Choice.read(text)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few requests under the names of the real traces."""
    folder = tmp_path_factory.mktemp("traces")
    lengths = "num_prefill_tokens,num_decode_tokens\n"
    (folder / "arxiv_long_offline.csv").write_text(lengths + "60000,5\n80000,9\n")
    (folder / "sync_vs_async.csv").write_text(lengths + "1700,60\n1900,50\n1600,40\n")
    (folder / "azure_llm_2023_conv.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(
            f"2023-11-16 18:{15 + at // 60}:{at % 60:02}.6805900,{200 + at % 30},{5 + at % 9}\n"
            for at in range(1010)
        )
    )
    return folder


def test_each_part_has_the_kernels_that_are_best_for_it(traces: Path, model: Model) -> None:
    given = argparse.Namespace(tiny=True, traces=traces, rounds=1, layout="sliced", model=None)
    known = [
        {**times(), "store": store, "page_tokens": pages}
        for store in ("vattn", "paged")
        for pages in (16, 64)
    ]
    for entry in known:
        faster = 0.9 if entry["page_tokens"] == 64 else 1
        entry["decode"] = [{**each, "us": each["us"] * faster} for each in entry["decode"]]
    fa3 = {**known[1], "decode_kernel": "fa3"}
    fa3["decode"] = [{**each, "us": each["us"] / 2} for each in fa3["decode"]]
    found = {part: head_to_head.chosen([*known, fa3], part, model, given) for part in ("decode", "tight")}
    # FlashAttention-3's decode is not chosen, however fast, and where memory is short small pages are.
    assert {stores["vattn"] for stores in found.values()} == {"vattn:64:fa3:flashinfer"}
    assert found["decode"]["paged"] == "paged:64:fa3:flashinfer"
    assert found["tight"]["paged"] == "paged:16:fa3:flashinfer"


def test_what_a_run_computes_is_listed(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--tiny --limit 4 --longest 1024 --most 4 --budget 0.06 --stores vattn,paged --answers 3 --top 400"
    )
    trace = traces / "azure_llm_2023_conv.csv"
    assert step_kernels.main(["--trace", str(trace), "--load", "1000000", *options.split()]) == 0
    said = capsys.readouterr().out
    tables = said.split("paged: ")
    assert len(tables) == 2 and tables[0].startswith("vattn: ")
    for table in tables:
        head = re.search(r"(\d+) steps with 4 parts of prompts, (.+) ms each .* all (\d+) steps:", table)
        # The last tokens of answers are computed in steps of their own.
        assert head and 0 < int(head[1]) < int(head[3]) and float(head[2]) > 0
        times = [float(line.split()[0]) for line in table.splitlines()[1:]]
        assert times == sorted(times, reverse=True) and len(times) > 20
        # One for each token of each answer, in each layer.
        calls = re.search(r" (\d+) calls .* aten::scaled_dot_product_attention$", table, re.MULTILINE)
        assert calls and int(calls[1]) == 4 * 3 * CONFIG.layers


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--stores vattn,foo", "there is no store 'foo'"),
        ("--answers 0", "'0' is no number of them; give 1 or more"),
        ("--limit 0", "'0' is no number of them; give 1 or more"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    given: str, said: str, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = traces / "azure_llm_2023_conv.csv"
    with pytest.raises(SystemExit):
        step_kernels.main(["--tiny", "--trace", str(trace), *given.split()])
    assert said in capsys.readouterr().err


class Results:
    """What the head to head has written, and the command to go on with it."""

    def __init__(self, folder: Path, traces: Path) -> None:
        self.folder, self.traces = folder, traces

    def command(self, rounds: int, *more: str) -> list[str]:
        return [str(self.folder), "--traces", str(self.traces), "--tiny", "--rounds", str(rounds), *more]

    def part(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found

    def cut(self, name: str, of: int, runs: int) -> None:
        """As if a part had ended before the store of this number was served in the round after so many."""
        found = self.part(name) | {"complete": False}
        store = list(found["results"])[of]
        del found["results"][store][runs:]
        (self.folder / f"{name}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def one_round(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts in one command."""
    pytest.importorskip("matplotlib", reason="SKIP: matplotlib is not installed")
    made = Results(tmp_path_factory.mktemp("head_to_head") / "results", traces)
    command = [sys.executable, str(FOLDER / "head_to_head.py"), *made.command(1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return made.folder


@pytest.fixture
def results(one_round: Path, traces: Path, tmp_path: Path) -> Results:
    """The same, to be changed."""
    return Results(Path(shutil.copytree(one_round, tmp_path / "results")), traces)


def test_all_of_it_makes_a_page(results: Results) -> None:
    page = (results.folder / "page.html").read_text()
    assert "http" not in page and "not complete" not in page
    assert page.count("<svg") == 4 * 5 and "vattn (reference, reference, pages of 16)" in page
    assert "<td>bound: paged (none, " in page and "vattn to itself without CUDA graphs" in page
    agreed = results.part("agreement")
    assert agreed["to_paged"]["vattn"]["positions"] == 8 * 24
    assert agreed["to_paged"]["vattn"]["largest"] < 1e-4 < agreed["to_paged"]["vattn"]["spread_of_logits"]
    assert agreed["without_graphs"]["largest"] == 0
    assert list(results.part("online")["stores"]) == ["vattn", "paged", "static", "bound"]
    for part in ("long", "decode", "online", "tight"):
        for runs in results.part(part)["results"].values():
            assert len(runs) == 1
            for run in runs:
                # Every token of every prompt was computed, and a decode for each further token of the answers.
                assert sum(new for new, _ in run["prefills"]) >= run["prompt_tokens"]
                if not run["preempted"]:
                    assert run["decodes"]["requests"] == run["answer_tokens"] - run["requests"]


def test_what_is_there_is_not_run_again(results: Results, capfd: pytest.CaptureFixture[str]) -> None:
    before = results.part("tight")
    first, second, *_ = before["results"]
    results.cut("tight", 0, 0)
    parts = "--parts", "online, tight"
    assert head_to_head.main(results.command(2, *parts)) == 0
    said = capfd.readouterr().out
    # That one's first round, and another round for all.
    assert said.count(", round 1: ") == 1 and f"{first}, round 1: " in said
    assert said.count(", round 2: ") == 4 + 3
    # The load to compare at is known.
    assert not re.search(r"^load ", said, re.MULTILINE)
    found = results.part("tight")
    assert found["complete"] and found["results"][second][0] == before["results"][second][0]
    # There are more than are asked for, and where one is not, it is run.
    assert head_to_head.main(results.command(1, *parts)) == 0
    assert ", round " not in capfd.readouterr().out
    results.cut("tight", 1, 1)
    assert head_to_head.main(results.command(1, *parts)) == 0
    said = capfd.readouterr().out
    assert said.count(", round ") == 1 and f"{second}, round 2: " in said
    assert results.part("tight")["options"]["rounds"] == 2


def test_what_another_run_began_is_left_as_it_is(results: Results) -> None:
    online = results.folder / "online.json"
    online.write_text(online.read_text().replace('"processor"', '"GPU"'))
    for part, more, told in (
        ("long", ["--layout", "per_layer"], "layout 'sliced', now 'per_layer'"),
        ("online", [], "device 'GPU', now 'processor'"),
    ):
        before = (results.folder / f"{part}.json").read_text()
        with pytest.raises(SystemExit, match=re.escape(told)):
            head_to_head.main(results.command(2, "--parts", f"{part}, tight", *more))
        assert (results.folder / f"{part}.json").read_text() == before
    (results.folder / "long.json").write_text("")
    with pytest.raises(SystemExit, match=r"long\.json is no part's file"):
        head_to_head.main(results.command(1))


def test_a_part_is_on_the_page_once_a_store_was_served(results: Results) -> None:
    import report

    for name in ("agreement", "long", "decode"):
        (results.folder / f"{name}.json").unlink()
    for store in (1, 2):
        results.cut("tight", store, 0)
    (results.folder / "online.json").write_text('{"search": {}, "complete": false}')
    (results.folder / "other.json").write_text("[]")
    page = report.page(results.folder)
    assert page.count("<h2>") == 1 and "<h2>tight (not complete)</h2>" in page
    assert "vattn (reference" in page and "static (reference" not in page


def test_logits_are_compared_with_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Spy(Engine):
        def __init__(self, *args: Any, graphs: bool = True, **options: Any) -> None:
            asked.append((args[1].name, graphs))
            super().__init__(*args, graphs=graphs, **options)

    monkeypatch.setattr(head_to_head, "Engine", Spy)
    given = argparse.Namespace(tiny=True, layout="sliced")
    model = Model.random(CONFIG, 512, device="cpu", dtype=torch.float32)
    found = head_to_head.agreement(model, {"vattn": "vattn", "paged": "paged"}, given)
    assert asked == [("vattn", True), ("paged", True), ("paged", True), ("vattn", False)]
    assert found["without_graphs"]["positions"] == 8 * 24


def test_given_answers_are_what_is_answered(model: Model) -> None:
    """With each token's logits shown before it is chosen."""
    shown: list[tuple[int, int]] = []
    asked = requests(4)
    for request in asked:
        request.answer, request.forced = 5, [9, 8, 7, 6, 5]

    def note(which: list[Request], logits: torch.Tensor) -> None:
        assert logits.shape == (len(which), CONFIG.vocab)
        shown.extend((asked.index(request), len(request.tokens)) for request in which)

    Engine(model, Paged(shape(2000)), on_logits=note).run(asked)
    assert all(request.tokens == [9, 8, 7, 6, 5] for request in asked)
    assert sorted(shown) == [(which, token) for which in range(4) for token in range(5)]


@pytest.mark.parametrize("seed", range(24))
def test_any_schedule_answers_what_requests_get_alone(seed: int, model: Model) -> None:
    """Chunks below the number of decodes, places for few, arrivals, answers that are given, cut short or of one
    token, and memory for few of them."""
    draw = random.Random(seed)
    chunk, most, tokens = draw.choice([1, 3, 16, 512]), draw.choice([1, 2, 8]), draw.choice([260, 400, 900])
    asked = []
    for _ in range(draw.randrange(1, 12)):
        count = draw.choice([1, draw.randrange(1, 58)])
        prompt = [draw.randrange(CONFIG.vocab) for _ in range(draw.randrange(1, 70))]
        given = [at % CONFIG.vocab for at in range(count)] if draw.random() < 0.2 else None
        stop = draw.randrange(CONFIG.vocab) if draw.random() < 0.2 else None
        asked.append(Request(prompt, count, draw.choice([0, 0, 0.01]), stop=stop, forced=given))
    right = []
    for request in fresh(asked, arrival=0.0):
        Engine(model, Static(shape(2 * 256))).run([request])
        right.append(request.tokens)
    of = replace(shape(tokens), most=most)
    make: Callable[[], Store] = draw.choice(
        [
            lambda: Paged(of),
            lambda: Paged(of, page_tokens=1),
            lambda: Vattn(of, driver=driver()),
            lambda: Vattn(of, driver=driver(), layout=1),
        ]
    )
    store = make()
    try:
        Engine(model, store, chunk=chunk).run(asked)
    finally:
        store.close()
    assert [request.tokens for request in asked] == right


class Noting(Paged):
    """Keeps what it was asked for."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, page_tokens=1)
        self.asked: list[Any] = []

    def grow(self, places: Any, totals: Any) -> bool:
        self.asked.append((places.tolist(), totals.tolist()))
        return super().grow(places, totals)

    def end(self, place: int) -> None:
        self.asked.append(place)
        super().end(place)


class Watched(Engine):
    """Knows when it looks ahead, and takes the device to be busy then."""

    looking = False

    def look_ahead(self, chunk: Any) -> None:
        self.looking = True
        super().look_ahead(chunk)
        self.looking = False

    def busy(self) -> bool:
        return self.looking


def test_memory_is_asked_for_ahead_and_once(model: Model) -> None:
    """For a prompt of ten tokens in parts of four, and an answer of five, whose last token is never kept."""
    store = Noting(shape(100))
    report = Watched(model, store, chunk=4).run([Request([3] * 10, 5)])
    place = store.asked[-1]
    assert store.asked == [*(([place], [count]) for count in (4, 8, 10, 11, 12, 13, 14)), place]
    # The device waits for the first part, and for the end after the last step; all else is asked for beside it.
    assert [call.name for call in report.calls if not call.hidden] == ["admits", "begin", "grow", "end"]
    assert [call.name for call in report.calls if call.hidden] == ["grow"] * 6
    found = summary([Request([3] * 10, 5, tokens=[1] * 5, times=[0.1] * 5)], report)
    spent = sum(call.seconds for call in report.calls)
    assert found["allocating_share"] + found["allocating_hidden_share"] == pytest.approx(
        spent / report.seconds
    )
    assert 0 < found["allocating_hidden_share"] < 1
    assert found["store_calls"]["grow"]["calls"] == 7
    # Three parts of the prompt, the last of which gives the first token.
    assert [found["spans"][kind]["steps"] for kind in ("mixed", "decodes")] == [3, 4]


def test_who_comes_while_the_device_computes_begins_with_the_next_step(model: Model) -> None:
    """The device is busy until all have come."""

    class Waiting(Watched):
        def busy(self) -> bool:
            return self.looking and bool(self.coming)

    asked = [Request([5] * 3, 4), Request([7] * 4, 2, arrival=0.02)]
    report = Waiting(model, Paged(shape(400)), chunk=64).run(asked)
    assert report.prefills == [(3, 3), (4, 4)] and report.steps == 4


def test_memory_is_waited_for_from_the_step_in_which_it_is_refused(model: Model) -> None:
    """Room for one at a time: the second begins in the step after the last of the first one, with what that gave back."""
    store = Noting(shape(12))
    report = Watched(model, store, chunk=64).run([Request([5] * 8, 3), Request([7] * 8, 2)])
    assert report.steps == 5 and not report.preempted
    assert [moment.refused for moment in report.moments] == [True, True, True, False, False]
    assert [moment.active for moment in report.moments] == [1] * 5


def test_a_step_is_planned_beside_the_one_before_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[tuple[list[int], bool]] = []

    class NotingDecode(kernels.ReferenceDecode):
        def plan(self, places: Any, totals: Any) -> None:
            planned.append((totals.tolist(), engine.looking))
            super().plan(places, totals)

    prefills: list[tuple[list[tuple[int, int]], bool]] = []

    class NotingPrefill(kernels.ReferencePrefill):
        def plan(self, places: Any, new: Any, totals: Any) -> None:
            prefills.append((list(zip(new.tolist(), totals.tolist())), engine.looking))
            super().plan(places, new, totals)

    monkeypatch.setitem(kernels.DECODE, "noting", NotingDecode)
    monkeypatch.setitem(kernels.PREFILL, "noting", NotingPrefill)
    engine = Watched(model, Paged(shape(400)), prefill="noting", decode="noting", chunk=8)
    engine.batch(2)
    report = engine.run([Request([5] * 3, 3), Request([7] * 4, 5), Request([9] * 13, 2)])
    # The third prompt's parts are of 1, 6 and 6 tokens beside them; the first one ends after its third token, where a
    # batch for one is not there yet, and the third begins to decode.
    assert report.prefills == [(3, 3), (4, 4), (1, 1), (6, 7), (6, 13)]
    assert planned == [([4, 5], True), ([5, 6], True), ([7, 14], True), ([8], False)]
    assert prefills == [([(3, 3), (4, 4), (1, 1)], False), ([(6, 7)], True), ([(6, 13)], True)]
    # A place is given back beside the next step, the last one's when all is done.
    assert [call.hidden for call in report.calls if call.name == "end"] == [True, True, False]


def by_itself(model: Model, prompt: list[int], answer: int) -> list[int]:
    request = Request(list(prompt), answer)
    Engine(model, Static(shape(2 * 256))).run([request])
    return request.tokens


def test_a_plan_for_four_does_not_serve_the_three_that_are_left(model: Model) -> None:
    """One of four stops by its token, and the others go on in a batch of the same width."""
    prompts = [[7 * at + 3, at + 1, 5] for at in range(4)]
    right = [by_itself(model, prompt, 8) for prompt in prompts]
    at = next(at for at in range(2, 7) if right[0][at] not in right[0][:at])
    asked = [Request(prompt, 8) for prompt in prompts]
    asked[0].stop = right[0][at]
    right[0] = right[0][: at + 1]
    Engine(model, Paged(shape(400))).run(asked)
    assert [request.tokens for request in asked] == right


def test_a_prompts_part_is_planned_anew_where_a_request_stops_early(model: Model) -> None:
    """What the one that stopped would have had of the step, the prompt gets."""
    prompts = [[3, 1, 5], [10, 2, 5], list(range(60))]
    right = [by_itself(model, prompt, 12) for prompt in prompts]
    at = next(at for at in range(3, 12) if right[0][at] not in right[0][:at])
    asked = [Request(prompt, 12) for prompt in prompts]
    asked[0].stop = right[0][at]
    right[0] = right[0][: at + 1]
    report = Engine(model, Paged(shape(400)), chunk=6).run(asked)
    assert {4, 5} < {new for new, _ in report.prefills}
    assert [request.tokens for request in asked] == right


def test_nothing_is_planned_that_has_no_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is let in, and another request has grown into its memory before it is done."""

    class Backed(kernels.ReferencePrefill):
        def plan(self, places: Any, new: Any, totals: Any) -> None:
            assert (totals <= engine.backed[places]).all()
            super().plan(places, new, totals)

    monkeypatch.setitem(kernels.PREFILL, "backed", Backed)
    asked = [Request([4, 9, 2, 7], 12), Request(list(range(30, 50)), 3)]
    right = [by_itself(model, request.prompt, request.answer) for request in asked]
    engine = Engine(model, Paged(shape(27), page_tokens=1), prefill="backed", chunk=5)
    report = engine.run(asked)
    assert report.preempted
    assert [request.tokens for request in asked] == right


def test_what_was_planned_is_computed_whoever_comes_between(model: Model) -> None:
    """The second begins after the first one's plan was made, and is given up in the midst of its prompt."""
    first, second = Request([4, 9, 2, 7], 20), Request(list(range(30, 42)), 3)
    right = [by_itself(model, request.prompt, request.answer) for request in (first, second)]

    class Late(Engine):
        """Lets it in once the look ahead is over."""

        def look_ahead(self, chunk: Any) -> None:
            super().look_ahead(chunk)
            if len(first.tokens) == 7:
                assert self.decodes.work is not None
                self.waiting.append(second)
                self.admit(Chunk(), 1)

        def decode_step(self) -> Any:
            logits = super().decode_step()
            positions = self.batch(len(self.decoding)).buffer.view(3, -1)[1, : len(self.decoding)]
            assert positions.tolist() == self.decoding.kept.tolist()
            return logits

    engine = Late(model, Paged(shape(25), page_tokens=1), chunk=2)
    report = engine.run([first])
    assert report.preempted
    assert [first.tokens, second.tokens] == right


def test_a_plan_is_forgotten_with_the_step_that_it_was_for(model: Model) -> None:
    """The first request stops early, and a step was planned that it does not need. The second one comes to the same place
    and length, in other pages, and memory for that is there too late for a plan ahead."""
    stop = by_itself(model, [4, 9, 2, 7], 2)[1]
    first, second = Request([4, 9, 2, 7], 10, stop=stop), Request([8, 1, 6, 3, 5], 4)
    right = [by_itself(model, request.prompt, request.answer) for request in (first, second)]

    class Blind(Engine):
        ahead = blind = False

        def look_ahead(self, chunk: Any) -> None:
            self.ahead = True
            super().look_ahead(chunk)
            self.ahead = False

        def back(self, places: Any, totals: Any) -> bool:
            return not (self.ahead and self.blind) and super().back(places, totals)

    engine = Blind(model, store := Paged(shape(60), page_tokens=1))
    engine.run([first])
    assert engine.decodes.work is not None and first.tokens == right[0][:2]
    store.scatter()
    engine.blind = True
    engine.run([second])
    assert second.tokens == right[1]


def test_without_prefills_attention_everything_else_is_done(model: Model) -> None:
    """What the limit of a faster kernel is, is measured with it. It copies: a GPU multiplies zeros faster."""
    query = torch.randn(5, 4, 16)
    answer = torch.zeros_like(query)
    kernels.NoPrefill(Paged(shape(100)), 4).run(0, query, answer)
    assert torch.equal(answer, query)
    runs = [Engine(model, Paged(shape(2000)), prefill=kernel).run(requests(6)) for kernel in (None, "none")]
    whole, rest = ((run.steps, run.prefills, run.decodes) for run in runs)
    assert whole == rest


class WrongDecode(kernels.ReferenceDecode):
    """Misses the newest token."""

    def plan(self, places: Any, totals: Any) -> None:
        super().plan(places, (totals - 1).clip(1))


def test_every_kernel_is_checked_over_every_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference kernels on the processor, whose error against themselves is none; a wrong one is found."""
    of = replace(shape(0), budget=64 << 20, longest=4096, most=check.WIDTH)
    for name in ("vattn", "paged:64", "static"):
        choice = replace(Choice.read(name), prefill="reference", decode="reference")
        assert max(check.errors(choice, of, CONFIG.heads).values()) == 0
    monkeypatch.setitem(kernels.DECODE, "wrong", WrongDecode)
    found = check.errors(Choice("paged", decode="wrong"), of, CONFIG.heads)
    assert found["prefill"] == 0 and found["decode"] > check.BOUND
