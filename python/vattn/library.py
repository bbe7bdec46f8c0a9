"""The library itself: its version, and what it finds on this machine."""

from __future__ import annotations

import json
from typing import Any

from vattn._call import U32, check, number, sized, string
from vattn._native import ffi, lib
from vattn.stats import CudaDevice, read

#: The version of the library, which is that of the package.
__version__: str = ffi.string(lib.vattn_version()).decode()

if lib.vattn_abi_version() != lib.VATTN_ABI_VERSION:
    raise ImportError(
        f"the library has version {lib.vattn_abi_version()} of the ABI, and this package was built for "
        f"{lib.VATTN_ABI_VERSION}; install vattn anew"
    )


def probe() -> dict[str, Any]:
    """What the library finds on this machine: its version, CUDA's version and devices, or why there are none,
    and whether the host driver works."""
    return dict(json.loads(string(lib.vattn_probe_json)))


def cuda_devices() -> list[CudaDevice]:
    """The CUDA devices that this process may see. Raises `Unsupported` where there is no driver or none."""
    count = ffi.new("uint32_t *")
    check(lib.vattn_cuda_device_count(count))
    return [cuda_device(ordinal) for ordinal in range(count[0])]


def cuda_device(ordinal: int) -> CudaDevice:
    """What a CUDA device is and can do."""
    struct = sized("vattn_cuda_device")
    check(lib.vattn_cuda_device_describe(number("ordinal", ordinal, U32), struct))
    return read(CudaDevice, struct)
