"""Continuous batching: which requests are worked on in each step, and the step itself.

Each step takes every request whose prompt is done by one token, and fills up with prompts in chunks until
`chunk` tokens are reached. A step of decodes alone is replayed from one CUDA graph, one with prompts from several (see
passes.py). While the device computes a step, the host sees to the memory of the next one, plans it, and lets in who comes
meanwhile. A request that can't grow is helped by ending the youngest one, which is computed anew later
(preemption by recompute).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, TypeVar

import numpy
import torch
from kernels import PREFILL, names
from model import Model
from passes import WIDTHS, Batch, Mixed, Room, wide
from sampling import Sampling, sample
from store import Store

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class Request:
    """A prompt, and how it is to be answered."""

    prompt: list[int]
    answer: int
    """The most tokens of the answer."""
    arrival: float = 0.0
    """Seconds after the start of the run."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: int | None = None
    """The token that ends an answer early."""
    forced: list[int] | None = None
    """Tokens that the answer is to have, whatever the model says: to look at its logits on the way."""
    on_token: Callable[[int], None] | None = None
    """Is told each token as soon as it is there."""

    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    times: list[float] = field(default_factory=list)
    """When each of its tokens was there, in seconds after the start of the run."""
    place: int = -1
    """Where the store keeps it."""
    kept: int = 0
    """While its prompt is computed: how many of its tokens have keys and values."""

    @property
    def total(self) -> int:
        """Its tokens in all: the prompt's and the answer's."""
        return len(self.prompt) + len(self.tokens)

    @property
    def most(self) -> int:
        """Its tokens in all once its answer is as long as it may become."""
        return len(self.prompt) + self.answer

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.answer or bool(self.tokens) and self.tokens[-1] == self.stop

    def part(self, start: int, stop: int) -> list[int]:
        """Its tokens from `start` to `stop`."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.tokens[max(start - split, 0) : stop - split]


class Decoding:
    """The requests that get a token a step, in the order in which they came to it, and their numbers as arrays."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.places = self.kept = self.most = numpy.empty(0, numpy.int64)

    def replace(self, requests: list[Request]) -> None:
        """These from now on."""
        self.requests = requests
        self.places = numpy.array([request.place for request in requests], numpy.int64)
        # The last token has no keys and values yet.
        self.kept = numpy.array([request.total - 1 for request in requests], numpy.int64)
        self.most = numpy.array([request.most for request in requests], numpy.int64)

    def __len__(self) -> int:
        return len(self.requests)


class Foresight:
    """A kernel's plan, made while the step before is computed, of what the next one seems to be for. Places and lengths
    say all: no place changes hands between a step and the plan for it."""

    def __init__(self) -> None:
        self.work: tuple[numpy.ndarray, ...] | None = None

    def ahead(self, plan: Callable[..., None], *work: numpy.ndarray) -> None:
        """The next step, it seems, will be for this."""
        plan(*work)
        self.work = work

    def now(self, plan: Callable[..., None], *work: numpy.ndarray) -> None:
        """This step is for this. Where it was foreseen, nothing is left to do."""
        foreseen, self.work = self.work, None
        if foreseen is None or not all(map(numpy.array_equal, foreseen, work)):
            plan(*work)


@dataclass
class Chunk:
    """Parts of prompts that a step computes, a request each."""

    requests: list[Request] = field(default_factory=list)
    new: list[int] = field(default_factory=list)

    def add(self, request: Request, new: int) -> None:
        """One more."""
        self.requests.append(request)
        self.new.append(new)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def places(self) -> numpy.ndarray:
        return numpy.array([request.place for request in self.requests], numpy.int64)

    @property
    def totals(self) -> numpy.ndarray:
        """How many tokens of each have keys and values afterwards."""
        return numpy.array([request.kept + new for request, new in zip(self.requests, self.new)], numpy.int64)

    def work(self, kept: dict[Request, int]) -> tuple[numpy.ndarray, ...]:
        """What a prefill is planned for: places, new tokens, and totals. `kept` says of which requests more is kept by
        then than now."""
        totals = self.totals
        before = [kept.get(request, request.kept) for request in self.requests]
        return self.places, totals - numpy.array(before, numpy.int64), totals


class Moment(NamedTuple):
    """How things stood."""

    at: float
    """Seconds after the start of the run."""
    active: int
    """Requests that had memory in it."""
    refused: bool
    """Whether another one waited for memory in it."""
    held: int
    """Bytes that the store holds."""


class Span(NamedTuple):
    """Where a step's time went."""

    mixed: bool
    """Whether parts of prompts were computed beside decodes."""
    launching: float
    """Seconds until all of it was launched."""
    computing: float
    """Seconds from then on until its tokens were there: little where the host is the limit."""


class Call(NamedTuple):
    """One of the store's calls."""

    name: str
    seconds: float
    hidden: bool
    """Whether the device was still computing when it ended."""


@dataclass
class Report:
    """What a run came to."""

    seconds: float = 0.0
    steps: int = 0
    graphed: int = 0
    """Steps of decodes alone that were replayed from a graph."""
    preempted: int = 0
    calls: list[Call] = field(default_factory=list)
    """The store's: admission, growth, release."""
    moments: list[Moment] = field(default_factory=list)
    """After each step."""
    spans: list[Span] = field(default_factory=list)
    """Of each step."""
    prefills: list[tuple[int, int]] = field(default_factory=list)
    """Each part of a prompt that was computed: how many tokens, and how many the request then held."""
    decodes: list[tuple[int, int]] = field(default_factory=list)
    """Each step's decodes: of how many requests, which then held how many tokens together."""


class Engine:
    """A model, a store, and the requests that are under way."""

    def __init__(
        self,
        model: Model,
        store: Store,
        *,
        prefill: str | None = None,
        decode: str | None = None,
        chunk: int = 2048,
        graphs: bool = True,
        on_logits: Callable[[list[Request], torch.Tensor], None] | None = None,
    ) -> None:
        """`chunk` is up to how many tokens prompts fill a step beside its decodes, which all take part. `on_logits` is
        shown each step's logits, a row a request, before tokens are chosen."""
        self.model, self.store, self.chunk = model, store, chunk
        self.prefill_name, self.decode_name = names(store, prefill, decode)
        self.prefill = PREFILL[self.prefill_name](store, model.config.heads)
        self.graphs = graphs and store.shape.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self.room = Room(model, max(Mixed.needed(chunk), wide(store.shape.most)))
        self.mixed = Mixed(model, store, chunk, self.room, self.pool)
        self.on_logits = on_logits
        self.batches: dict[int, Batch] = {}
        self.waiting: deque[Request] = deque()
        #: All that have a place, the youngest last.
        self.running: list[Request] = []
        #: Those of them whose prompt is not done yet; and the others.
        self.filling: list[Request] = []
        self.decoding = Decoding()
        #: Places whose requests are over, which the store has not been told yet.
        self.ended: list[int] = []
        #: By place, for how many tokens there is memory.
        self.backed = numpy.zeros(store.shape.most, numpy.int64)
        #: Those that will arrive, in order.
        self.coming: deque[Request] = deque()
        self.launched = torch.cuda.Event() if store.shape.device.type == "cuda" else None
        #: What the device has to reach, while the host does something beside it.
        self.computing: torch.cuda.Event | None = None
        self.prefills, self.decodes = Foresight(), Foresight()
        #: Whether a request waits for memory.
        self.refused = False
        #: Whether one was ended in this step, for those that go on.
        self.preempted = False
        self.report = Report()

    def prepare(self) -> None:
        """Captures all passes that may be needed, the widest first: later ones then share its memory."""
        self.mixed.prepare()
        for width in reversed([width for width in WIDTHS if width <= wide(self.store.shape.most)]):
            self.batch(width)

    def run(self, requests: list[Request]) -> Report:
        """Serves all of them, each from its arrival on."""
        self.report = report = Report()
        self.coming = deque(sorted(requests, key=lambda request: request.arrival))
        self.began = time.perf_counter()
        while self.coming or self.waiting or self.running:
            self.arrive()
            if self.waiting or self.running:
                self.step()
            else:
                time.sleep(max(0.0, self.coming[0].arrival - self.now()))
        self.release()
        report.seconds = self.now()
        return report

    def now(self) -> float:
        return time.perf_counter() - self.began

    def arrive(self) -> None:
        """Those wait whose time has come."""
        now = self.now()
        while self.coming and self.coming[0].arrival <= now:
            self.waiting.append(self.coming.popleft())

    def step(self) -> None:
        """One iteration."""
        self.preempted = False
        began = self.now()
        chunk = self.choose()
        report, decoding, active, refused = self.report, self.decoding, len(self.running), self.refused
        report.steps += 1
        if decoding:
            report.decodes.append((len(decoding), int(decoding.kept.sum()) + len(decoding)))
        if chunk:
            report.prefills += zip(chunk.new, chunk.totals.tolist())
        logits = self.mixed_step(chunk) if chunk else self.decode_step()
        finished = [
            request for request, new in zip(chunk.requests, chunk.new) if request.kept + new == request.total
        ]
        asked = decoding.requests + finished
        if self.on_logits:
            self.on_logits(asked, logits)
        chosen = sample(logits, [request.sampling for request in asked])
        launched = self.now()
        self.look_ahead(chunk)
        tokens = chosen.tolist()
        now = self.now()
        report.spans.append(Span(bool(chunk), launched - began, now - launched))
        decoding.kept += 1
        for request, new in zip(chunk.requests, chunk.new):
            request.kept += new
        over = []
        for request, token in zip(asked, tokens):
            if request.forced:
                token = request.forced[len(request.tokens)]
            request.tokens.append(token)
            request.times.append(now)
            if request.on_token:
                request.on_token(token)
            if request.done:
                over.append(request)
        for request in over:
            self.running.remove(request)
            self.ended.append(request.place)
            request.place = -1
        if finished or over:
            self.filling = [request for request in self.filling if request not in finished]
            decoding.replace([request for request in asked if request.place >= 0])
        report.moments.append(Moment(now, active, refused, self.store.held()))

    def timed(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """A call of the store's, its time counted."""
        began = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            took = time.perf_counter() - began
            self.report.calls.append(Call(call.__name__, took, self.busy()))

    def busy(self) -> bool:
        """Whether the device is still computing the step beside which the host does something."""
        return self.computing is not None and not self.computing.query()

    def choose(self) -> Chunk:
        """Which parts of prompts are computed beside the decodes; memory is there for all of it afterwards."""
        decoding = self.decoding
        while True:
            chunk, left = self.parts(self.chunk - len(decoding), {})
            if self.back(decoding.places, decoding.kept + 1) and self.back(chunk.places, chunk.totals):
                break
            if not self.release():
                self.preempt()
        if not chunk and not decoding:
            # Requests begin here when nobody else is there, and else while the device computes.
            self.refused = False
            self.admit(chunk, left)
            if not chunk:
                raise MemoryError(
                    f"a request of {self.waiting[0].total} tokens does not fit into an empty cache; raise the budget"
                )
        return chunk

    def parts(self, left: int, kept: dict[Request, int]) -> tuple[Chunk, int]:
        """The next parts of the prompts under way that fit into so many tokens, and how many are left then. `kept` says
        of which requests more is kept by then than now."""
        chunk, left = Chunk(), max(left, 0)
        for request in self.filling:
            already = kept.get(request, request.kept)
            if new := min(request.total - already, left):
                chunk.add(request, already - request.kept + new)
                left -= new
        return chunk, left

    def admit(self, chunk: Chunk, left: int) -> int:
        """Lets requests begin while memory and so many tokens of a step are left, with their first parts in `chunk`.
        Returns how many are left then."""
        while self.waiting and left > 0 and len(self.running) < self.store.shape.most:
            request = self.waiting[0]
            # It starts with memory for all of its prompt. So had those before it, whose prompts end in this chunk:
            # where one does not, nothing is left of the chunk.
            if not self.timed(self.store.admits, [request.total]):
                if self.release():
                    continue
                self.refused = True
                break
            self.waiting.popleft()
            request.place = self.timed(self.store.begin, request.total)
            self.backed[request.place] = 0
            self.running.append(request)
            self.filling.append(request)
            one = Chunk([request], [min(request.total, left)])
            if not self.back(one.places, one.totals):
                self.refused = True
                self.put_back()
                break
            chunk.add(request, one.new[0])
            left -= one.new[0]
        return left

    def back(self, places: numpy.ndarray, totals: numpy.ndarray) -> bool:
        """Memory for so many tokens of each; or there is not enough, and nothing has changed. The store is asked about
        those for which that was not seen to ahead."""
        lacking = totals > self.backed[places]
        if not lacking.any():
            return True
        places, totals = places[lacking], totals[lacking]
        if not self.timed(self.store.grow, places, totals):
            return False
        self.backed[places] = totals
        return True

    def release(self) -> bool:
        """Tells the store who is over. Whether anybody was."""
        ended, self.ended = self.ended, []
        for place in ended:
            self.timed(self.store.end, place)
        return bool(ended)

    def look_ahead(self, chunk: Chunk) -> None:
        """What the next step needs, while the device computes this one: memory for one more token of those that go on,
        for the next parts of prompts, and for the first ones of requests that come; and its kernels' plans. What is
        refused here the next step asks for again."""
        if self.launched:
            self.launched.record()
            self.computing = self.launched
        self.release()
        decoding, kept = self.decoding, dict(zip(chunk.requests, chunk.totals.tolist()))
        # One token less than they have after this step, and one more with the next.
        on = decoding.kept + 2 < decoding.most
        begun = Chunk()
        for request, total in kept.items():
            if request.total == total < request.most - 1:
                begun.add(request, total + 1 - request.kept)
        parts, left = self.parts(self.chunk - int(on.sum()) - len(begun), kept)
        backed = (
            self.back(decoding.places[on], decoding.kept[on] + 2)
            and self.back(begun.places, begun.totals)
            and self.back(parts.places, parts.totals)
        )
        if not self.preempted:
            # What was given up is for those that go on; the request would only be ended again.
            self.refused = not backed and bool(self.waiting)
            left = self.admit(parts, left) if backed else 0
        self.decodes.work = self.prefills.work = None
        # Whoever goes on has the place in the batch that the next step will give it.
        places = numpy.concatenate((decoding.places[on], begun.places))
        batch = self.batches.get(wide(len(places))) if len(places) and backed else None
        if batch and batch.ready:
            self.decodes.ahead(
                batch.plan, places, numpy.concatenate((decoding.kept[on] + 1, begun.totals - 1))
            )
        if parts and backed:
            # Once: a second plan would wait until the device has copied the first one, after all that it computes now.
            self.prefills.ahead(self.prefill.plan, *parts.work(kept))
        while self.coming and left > 0 and not self.refused and self.busy():
            self.arrive()
            left = self.admit(parts, left)
        self.computing = None

    def preempt(self) -> None:
        """Ends the youngest request for now."""
        if len(self.running) == 1:
            raise MemoryError(
                f"one request of {self.running[0].total} tokens does not fit into the cache; raise the budget"
            )
        self.report.preempted += 1
        self.preempted = self.refused = True
        self.put_back()

    def put_back(self) -> None:
        """The youngest request waits again, without memory."""
        request = self.running.pop()
        self.timed(self.store.end, request.place)
        request.place, request.kept = -1, 0
        self.waiting.appendleft(request)
        if request in self.filling:
            self.filling.remove(request)
        else:
            self.decoding.replace([other for other in self.decoding.requests if other is not request])

    def decode_step(self) -> torch.Tensor:
        """Logits of one more token for each request that decodes."""
        batch, decoding = self.batch(len(self.decoding)), self.decoding
        self.decodes.now(batch.plan, decoding.places, decoding.kept)
        batch.fill([request.tokens[-1] for request in decoding.requests])
        self.report.graphed += batch.graph is not None
        return batch.run()[: len(self.decoding)]

    def mixed_step(self, chunk: Chunk) -> torch.Tensor:
        """The same, and of each request whose prompt this chunk ends."""
        decoding, room, work = self.decoding, self.room, chunk.work({})
        decodes, new = len(decoding), sum(chunk.new)
        self.prefills.now(self.prefill.plan, *work)
        # The decodes' tokens come last: the batch's padding is behind them, in rows that are nobody's.
        asked, parts, at = list(range(new, new + decodes)), [], 0
        for request, count, end in zip(chunk.requests, chunk.new, work[-1].tolist()):
            positions = numpy.arange(request.kept, end)
            rows = self.store.rows(request.place, positions)
            parts.append(numpy.stack((numpy.array(request.part(request.kept, end)), positions, rows)))
            at += count
            if end == request.total:
                asked.append(at - 1)
        batch = self.batch(decodes, captured=False) if decodes else None
        if batch:
            self.decodes.now(batch.plan, decoding.places, decoding.kept)
            last = numpy.array([request.tokens[-1] for request in decoding.requests])
            parts.append(numpy.stack((last, decoding.kept, self.store.rows(decoding.places, decoding.kept))))
        prompts, others = slice(new), slice(new, new + (batch.width if batch else 0))
        query, answer = room.query[prompts], room.attended[prompts]
        queries, answers = room.query[others], room.attended[others]

        def attend(layer: int) -> None:
            self.prefill.run(layer, query, answer)
            if batch:
                batch.kernel.run(layer, queries, answers)

        return self.mixed.run(numpy.concatenate(parts, axis=1), asked, attend)

    def batch(self, count: int, captured: bool = True) -> Batch:
        """The smallest batch that takes so many requests, captured when it is first needed."""
        width = wide(count)
        if width not in self.batches:
            self.batches[width] = Batch(self.model, self.store, self.decode_name, width, self.room)
        batch = self.batches[width]
        if captured and self.graphs and batch.graph is None:
            batch.capture(self.pool)
        return batch
