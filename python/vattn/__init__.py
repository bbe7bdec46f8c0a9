"""A KV cache for LLM servers: contiguous in virtual memory, backed by physical memory on demand.

    import vattn

    model = vattn.Geometry.preset("llama-3-8b")
    with vattn.KvCache(model, vattn.HostDriver("1GiB"), max_slots=64) as cache:
        slot = cache.acquire(1000)
        cache.step([(slot, 1000)])                  # the prompt is backed
        keys = cache.view(slot, layer=0)            # [token, head, dim]: torch.from_dlpack(keys)
        cache.retire(slot, vattn.IDLE)

Sizes are in bytes, lengths in tokens, strides in elements. The GIL is released in every call.
"""

from vattn.buffer import Buffer
from vattn.cache import KvCache, Options, plan
from vattn.catalog import Kernel, Latent, Preset, Tile, kernels, presets
from vattn.drivers import CheckedDriver, CudaDriver, Driver, HostDriver, LedgerDriver
from vattn.errors import (
    CapturingStream,
    DeviceLost,
    DriverError,
    DuplicateSlot,
    Error,
    FewerTokens,
    ForeignSlot,
    Forked,
    InCallback,
    InternalError,
    InvalidArgument,
    InvalidConfig,
    InvalidGeometry,
    InvalidHandle,
    NoFreeSlot,
    OutOfAddressSpace,
    OutOfBudget,
    OutOfDeviceMemory,
    OutOfMappings,
    Panic,
    SlotBusy,
    StaleSlot,
    TooManyTokens,
    Unhealthy,
    Unsupported,
)
from vattn.fences import IDLE, Event, Fence, Stream
from vattn.geometry import Geometry, Layers
from vattn.library import __version__, cuda_device, cuda_devices, probe
from vattn.log import flush_logging, set_logging
from vattn.slots import Batch, Slot
from vattn.stats import BufferInfo, Bytes, CallStats, CudaDevice, Layout, Live, Memory, Stats, Tensor
from vattn.views import View

__all__ = [
    "Batch",
    "Buffer",
    "BufferInfo",
    "Bytes",
    "CallStats",
    "CapturingStream",
    "CheckedDriver",
    "CudaDevice",
    "CudaDriver",
    "DeviceLost",
    "Driver",
    "DriverError",
    "DuplicateSlot",
    "Error",
    "Event",
    "Fence",
    "FewerTokens",
    "ForeignSlot",
    "Forked",
    "Geometry",
    "HostDriver",
    "IDLE",
    "InCallback",
    "InternalError",
    "InvalidArgument",
    "InvalidConfig",
    "InvalidGeometry",
    "InvalidHandle",
    "Kernel",
    "KvCache",
    "Latent",
    "Layers",
    "Layout",
    "LedgerDriver",
    "Live",
    "Memory",
    "NoFreeSlot",
    "Options",
    "OutOfAddressSpace",
    "OutOfBudget",
    "OutOfDeviceMemory",
    "OutOfMappings",
    "Panic",
    "Preset",
    "Slot",
    "SlotBusy",
    "StaleSlot",
    "Stats",
    "Stream",
    "Tensor",
    "Tile",
    "TooManyTokens",
    "Unhealthy",
    "Unsupported",
    "View",
    "__version__",
    "cuda_device",
    "cuda_devices",
    "flush_logging",
    "kernels",
    "plan",
    "presets",
    "probe",
    "set_logging",
]
