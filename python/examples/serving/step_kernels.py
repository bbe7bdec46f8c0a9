"""What the device does while a trace is served: its kernels by name, as PyTorch's profiler saw them.

    python step_kernels.py --trace azure_llm_2023_conv.csv --skip 1000 --limit 60 --load 3.125 --answers 16 \
        --stores vattn:256:fa3:flashinfer,paged:256:flashinfer:flashinfer

With short answers most steps have parts of prompts in them. Times of steps are from a run without the profiler. Without
a GPU, `--tiny` lists PyTorch's operations on the processor: it shows that this works.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

import torch
from bench import Server, fresh, make_model, parsed, parser, positive, requests_of, shape_of
from choices import Choice
from engine import Request
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernels(server: Server, requests: list[Request]) -> list[tuple[str, int, float]]:
    """What ran while the requests were served: names, how often, and milliseconds in all; the longest first."""
    on_card = server.store.shape.device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU], acc_events=True
    ) as seen:
        server.run(requests)
        if on_card:
            torch.cuda.synchronize()
    found = [
        (each.key, each.count, (each.self_device_time_total if on_card else each.self_cpu_time_total) / 1e3)
        for each in seen.key_averages()
        if not on_card or each.device_type == DeviceType.CUDA
    ]
    return sorted(found, key=lambda entry: -entry[2])


def main(arguments: list[str] | None = None) -> int:
    """Serves the trace with each of the stores, and prints a table for each."""
    made = parser(__doc__)
    made.add_argument("--answers", type=positive, default=16, help="the most tokens of an answer")
    made.add_argument("--top", type=positive, default=20, help="how many kernels are listed")
    options = parsed(made, arguments)
    model = make_model(options)
    requests = [
        replace(each, answer=min(each.answer, options.answers)) for each in requests_of(model, options)
    ]
    with torch.inference_mode():
        for text in options.stores.split(","):
            server = Server(
                model, shape_of(model, options), Choice.read(text, options.layout), chunk=options.chunk
            )
            try:
                server.warm(requests[: options.warm_up])
                server.run(fresh(requests))
                report = server.run(fresh(requests))
                mixed = [1e3 * (span.launching + span.computing) for span in report.spans if span.mixed]
                print(f"{text}: {len(mixed)} steps with {len(report.prefills)} parts of prompts,", end=" ")
                print(f"{statistics.mean(mixed):.2f} ms each in the mean; of all {len(report.spans)} steps:")
                for name, count, spent in kernels(server, fresh(requests))[: options.top]:
                    print(f"{spent:10.2f} ms {count:8} calls {1e3 * spent / count:9.1f} us  {name[:100]}")
            finally:
                server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
