"""Which cache, with which kernels: what can be named on a command line.

`vattn`, `paged:64`, `paged:16:flashinfer-fa2` or `static`: a store, tokens of a page, the kernels of prefill and of
decode. What is left out is the store's own choice. A store named `x` is the file store_x.py, with a function
`make(shape, choice)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from kernels import DECODE, PREFILL
from store import Shape, Store

NAMES = sorted(file.stem.removeprefix("store_") for file in Path(__file__).parent.glob("store_*.py"))


@dataclass(frozen=True)
class Choice:
    """A store and how it is used."""

    store: str
    page_tokens: int = 16
    prefill: str | None = None
    decode: str | None = None
    layout: str | int = "sliced"
    """For `vattn`: how many layers lie side by side."""

    @classmethod
    def read(cls, text: str, layout: str | int = "sliced") -> Choice:
        """From `store:page_tokens:prefill:decode`."""
        name, pages, prefill, decode = (text.split(":") + [""] * 4)[:4]
        for what, said, known in (
            ("store", name, NAMES),
            ("kernel for prefill", prefill, PREFILL),
            ("kernel for decode", decode, DECODE),
        ):
            if said not in known and (said or what == "store"):
                raise ValueError(f"{text!r}: there is no {what} {said!r}; there are {', '.join(known)}")
        if pages and not (pages.isdigit() and int(pages)):
            raise ValueError(f"{text!r}: {pages!r} is no number of tokens for a page; give 16, say")
        return cls(name, int(pages or 16), prefill or None, decode or None, layout)

    def open(self, shape: Shape) -> Store:
        """A store of this kind."""
        store: Store = import_module(f"store_{self.store}").make(shape, self)
        return store

    def __str__(self) -> str:
        return ":".join([self.store, str(self.page_tokens), self.prefill or "", self.decode or ""]).rstrip(
            ":"
        )
