"""A Llama-family model over flat rows of tokens: weights, and the arithmetic of a forward pass.

Owns the weights and the arithmetic of the layers. Refuses to know where keys and values are kept: a forward pass is
`enter`, then for each layer `project`, attention, which is computed elsewhere, and `leave`, and at last `logits`. So
the same model runs over any cache.

Shapes: `tokens` and `positions` are `[n]`, of all sequences of a step one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines `[n, 1, head_dim / 2]`."""


@dataclass(frozen=True)
class Config:
    """A model's dimensions. The defaults are Llama-3-8B's."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 14336
    vocab: int = 128256
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None
    eps: float = 1e-5
    tied: bool = False

    @classmethod
    def tiny(cls) -> Config:
        """Small enough for a test on the processor."""
        return cls(
            layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256, rope_theta=10000.0
        )

    @classmethod
    def read(cls, folder: Path) -> Config:
        """What a Hugging Face `config.json` says."""
        path = folder / "config.json"
        said = json.loads(path.read_text())
        kind = said.get("model_type")
        if kind not in ("llama", "mistral"):
            raise ValueError(f"{path}: model_type is {kind!r}, and this engine knows 'llama' and 'mistral'")
        if said.get("sliding_window"):
            raise ValueError(
                f"{path}: sliding_window is {said['sliding_window']}, and this engine attends to everything"
            )
        rope = said.get("rope_parameters") or {}
        scaling = said.get("rope_scaling") or (
            {k: v for k, v in rope.items() if k != "rope_theta"} if rope else None
        )
        if scaling and scaling.get("rope_type", "default") == "default":
            scaling = None
        if scaling and scaling["rope_type"] != "llama3":
            raise ValueError(
                f"{path}: rope_type is {scaling['rope_type']!r}, and this engine knows 'default' and 'llama3'"
            )
        return cls(
            layers=said["num_hidden_layers"],
            hidden=said["hidden_size"],
            heads=said["num_attention_heads"],
            kv_heads=said.get("num_key_value_heads") or said["num_attention_heads"],
            head_dim=said.get("head_dim") or said["hidden_size"] // said["num_attention_heads"],
            ffn=said["intermediate_size"],
            vocab=said["vocab_size"],
            rope_theta=said.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            rope_scaling=scaling,
            eps=said["rms_norm_eps"],
            tied=said.get("tie_word_embeddings", False),
        )


@dataclass
class Layer:
    """One layer's weights, those that are multiplied with the same input side by side."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Model:
    """Weights on a device."""

    def __init__(
        self,
        config: Config,
        embedding: torch.Tensor,
        layers: list[Layer],
        norm: torch.Tensor,
        head: torch.Tensor,
        longest: int,
    ) -> None:
        self.config = config
        self.embedding, self.layers, self.norm, self.head = embedding, layers, norm, head
        self.cosine, self.sine = (table.to(embedding.device) for table in rotations(config, longest))
        self.widths = [config.heads * config.head_dim] + 2 * [config.kv_heads * config.head_dim]
        self.steps = Steps.on(embedding.device)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @classmethod
    def random(
        cls, config: Config, longest: int, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
    ) -> Model:
        """Weights of the size that training begins with."""
        generator = torch.Generator(device).manual_seed(seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            made = torch.empty(rows, columns, device=device, dtype=dtype)
            return made.normal_(0, columns**-0.5, generator=generator)

        def ones() -> torch.Tensor:
            return torch.ones(config.hidden, device=device, dtype=dtype)

        queries, pairs = config.heads * config.head_dim, config.kv_heads * config.head_dim
        layers = [
            Layer(
                ones(),
                weight(queries + 2 * pairs, config.hidden),
                weight(config.hidden, queries),
                ones(),
                weight(2 * config.ffn, config.hidden),
                weight(config.hidden, config.ffn),
            )
            for _ in range(config.layers)
        ]
        embedding = weight(config.vocab, config.hidden)
        head = embedding if config.tied else weight(config.vocab, config.hidden)
        return cls(config, embedding, layers, ones(), head, longest)

    @classmethod
    def load(cls, folder: Path, longest: int, *, device: torch.device | str, dtype: torch.dtype) -> Model:
        """The weights of a local Hugging Face folder of safetensors."""
        from safetensors import safe_open

        config = Config.read(folder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} has no *.safetensors")
        weights: dict[str, torch.Tensor] = {}
        for file in files:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                weights.update({name: opened.get_tensor(name).to(dtype) for name in opened.keys()})  # noqa: SIM118

        def of(name: str) -> torch.Tensor:
            try:
                return weights.pop(name)
            except KeyError:
                raise KeyError(f"{folder} has no weight {name}") from None

        def layer(number: int) -> Layer:
            at = f"model.layers.{number}."
            qkv = torch.cat([of(f"{at}self_attn.{part}_proj.weight") for part in "qkv"])
            gate_up = torch.cat([of(f"{at}mlp.{part}_proj.weight") for part in ("gate", "up")])
            return Layer(
                of(at + "input_layernorm.weight"),
                qkv,
                of(at + "self_attn.o_proj.weight"),
                of(at + "post_attention_layernorm.weight"),
                gate_up,
                of(at + "mlp.down_proj.weight"),
            )

        layers = [layer(number) for number in range(config.layers)]
        embedding = of("model.embed_tokens.weight")
        head = embedding if config.tied else of("lm_head.weight")
        return cls(config, embedding, layers, of("model.norm.weight"), head, longest)

    def enter(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Angles]:
        """A pass begins: the states, the same normed for the first layer, and by which angles to rotate."""
        hidden = functional.embedding(tokens, self.embedding)
        normed = functional.rms_norm(
            hidden, (self.config.hidden,), self.layers[0].input_norm, self.config.eps
        )
        return hidden, normed, (self.cosine[positions][:, None], self.sine[positions][:, None])

    def project(
        self, number: int, normed: torch.Tensor, angles: Angles, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer up to its attention. The queries go to `query`, `[n, heads, dim]`; returns keys and values, `[n,
        kv_heads, dim]`."""
        asked, key, value = (
            part.unflatten(-1, (-1, self.config.head_dim))
            for part in functional.linear(normed, self.layers[number].qkv).split(self.widths, dim=-1)
        )
        return self.steps.rotated(asked, key, *angles, query), value

    def leave(
        self, number: int, hidden: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer from its attention's output on: the states, and the same normed for what comes next."""
        layer, eps = self.layers[number], self.config.eps
        attended = functional.linear(attended.flatten(1), layer.out)
        hidden, normed = self.steps.added(hidden, attended, layer.ffn_norm, eps)
        gated = self.steps.gated(functional.linear(normed, layer.gate_up))
        # Of the next layer, or the model's last.
        norm = self.layers[number + 1].input_norm if number + 1 < self.config.layers else self.norm
        return self.steps.added(hidden, functional.linear(gated, layer.down), norm, eps)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """`[m, vocab]` of what the last layer left of `m` tokens."""
        return functional.linear(normed, self.head)


def rotated(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Rotary position embedding, the halves of a head's elements rotated against each other: of the queries into `out`,
    and of the keys."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        both = first * cosine - second * sine, second * cosine + first * sine
        return torch.cat(both, dim=-1).to(x.dtype)

    out.copy_(turned(query))
    return turned(key)


def added(
    hidden: torch.Tensor, more: torch.Tensor, norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and the sum normed."""
    hidden = hidden + more
    return hidden, functional.rms_norm(hidden, hidden.shape[-1:], norm, eps)


def gated(both: torch.Tensor) -> torch.Tensor:
    """SwiGLU of two factors that lie side by side."""
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate) * up


class Steps(NamedTuple):
    """What lies between the multiplications."""

    rotated: Callable[..., torch.Tensor]
    added: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gated: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def on(cls, device: torch.device) -> Steps:
        """As functions; on a GPU a kernel or two each instead of a dozen, compiled when first used."""
        plain = cls(rotated, added, gated)
        if device.type != "cuda":
            return plain
        return cls(*(torch.compile(step) for step in plain))


def rotations(config: Config, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[position, head_dim / 2]`, in float32."""
    frequencies = config.rope_theta ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    )
    if config.rope_scaling:
        frequencies = stretched(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(longest, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def stretched(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Llama 3.1's longer context: slow rotations are slowed by `factor`, fast ones stay, those between are mixed."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])
