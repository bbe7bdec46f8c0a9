"""Drivers: whoever maps memory. The host's own, an NVIDIA GPU's, one that keeps books alone, and one around
another that can be told to fail."""

from __future__ import annotations

from typing import Any

from vattn._call import U64, VERBS, Owned, check, choice, flag, number, size, sized
from vattn._native import ffi, lib
from vattn.errors import STATUSES, Error
from vattn.fences import Stream
from vattn.stats import Live, Memory, read


class Driver(Owned):
    """Whoever maps memory. Caches share one, and keep what they need of it after it was closed."""

    def __init__(self) -> None:
        raise TypeError("make a HostDriver, a CudaDriver, a LedgerDriver or a CheckedDriver")

    def _made(self, create: Any, options: Any) -> None:
        out = ffi.new("vattn_driver **")
        check(create(options, out))
        self._own(out[0], lib.vattn_driver_destroy)
        info = sized("vattn_driver_info")
        check(lib.vattn_driver_describe(self._handle, info))
        #: `host`, `ledger` or `cuda`.
        self.name: str = ffi.string(info.name).decode()
        #: DLPack's number for where its memory is: 1 for the processor's, 2 for a CUDA device's.
        self.device_type: int = info.device_type
        #: The device's number; 0 for the processor.
        self.device_id: int = info.device_id
        #: The unit of allocation in bytes.
        self.granule: int = info.granule
        #: Whether allocations can be exported through a file descriptor.
        self.exportable: bool = bool(info.exportable)
        #: Whether a network card can read and write them.
        self.rdma: bool = bool(info.rdma)

    def memory(self) -> Memory:
        """How many bytes the device has, and how many of them are free now, by anybody's count."""
        free, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.vattn_driver_memory(self._handle, free, total))
        return Memory(free[0], total[0])

    def __repr__(self) -> str:
        return f"<vattn.{type(self).__name__} {self.name}, granule {self.granule} bytes>"


class _Played(Driver):
    """A driver without a device's queues: any number may name a stream, and fences fire at once unless they
    are held back. For tests."""

    def hold(self, stream: Any) -> None:
        """Holds a stream back: fences recorded on it from now on fire when `fire` says so. Whoever waits for
        one, a cache that is closed among them, waits until then."""
        check(lib.vattn_driver_hold(self._handle, pointer(stream)))

    def fire(self, stream: Any) -> None:
        """Fires all fences of a stream, and holds it back no longer."""
        check(lib.vattn_driver_fire(self._handle, pointer(stream)))

    def set_capturing(self, stream: Any, capturing: bool) -> None:
        """Says that a stream is being captured into a graph, or no longer: fences on it are refused
        meanwhile."""
        check(lib.vattn_driver_set_capturing(self._handle, pointer(stream), flag("capturing", capturing)))


class HostDriver(_Played):
    """This machine's own memory, on which a cache can be tried, tested and used without a GPU. Linux only.

    `capacity` is how much can be created in all; the system gives it when it is first touched, so more than
    the machine has ends in the kernel's out-of-memory killer. `granule` is the unit of allocation (2 MiB), a
    power of two. `max_mappings` is how many of the kernel's mappings may be used. Sizes are bytes or texts
    such as `1GiB`.
    """

    def __init__(
        self,
        capacity: int | str = "1GiB",
        *,
        granule: int | str | None = None,
        max_mappings: int | None = None,
    ) -> None:
        options = sized("vattn_host_options")
        options.capacity = size("capacity", capacity)
        if granule is not None:
            options.granule = size("granule", granule)
        if max_mappings is not None:
            options.max_mappings = number("max_mappings", max_mappings)
        self._made(lib.vattn_driver_create_host, options)


class LedgerDriver(_Played):
    """Keeps the books and maps nothing: for simulations of sizes that no machine at hand can map.

    Its addresses can't be touched, and views of its caches have no memory to show. `addresses` limits the
    bytes of addresses that can be reserved at a time.
    """

    def __init__(
        self, capacity: int | str, *, granule: int | str | None = None, addresses: int | str | None = None
    ) -> None:
        options = sized("vattn_ledger_options")
        options.capacity = size("capacity", capacity)
        if granule is not None:
            options.granule = size("granule", granule)
        if addresses is not None:
            options.addresses = size("addresses", addresses)
        self._made(lib.vattn_driver_create_ledger, options)


class CudaDriver(Driver):
    """An NVIDIA GPU's memory.

    It works in the context that is current on this thread, else in the device's primary one, which PyTorch
    uses. `ordinal` None is the device of that context, or the first. `exportable` allocations can be
    exported through a file descriptor, and with `rdma` a network card can read and write them.
    """

    def __init__(self, ordinal: int | None = None, *, exportable: bool = False, rdma: bool = False) -> None:
        options = sized("vattn_cuda_options")
        options.ordinal = -1 if ordinal is None else number("ordinal", ordinal, 2**31 - 1)
        options.exportable = flag("exportable", exportable)
        options.rdma = flag("rdma", rdma)
        self._made(lib.vattn_driver_create_cuda, options)


class CheckedDriver(_Played):
    """A driver around another that can be told to fail, so that a program can be tested against every failure
    there is. It costs some time in each call.

    Verbs are CUDA's names without their prefix, such as `create` or `map`; None is any of them.
    """

    def __init__(self, inner: Driver) -> None:
        if not isinstance(inner, Driver):
            raise TypeError(f"inner is {inner!r}; it has to be a driver")
        self._made(lib.vattn_driver_create_checked, inner._handle)

    def fail(
        self, nth: int, status: type[Error] | str, *, verb: str | None = None, onward: bool = False
    ) -> None:
        """Has the `nth` call from now on fail, 1 for the next, and with `onward` every later one too.
        `status` is an exception's class, such as `vattn.OutOfDeviceMemory`, or its name in one word."""
        if isinstance(status, type) and issubclass(status, Error):
            code = status.status
        else:
            code = choice("status", status, {name.lower(): number for name, number in STATUSES.items()})
        check(
            lib.vattn_driver_fail(
                self._handle, verb_number(verb), number("nth", nth, U64), flag("onward", onward), code
            )
        )

    def clear_failures(self) -> None:
        """Has no call fail any more that was planned to."""
        check(lib.vattn_driver_clear_failures(self._handle))

    def calls(self, verb: str | None = None) -> tuple[int, int]:
        """How many calls there were so far, and how many were made to fail."""
        calls, failed = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.vattn_driver_calls(self._handle, verb_number(verb), calls, failed))
        return int(calls[0]), int(failed[0])

    def live(self) -> Live:
        """What is alive of the driver's: all 0 once every cache of it is closed."""
        out = ffi.new("vattn_live *")
        check(lib.vattn_driver_live(self._handle, out))
        return read(Live, out)


def verb_number(verb: str | None) -> int:
    """A verb of the header; None is any."""
    return int(lib.VATTN_ANY_VERB) if verb is None else choice("verb", verb, VERBS)


def pointer(stream: Any) -> Any:
    """A stream as C takes it."""
    return ffi.cast("void *", Stream(stream).handle)
