"""Continuous batching: which requests are worked on in each step, and the step itself.

Each step takes every request whose prompt is done by one token, and fills up with prompts in chunks until
`chunk` tokens are reached. A step of decodes alone is replayed from a CUDA graph. A request that can't grow is
helped by ending the youngest one, which is computed anew later (preemption by recompute).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
import torch
from kernels import DECODE, PREFILL
from model import Model
from sampling import Sampling, sample
from store import Handle, Store


@dataclass
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
    on_token: Callable[[int], None] | None = None
    """Is told each token as soon as it is there."""

    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    times: list[float] = field(default_factory=list)
    """When each of its tokens was there, in seconds after the start of the run."""
    preempted: int = 0
    handle: Handle = None
    kept: int = 0
    """How many of its tokens have keys and values in the store."""

    @property
    def total(self) -> int:
        """Its tokens in all: the prompt's and the answer's."""
        return len(self.prompt) + len(self.tokens)

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.answer or bool(self.tokens) and self.tokens[-1] == self.stop

    def token(self, start: int, stop: int) -> list[int]:
        """Its tokens from `start` to `stop`."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.tokens[max(start - split, 0) : stop - split]


@dataclass
class Report:
    """What a run came to."""

    seconds: float = 0.0
    steps: int = 0
    graphed: int = 0
    """Steps that were replayed from a graph."""
    preempted: int = 0
    allocating: float = 0.0
    """Seconds in the store's calls: admission, growth, release."""
    active: list[tuple[float, int, int]] = field(default_factory=list)
    """After each step: when, how many requests have memory, and how many bytes the store holds."""


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
    ) -> None:
        self.model, self.store, self.chunk = model, store, chunk
        on_card = store.shape.device.type == "cuda"
        self.prefill_name = prefill or (store.prefill if on_card else "reference")
        self.decode_name = decode or (store.decode if on_card else "reference")
        self.prefill = PREFILL[self.prefill_name](store, model.config.heads)
        self.graphs = graphs and on_card
        self.batches: dict[int, Batch] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.report = Report()

    def run(self, requests: list[Request]) -> Report:
        """Serves all of them, each from its arrival on."""
        self.report = report = Report()
        coming = deque(sorted(requests, key=lambda request: request.arrival))
        self.began = time.perf_counter()
        while coming or self.waiting or self.running:
            now = self.now()
            while coming and coming[0].arrival <= now:
                self.waiting.append(coming.popleft())
            if not self.waiting and not self.running:
                time.sleep(max(0.0, coming[0].arrival - now))
                continue
            self.step()
            report.active.append((self.now(), len(self.running), self.store.held()))
        report.seconds = self.now()
        return report

    def now(self) -> float:
        return time.perf_counter() - self.began

    def step(self) -> None:
        """One iteration."""
        began = time.perf_counter()
        decodes, prefills = self.choose()
        self.report.allocating += time.perf_counter() - began
        self.report.steps += 1
        if not prefills:
            tokens = self.decode_step(decodes)
        else:
            tokens = self.mixed_step(decodes, prefills)
        now = self.now()
        asked = decodes + [request for request, new in prefills if request.kept + new == request.total]
        for request in decodes:
            request.kept += 1
        for request, new in prefills:
            request.kept += new
        for request, token in zip(asked, tokens):
            request.tokens.append(token)
            request.times.append(now)
            if request.on_token:
                request.on_token(token)
        began = time.perf_counter()
        for request in [request for request in asked if request.done]:
            self.running.remove(request)
            self.store.end(request.handle)
            request.handle = None
        self.report.allocating += time.perf_counter() - began

    def choose(self) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Which requests are decoded, and which get how many tokens of their prompt; memory is there for all."""
        while True:
            decodes = [
                request for request in self.running if request.kept + 1 == request.total and request.tokens
            ]
            left = self.chunk - len(decodes)
            prefills = []
            for request in self.running:
                new = min(request.total - request.kept, left)
                if request not in decodes and new > 0:
                    prefills.append((request, new))
                    left -= new
            wanted = [(request.handle, request.kept + 1) for request in decodes]
            wanted += [(request.handle, request.kept + new) for request, new in prefills]
            if all(self.store.fits(wanted)):
                break
            self.preempt()
        while self.waiting and left > 0 and len(self.running) < self.store.shape.most:
            request = self.waiting[0]
            # Those that run may need memory of their own for a while yet: a request starts with all of its prompt.
            unfinished = [other.total - other.kept for other in self.running if other.kept < other.total - 1]
            if self.store.admits([*unfinished, request.total]) <= len(unfinished):
                break
            self.waiting.popleft()
            request.handle = self.store.begin(request.total)
            self.running.append(request)
            new = min(request.total, left)
            entry = (request.handle, new)
            if not all(self.store.fits([*wanted, entry])):
                self.put_back(self.running.pop())
                break
            prefills.append((request, new))
            wanted.append(entry)
            left -= new
        if not wanted:
            raise MemoryError(
                f"a request of {self.waiting[0].total} tokens does not fit into an empty cache; raise the budget"
            )
        self.store.grow(wanted)
        return decodes, prefills

    def preempt(self) -> None:
        """Ends the youngest request for now."""
        if len(self.running) == 1:
            raise MemoryError(
                f"one request of {self.running[0].total} tokens does not fit into the cache; raise the budget"
            )
        request = self.running.pop()
        request.preempted += 1
        self.report.preempted += 1
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        self.store.end(request.handle)
        request.handle, request.kept = None, 0
        self.waiting.appendleft(request)

    def decode_step(self, decodes: list[Request]) -> list[int]:
        """One token for each request."""
        batch = self.batch(len(decodes))
        batch.fill(decodes)
        self.report.graphed += batch.graph is not None
        return sample(batch.forward()[: len(decodes)], [request.sampling for request in decodes])

    def mixed_step(self, decodes: list[Request], prefills: list[tuple[Request, int]]) -> list[int]:
        """One token for each of some, and a part of the prompt of others."""
        batch = self.batch(len(decodes), captured=False) if decodes else None
        if batch:
            batch.fill(decodes)
        news = [new for _, new in prefills]
        ends = [request.kept + new for request, new in prefills]
        self.prefill.plan([request.handle for request, _ in prefills], news, ends)
        count = len(decodes)
        tokens = [request.tokens[-1] for request in decodes]
        positions = [numpy.array([request.kept for request in decodes], dtype=numpy.int64)]
        rows = [self.store.rows(request.handle, request.kept, request.kept + 1) for request in decodes]
        asked, at = list(range(count)), count
        for (request, new), end in zip(prefills, ends):
            tokens += request.token(request.kept, end)
            positions.append(numpy.arange(request.kept, end, dtype=numpy.int64))
            rows.append(self.store.rows(request.handle, request.kept, end))
            at += new
            if end == request.total:
                asked.append(at - 1)
        device = self.model.device
        where = torch.from_numpy(numpy.concatenate(rows)).to(device)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            self.store.keys[layer].index_copy_(0, where, key)
            self.store.values[layer].index_copy_(0, where, value)
            after = self.prefill.run(layer, query[count:])
            if not batch:
                return after
            padded = torch.nn.functional.pad(query[:count], (0, 0, 0, 0, 0, batch.width - count))
            return torch.cat((batch.kernel.run(layer, padded)[:count], after))

        logits = self.model.forward(
            torch.tensor(tokens, device=device),
            torch.from_numpy(numpy.concatenate(positions)).to(device),
            torch.tensor(asked, dtype=torch.int64, device=device),
            attend,
        )
        samplings = [request.sampling for request in decodes]
        samplings += [request.sampling for (request, _), end in zip(prefills, ends) if end == request.total]
        return sample(logits, samplings)

    def batch(self, count: int, captured: bool = True) -> Batch:
        """The smallest batch that takes so many requests, captured when it is first needed."""
        width = next(width for width in WIDTHS if width >= count)
        if width not in self.batches:
            self.batches[width] = Batch(self.model, self.store, self.decode_name, width)
        batch = self.batches[width]
        if captured and self.graphs and batch.graph is None:
            batch.capture()
        return batch


WIDTHS = [1, 2, 4, 8, *range(16, 1025, 16)]
"""How many requests the captured batches take."""


class Batch:
    """Decoding for a fixed number of requests, from buffers that stay where they are."""

    def __init__(self, model: Model, store: Store, decode: str, width: int) -> None:
        self.model, self.store, self.width = model, store, width
        self.kernel = DECODE[decode](store, model.config.heads, width)
        self.host = torch.zeros(3, width, dtype=torch.int64, pin_memory=store.shape.device.type == "cuda")
        self.buffer = torch.zeros(3, width, dtype=torch.int64, device=store.shape.device)
        self.tokens, self.positions, self.rows = self.buffer
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, requests: list[Request]) -> None:
        """The next pass is for these."""
        count = len(requests)
        numbers = self.host.numpy()
        numbers[:, count:] = [[0], [0], [self.store.spare_row]]
        for at, request in enumerate(requests):
            numbers[0, at] = request.tokens[-1]
            numbers[1, at] = request.kept
            numbers[2, at] = self.store.rows(request.handle, request.kept, request.kept + 1)[0]
        self.buffer.copy_(self.host, non_blocking=True)
        self.kernel.plan([request.handle for request in requests], [request.kept + 1 for request in requests])

    def forward(self) -> torch.Tensor:
        """Logits `[width, vocab]`."""
        if self.graph is None:
            return self.compute()
        self.graph.replay()
        return self.logits

    def compute(self) -> torch.Tensor:
        return self.model.forward(self.tokens, self.positions, None, self.attend)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.store.keys[layer].index_copy_(0, self.rows, key)
        self.store.values[layer].index_copy_(0, self.rows, value)
        return self.kernel.run(layer, query)

    def capture(self) -> None:
        """Records a pass into a graph. All entries are padding meanwhile."""
        self.fill([])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.compute()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.compute()
