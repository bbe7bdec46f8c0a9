"""How the caches under a `VattnCache` are made, and what it means there that one has no room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

import vattn
from vattn._call import size
from vattn._layer_group import Shape
from vattn.torch import driver_for

#: Addresses that one group of layers may take, of the 64 TiB and more that a process has.
ADDRESSES = 16 << 40
#: Tokens for which a row has addresses at the least, whatever a model's configuration says.
LEAST_TOKENS = 131_072

DriverChoice: TypeAlias = "vattn.Driver | Callable[[torch.device], vattn.Driver] | None"


class Opener:
    """How caches are made for one `VattnCache`. Knows nothing of it, so that nobody keeps it alive."""

    def __init__(
        self,
        config: Any,
        budget: int | str | None,
        max_tokens: int | None,
        driver: DriverChoice,
        options: dict[str, Any],
    ) -> None:
        self.positions = int(getattr(config, "max_position_embeddings", 0) or 0)
        self.budget = None if budget is None else size("budget", budget)
        self.max_tokens, self.driver, self.options = max_tokens, driver, options
        self.drivers: dict[torch.device, vattn.Driver] = {}

    def __call__(self, shape: Shape, layers: int, rows: int) -> vattn.KvCache:
        """A cache for so many layers and rows."""
        if shape.device not in self.drivers:
            self.drivers[shape.device] = self._driver(shape.device)
        driver = self.drivers[shape.device]
        tokens = self.max_tokens
        if tokens is None:
            token = layers * rows * shape.heads * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
            tokens = max(min(max(self.positions, LEAST_TOKENS), ADDRESSES // token), 1)
        budget = driver.memory().total if self.budget is None else self.budget
        return vattn.KvCache(
            shape.geometry(rows), driver, budget=budget, max_tokens=tokens, max_slots=layers, **self.options
        )

    def _driver(self, device: torch.device) -> vattn.Driver:
        if callable(self.driver):
            return self.driver(device)
        if self.driver is not None:
            return self.driver
        try:
            return driver_for(device)
        except TypeError as error:
            raise TypeError(
                f"the model is on {device}, where a VattnCache can't be: use a DynamicCache"
            ) from error


def explained(error: vattn.Error, rows: int, tokens: int) -> vattn.Error:
    """The same error with what it means here, and the cure."""
    cure = {
        vattn.OutOfBudget: "give VattnCache a larger budget=, or generate with fewer rows or tokens",
        vattn.TooManyTokens: "give VattnCache a larger max_tokens=",
        vattn.OutOfAddressSpace: "give VattnCache a smaller max_tokens=, or generate with fewer rows",
        vattn.OutOfMappings: "raise vm.max_map_count, or generate with fewer rows",
    }.get(type(error), "generate with fewer rows or tokens, or close what else holds the device's memory")
    said = type(error)(f"{rows} rows of {tokens} tokens can't be held; {cure}. {error.message}")
    said.verb, said.driver_code = error.verb, error.driver_code
    said.driver_name, said.driver_bytes = error.driver_name, error.driver_bytes
    return said
