"""What a call of the library can fail with: one class for each status of the C header, under `Error`.

The number of a class is looked up in the header under the class's own name, so the two can't drift apart.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from vattn._native import ffi, lib

STATUSES: dict[str, int] = {
    name.removeprefix("VATTN_"): number for number, name in ffi.typeof("enum vattn_status").elements.items()
}
CLASSES: dict[int, type[Error]] = {}


class Error(Exception):
    """A call failed, and changed nothing. The text names the value, the limit and the cure.

    A status that this package does not know, because the library is newer, is raised as this class itself.
    """

    status: ClassVar[int] = -1

    #: The number of the C header, such as 4.
    number: int
    #: The status in one word, such as `out_of_budget`.
    name: str
    #: What is wrong, with value, limit and cure.
    message: str
    #: The driver's call that failed, such as `map`; None where none did.
    verb: str | None
    #: The driver's own number, a `CUresult` or an `errno`; None where no call failed.
    driver_code: int | None
    #: Its name, such as `CUDA_ERROR_OUT_OF_MEMORY`; None where no call failed.
    driver_name: str | None
    #: The bytes that the driver's call was about; None where it has none.
    driver_bytes: int | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        word = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__.removesuffix("Error")).upper()
        cls.status = STATUSES[word]
        CLASSES[cls.status] = cls

    def __init__(self, message: str = "", number: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.number = type(self).status if number is None else number
        self.name = ffi.string(lib.vattn_status_name(self.number)).decode()
        self.verb = self.driver_name = None
        self.driver_code = self.driver_bytes = None

    @property
    def driver(self) -> tuple[str, int, str, int | None] | None:
        """Call, code, name and bytes, where a call of the driver is what failed."""
        if self.verb is None or self.driver_code is None or self.driver_name is None:
            return None
        return self.verb, self.driver_code, self.driver_name, self.driver_bytes


class InvalidGeometry(Error, ValueError):
    """A model's dimensions, or a file that describes them, can't be used as they are."""


class InvalidConfig(Error, ValueError):
    """An option of the cache can't be used as it is."""


class InvalidArgument(Error, ValueError):
    """An argument of a call can't be used as it is."""


class OutOfBudget(Error):
    """The budget is used up by slots that are in use. Retire or truncate some, or raise the budget."""


class OutOfDeviceMemory(Error, MemoryError):
    """The device has no memory left. Retiring does not help if another program holds it."""


class OutOfMappings(Error, MemoryError):
    """The operating system allows no further mapping (host driver: `vm.max_map_count`)."""


class OutOfAddressSpace(Error, MemoryError):
    """Not so many addresses can be reserved. Use fewer slots, fewer tokens a slot or a smaller buffer."""


class NoFreeSlot(Error):
    """Every slot is in use. Retire one, or create the cache with more."""


class StaleSlot(Error, LookupError):
    """The slot's request has been retired. Use the slot of the latest acquire."""


class ForeignSlot(Error, LookupError):
    """The slot is another cache's, perhaps one that was closed."""


class SlotBusy(Error):
    """Another thread is working on the slot. Let it finish."""


class DuplicateSlot(Error, ValueError):
    """One call names a slot twice. Name it once, with its total."""


class TooManyTokens(Error, ValueError):
    """More tokens than a slot can hold. Create the cache with a larger `max_tokens`."""


class FewerTokens(Error, ValueError):
    """Fewer tokens than the slot holds. `KvCache.truncate` is the call for that."""


class CapturingStream(Error):
    """A fence was asked of a stream that is being captured into a graph. Call before or after."""


class DriverError(Error, RuntimeError):
    """The driver refused for a reason of its own: `driver` has its call and its code."""


class DeviceLost(Error, RuntimeError):
    """The device or its context is gone. Nothing on it can be used again; close the cache."""


class Unhealthy(Error, RuntimeError):
    """This cache does not work any more, or not in this state of health. See `KvCache.health`."""


class Unsupported(Error, RuntimeError):
    """This machine, device or build can't do that. The text says what is missing."""


class InternalError(Error, RuntimeError):
    """A defect of the library; please report it."""


class InvalidHandle(Error, ValueError):
    """The object was closed."""


class Forked(Error, RuntimeError):
    """The object was made before `fork`, and this is the child. Make objects of its own there."""


class Panic(Error, RuntimeError):
    """The library panicked, which is a defect of it; please report the text."""


class InCallback(Error, RuntimeError):
    """The call was made from inside a log callback."""
