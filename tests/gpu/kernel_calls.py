"""How each attention kernel is called over a cache, unmodified.

Owns the calls: `CALLS` has one for each kernel, which takes a batch and its queries and answers a function
without arguments that runs the kernel and answers its output, so that it can be captured into a graph. All
planning is done before. Refuses to know what is mapped and what the result should be.

Queries are a list with a tensor `[new token, query head, dim]` for each slot; `split` cuts an output into
the same.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel


class Missing(Exception):
    """The kernel is not installed."""


class Refused(Exception):
    """The kernel says that it does not take these arguments."""


@dataclass
class Batch:
    """One layer's keys and values in every shape that a kernel takes, and how many tokens count."""

    keys: torch.Tensor  # [slot, token, head, dim]
    values: torch.Tensor
    key_pages: torch.Tensor  # [page, token of the page, head, dim]
    value_pages: torch.Tensor
    key_row: torch.Tensor  # [token, head, dim]
    value_row: torch.Tensor
    stride_tokens: int
    pages_per_slot: int
    lengths: list

    @property
    def same_length(self):
        return len(set(self.lengths)) == 1


def int32(numbers, device="cuda"):
    return torch.tensor(list(numbers), dtype=torch.int32, device=device)


def starts(counts):
    """Where each of some pieces starts in all of them together, and where the last ends."""
    return [0, *accumulate(counts)]


def split(output, queries):
    """An output of any of these kernels as a list like the queries'."""
    if isinstance(output, list):
        return output
    flat = output.reshape(-1, *output.shape[-2:])
    return list(flat.split([query.shape[0] for query in queries]))


def exact_views(batch, queries):
    """For each slot, or for all of them if they are alike, the queries and an exact `[:, :length]` view of
    keys and values."""
    if batch.same_length and len({query.shape[0] for query in queries}) == 1:
        length = batch.lengths[0]
        return [(torch.stack(queries), batch.keys[:, :length], batch.values[:, :length])]
    return [(query[None], batch.keys[slot:slot + 1, :length], batch.values[slot:slot + 1, :length])
            for slot, (query, length) in enumerate(zip(queries, batch.lengths))]


def over_exact_views(attend):
    """A kernel that takes plain tensors `[batch, token, head, dim]`."""

    def prepare(batch, queries, causal):
        calls = exact_views(batch, queries)
        if len(calls) == 1:
            return lambda: attend(*calls[0], causal)
        return lambda: [attend(*call, causal)[0] for call in calls]

    return prepare


def torch_varlen(batch, queries, causal):
    """PyTorch's FlashAttention over one packed row of tokens, in which each slot starts at its stride."""
    flat = torch.cat(queries)
    counts = [query.shape[0] for query in queries]
    query_starts = int32(starts(counts))
    key_starts = int32(slot * batch.stride_tokens for slot in range(len(queries) + 1))
    used, most = int32(batch.lengths), max(batch.lengths)

    def run():
        return torch.ops.aten._flash_attention_forward(
            flat, batch.key_row, batch.value_row, query_starts, key_starts, max(counts), most, 0.0, causal, False,
            seqused_k=used)[0]

    return run


def sdpa(backend, groups=False):
    """SDPA with one back end. `groups` calls it once for each query head of a KV head's group, for the one
    that takes no grouped heads: its keys and values are views all the same."""

    def attend(query, keys, values, causal):
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        heads = keys.shape[1]
        group = query.shape[2] // heads
        with sdpa_kernel(backend):
            try:
                if not groups:
                    out = functional.scaled_dot_product_attention(
                        query.transpose(1, 2), keys, values, is_causal=causal, enable_gqa=group > 1)
                    return out.transpose(1, 2)
                parts = [functional.scaled_dot_product_attention(
                    query[:, :, of::group].transpose(1, 2), keys, values, is_causal=causal).transpose(1, 2)
                    for of in range(group)]
            except RuntimeError as error:
                if "No available kernel" in str(error) or "not supported" in str(error):
                    raise Refused(str(error).splitlines()[0]) from error
                raise
        return torch.stack(parts, 3).flatten(2, 3)

    return over_exact_views(attend)


def fa3():
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except (ImportError, OSError) as error:
        raise Missing(f"fa3-fwd: {error}") from error
    return flash_attn_with_kvcache


def fa3_exact(batch, queries, causal):
    """FlashAttention-3 over each slot's exact view: no lengths are given."""
    attend = fa3()
    return over_exact_views(lambda query, keys, values, causal: attend(query, keys, values, causal=causal))(
        batch, queries, causal)


def fa3_batch(splits=0):
    """FlashAttention-3 over the whole tensor `[slot, token, head, dim]`, lengths given."""

    def prepare(batch, queries, causal):
        attend, stacked, lengths = fa3(), torch.stack(queries), int32(batch.lengths)
        return lambda: attend(stacked, batch.keys, batch.values, cache_seqlens=lengths, causal=causal,
                              num_splits=splits)

    return prepare


_workspaces = []


def workspace():
    if not _workspaces:
        _workspaces.append(torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"))
    return _workspaces[0]


def page_table(batch):
    """The identity page table: page i of slot s is s * pages_per_slot + i."""
    size = batch.key_pages.shape[1]
    counts = [math.ceil(length / size) for length in batch.lengths]
    pages = [slot * batch.pages_per_slot + page for slot, count in enumerate(counts) for page in range(count)]
    last = [(length - 1) % size + 1 for length in batch.lengths]
    return int32(starts(counts), "cpu"), int32(pages), int32(last, "cpu"), size


def flashinfer_module():
    try:
        import flashinfer
    except ImportError as error:
        raise Missing(f"flashinfer-python: {error}") from error
    return flashinfer


def flashinfer_decode(tensor_cores):
    """FlashInfer's paged decode."""

    def prepare(batch, queries, causal):
        wrapper = flashinfer_module().BatchDecodeWithPagedKVCacheWrapper(
            workspace(), "NHD", use_tensor_cores=tensor_cores)
        flat = torch.cat(queries)
        indptr, pages, last, size = page_table(batch)
        wrapper.plan(indptr, pages, last, flat.shape[1], batch.keys.shape[2], flat.shape[2], size,
                     q_data_type=flat.dtype, kv_data_type=batch.keys.dtype)
        return lambda: wrapper.run(flat, (batch.key_pages, batch.value_pages))

    return prepare


def flashinfer_prefill(backend):
    """FlashInfer's paged prefill."""

    def prepare(batch, queries, causal):
        wrapper = flashinfer_module().BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=backend)
        flat = torch.cat(queries)
        indptr, pages, last, size = page_table(batch)
        wrapper.plan(int32(starts(query.shape[0] for query in queries)), indptr.cuda(), pages, last.cuda(),
                     flat.shape[1], batch.keys.shape[2], flat.shape[2], size, causal=causal, q_data_type=flat.dtype,
                     kv_data_type=batch.keys.dtype)
        return lambda: wrapper.run(flat, (batch.key_pages, batch.value_pages))

    return prepare


CALLS = {
    "torch-varlen": torch_varlen,
    "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION, groups=True),
    "sdpa-math": sdpa(SDPBackend.MATH),
    "fa3-exact": fa3_exact,
    "fa3-batch": fa3_batch(),
    "fa3-batch-1": fa3_batch(1),
    "fa3-batch-4": fa3_batch(4),
    "flashinfer-decode": flashinfer_decode(False),
    "flashinfer-decode-tc": flashinfer_decode(True),
    "flashinfer-prefill-fa2": flashinfer_prefill("fa2"),
    "flashinfer-prefill-fa3": flashinfer_prefill("fa3"),
}


def reference(query, keys, values, causal):
    """Attention in float32. The last query sees the last key."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(group, 1) for part in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) / math.sqrt(query.shape[2])
    if causal:
        new, length = query.shape[0], keys.shape[0]
        at = torch.arange(length, device=keys.device)
        scores.masked_fill_(at > length - new + torch.arange(new, device=keys.device)[:, None], -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
