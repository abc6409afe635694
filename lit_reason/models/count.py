"""What a model costs, from its `ModelConfig` alone: parameters, FLOPs, KV cache, memory. No tensor is made.

Everything is a sum over one list, the weights of each block (`_block`), which tests hold against the built model.

    parameters  every weight of the model; buffers (expert bias and load) are none. Active: what one token uses, that is
                K of E routed experts. Of the embedding all rows count as active, as the published numbers have it.
    FLOPs       2 per multiply-add of every matrix product; norms, softmax, rotations, activations and the embedding
                look-up are not counted. Attention is causal: a token sees (T + 1) / 2 positions on average, each of
                which costs H (qk head dim + v head dim) multiply-adds a layer, with keys and values expanded as in
                training and prefill. Training is 3 x forward: the backward pass computes two products for each one.
    KV cache    depth x (kv_lora_rank + qk_rope_head_dim) values per token (2405.04434, section 2.1).
    memory      bytes that stay on the fullest rank of a layout. Left out: activations, the KV cache, communication
                buffers, fragmentation, and a copy of the embedding for MTP on another pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise

from lit_reason.errors import ConfigError, nearest
from lit_reason.models.config import ModelConfig

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of weights; bytes per value
KV_DTYPES = DTYPES | {"fp8": 1}
# Values per parameter that an optimizer keeps, for (hidden and expert matrices, everything else, which is AdamW's).
# Adam-mini's second moment, one value per head or row, is left out; SOAP's and Shampoo's preconditioners depend on each
# matrix's sides and have no number per parameter. "none" is inference, which has no gradients either.
OPTIMIZERS = {"none": (0, 0), "adamw": (2, 2), "muon": (1, 2), "mars_m": (2, 2), "adam_mini": (1, 2)}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is laid out over `data * tensor * pipeline` ranks.

    Example::

        Layout(data=128, pipeline=16, expert=64, zero=1)  # DeepSeek-V3's own, on 2048 GPUs (2412.19437, section 3.2)

    Args:
        data: data-parallel ranks, over which ZeRO shards.
        tensor: ranks that split heads, hidden units and vocabulary rows. Norms, routers and the projections down to a
            latent are whole on each, and so is a routed expert.
        pipeline: stages of consecutive blocks; the first ones have one block more when they do not divide evenly. The
            embedding is on the first stage, head and MTP layers are on the last.
        expert: ranks, out of the data * tensor ranks of a stage, that the routed experts are dealt to; ZeRO shards an
            expert over the data * tensor / expert ranks that hold it.
        zero: ZeRO stage (1910.02054): 0 shards nothing (DDP), 1 the optimizer's state, 2 gradients too, 3 weights too
            (FSDP).

    Raises:
        ConfigError: for a degree below 1, an unknown ZeRO stage, or experts that do not fit the ranks.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    zero: int = 3

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline", "expert"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout: {name}={getattr(self, name)}; must be at least 1")
        if self.zero not in range(4):
            raise ConfigError(f"layout: zero={self.zero}; valid: 0, 1, 2, 3")
        if self.data * self.tensor % self.expert:
            raise ConfigError(
                f"layout: expert={self.expert} does not divide data * tensor = {self.data * self.tensor}, the ranks "
                "that the experts are dealt to"
            )

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Count:
    """What `count` found; `print(found.table())` shows it.

    Args:
        total, active: parameters, and those that one token uses. MTP layers are in neither.
        embedding, head: parameters of each, contained in both of the above.
        mtp: parameters of the MTP layers, which share the model's embedding and head.
        flops: of a forward pass, per token, without MTP; `attention_flops` is the part that grows with `seq_len`.
        training_flops: 3 x forward, per token, with MTP.
        kv_bytes: of the cache, per token.
        weight_bytes, gradient_bytes, optimizer_bytes: on the fullest rank.
        gathered_bytes: what the largest block adds to that while ZeRO-3 has it gathered; prefetching holds a second.
        seq_len, dtype, kv_dtype, optimizer, layout: what the above holds for.
    """

    total: int
    active: int
    embedding: int
    head: int
    mtp: int
    flops: int
    attention_flops: int
    training_flops: int
    kv_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    seq_len: int
    dtype: str
    kv_dtype: str
    optimizer: str
    layout: Layout

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients, optimizer state and the gathered block."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.gathered_bytes

    def table(self) -> str:
        """Plain text, one quantity a line, exact numbers first."""
        both, layout = self.embedding + self.head, self.layout
        setting = ", ".join(f"{f.name}={getattr(layout, f.name)}" for f in fields(layout))
        rows = [
            ("parameters", "total", "active"),
            ("  all", f"{self.total:,}", f"{self.active:,}"),
            ("  without embedding", f"{self.total - self.embedding:,}", f"{self.active - self.embedding:,}"),
            ("  without embedding and head", f"{self.total - both:,}", f"{self.active - both:,}"),
            ("  MTP layers, besides", f"{self.mtp:,}", ""),
            (f"FLOPs per token, {self.seq_len:,} tokens", "", ""),
            ("  forward", f"{self.flops:,}", _short(self.flops, "FLOP")),
            ("  of which attention", f"{self.attention_flops:,}", _short(self.attention_flops, "FLOP")),
            ("  training", f"{self.training_flops:,}", _short(self.training_flops, "FLOP")),
            (f"KV cache per token, {self.kv_dtype}", f"{self.kv_bytes:,}", _short(self.kv_bytes, "B")),
            ("memory of the fullest rank", f"{self.dtype}, {self.optimizer}", f"of {layout.ranks:,}"),
            ("  weights", f"{self.weight_bytes:,}", _short(self.weight_bytes, "B")),
            ("  gradients", f"{self.gradient_bytes:,}", _short(self.gradient_bytes, "B")),
            ("  optimizer", f"{self.optimizer_bytes:,}", _short(self.optimizer_bytes, "B")),
            ("  largest block, gathered", f"{self.gathered_bytes:,}", _short(self.gathered_bytes, "B")),
            ("  sum", f"{self.memory_bytes:,}", _short(self.memory_bytes, "B")),
        ]
        lines = [f"{label:<34}{left:>22}{right:>18}".rstrip() for label, left, right in rows]
        return "\n".join([*lines, f"({setting}; without activations)"])


def count(
    config: ModelConfig,
    *,
    seq_len: int | None = None,
    mtp_layers: int | None = None,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    optimizer: str = "adamw",
    master_weights: bool = False,
    layout: Layout | None = None,
) -> Count:
    """Counts a model of `config`'s shape; the conventions are at the top of this file.

    Example::

        print(count(ModelConfig(), optimizer="muon", layout=Layout(data=8, expert=8)).table())

    Args:
        seq_len: T of the attention term (tokens); None is 4096, or `max_seq_len` if that is less.
        mtp_layers: multi-token-prediction layers (2412.19437, section 2.2), 1 in DeepSeek-V3's training; None is the
            config's `mtp_depth`.
        dtype: of the weights, a key of `DTYPES`; gradients and optimizer state have it too, as in PyTorch. Routers are
            always fp32.
        kv_dtype: of the cache, a key of `KV_DTYPES`; None is `dtype`.
        optimizer: a key of `OPTIMIZERS`.
        master_weights: keep an fp32 copy of weights below fp32, and gradients and optimizer state in fp32.
        layout: None is one rank.

    Raises:
        ConfigError: for an unknown dtype or optimizer, a sequence longer than the model takes, or a layout that the
            model cannot have.
    """
    layout = layout or Layout()
    kv_dtype = kv_dtype or dtype
    seq_len = min(4096, config.max_seq_len) if seq_len is None else seq_len
    mtp_layers = config.mtp_depth if mtp_layers is None else mtp_layers
    _check(config, seq_len, mtp_layers, layout)
    _check_name("dtype", dtype, DTYPES)
    _check_name("kv_dtype", kv_dtype, KV_DTYPES)
    _check_name("optimizer", optimizer, OPTIMIZERS)

    embedding, head = _embedding(config), _head(config)
    model = [embedding, *(w for block in _blocks(config) for w in block), *head]
    mtp = _mtp_layer(config) * mtp_layers
    attention = _attention_flops(config, seq_len)
    flops = _product_flops(config, model) + config.depth * attention
    mtp_flops = _product_flops(config, mtp) + mtp_layers * (_product_flops(config, head) + attention)
    bytes_of = _RankBytes(config, DTYPES[dtype], OPTIMIZERS[optimizer], master_weights, layout)
    return Count(
        total=sum(w.numel for w in model),
        active=sum(_active(config, w) for w in model),
        embedding=embedding.numel,
        head=config.vocab_size * config.width,
        mtp=sum(w.numel for w in mtp),
        flops=flops,
        attention_flops=config.depth * attention,
        training_flops=3 * (flops + mtp_flops),
        kv_bytes=config.depth * (config.kv_lora_rank + config.qk_rope_head_dim) * KV_DTYPES[kv_dtype],
        **bytes_of.fullest(_stages(config, mtp_layers, layout.pipeline)),
        seq_len=seq_len,
        dtype=dtype,
        kv_dtype=kv_dtype,
        optimizer=optimizer,
        layout=layout,
    )


@dataclass(frozen=True, slots=True)
class _Weight:
    """`numel` parameters of one kind (a row of muP's table, `models.mup`); `split`: tensor parallelism divides them."""

    kind: str
    numel: int
    split: bool = False


def _embedding(config: ModelConfig) -> _Weight:
    return _Weight("embedding", config.vocab_size * config.width, split=True)


def _head(config: ModelConfig) -> list[_Weight]:
    return [_Weight("norm", config.width), _Weight("head", config.vocab_size * config.width, split=True)]


def _blocks(config: ModelConfig) -> list[list[_Weight]]:
    return [_block(config, dense=i < config.first_dense) for i in range(config.depth)]


def _block(config: ModelConfig, dense: bool) -> list[_Weight]:
    ffn = [_swiglu(config.width, config.ffn_width)] if dense else _moe(config)
    return [*_attention(config), *ffn, _Weight("norm", 2 * config.width)]


def _mtp_layer(config: ModelConfig) -> list[_Weight]:
    """A block like the model's last one, the projection of [embedding, hidden] to the width, and three norms."""
    projection = _Weight("hidden", 2 * config.width**2, split=True)
    return [*_block(config, dense=not config.moe_layers), projection, _Weight("norm", 3 * config.width)]


def _attention(config: ModelConfig) -> list[_Weight]:
    width, heads, latent = config.width, config.heads, config.kv_lora_rank
    q_in, q_out, q_a = width, heads * config.qk_head_dim, []
    if config.q_lora_rank is not None:
        q_in = config.q_lora_rank
        q_a = [_Weight("hidden", width * q_in), _Weight("norm", q_in)]
    return [
        *q_a,
        _Weight("hidden", q_in * q_out, split=True),
        _Weight("hidden", width * (latent + config.qk_rope_head_dim)),
        _Weight("norm", latent),
        _Weight("hidden", latent * heads * (config.qk_nope_head_dim + config.v_head_dim), split=True),
        _Weight("hidden", heads * config.v_head_dim * width, split=True),
    ]


def _moe(config: ModelConfig) -> list[_Weight]:
    return [
        _Weight("router", config.experts * config.width),
        _Weight("expert", config.experts * 3 * config.width * config.expert_width),
        _swiglu(config.width, config.shared_experts * config.expert_width),
    ]


def _swiglu(width: int, hidden: int) -> _Weight:
    return _Weight("hidden", 3 * width * hidden, split=True)


def _active(config: ModelConfig, weight: _Weight) -> int:
    """Parameters that one token uses."""
    return weight.numel // config.experts * config.experts_per_token if weight.kind == "expert" else weight.numel


def _product_flops(config: ModelConfig, weights: Iterable[_Weight]) -> int:
    """FLOPs per token of the products with these weights."""
    return sum(2 * _active(config, w) for w in weights if w.kind not in ("embedding", "norm"))


def _attention_flops(config: ModelConfig, seq_len: int) -> int:
    """FLOPs per token and layer of scores and weighted values, averaged over the positions of a causal sequence."""
    return config.heads * (config.qk_head_dim + config.v_head_dim) * (seq_len + 1)


def _stages(config: ModelConfig, mtp_layers: int, pipeline: int) -> list[list[list[_Weight]]]:
    """Per pipeline stage its blocks, each a list of weights."""
    blocks = _blocks(config)
    least, more = divmod(len(blocks), pipeline)
    cuts = [least * i + min(i, more) for i in range(pipeline + 1)]
    stages = [blocks[start:end] for start, end in pairwise(cuts)]
    stages[0].insert(0, [_embedding(config)])
    stages[-1] += [_mtp_layer(config)] * mtp_layers + [_head(config)]
    return stages


@dataclass(frozen=True, slots=True)
class _RankBytes:
    """Bytes on one rank; a weight that does not divide evenly is rounded up."""

    config: ModelConfig
    size: int
    states: tuple[int, int]
    master_weights: bool
    layout: Layout

    def fullest(self, stages: list[list[list[_Weight]]]) -> dict[str, int]:
        return max(map(self.stage, stages), key=lambda found: sum(found.values()))

    def stage(self, blocks: list[list[_Weight]]) -> dict[str, int]:
        weights = [w for block in blocks for w in block]
        return {
            "weight_bytes": sum(self._size(w) * self._held(w, zero=3) for w in weights),
            "gradient_bytes": sum(self._gradient(w) for w in weights),
            "optimizer_bytes": sum(self._optimizer(w) for w in weights),
            "gathered_bytes": max(
                sum(self._size(w) * (self._whole(w) - self._held(w, zero=3)) for w in block) for block in blocks
            ),
        }

    def _gradient(self, weight: _Weight) -> int:
        return self._held(weight, zero=2) * self._state_size(weight) if any(self.states) else 0

    def _optimizer(self, weight: _Weight) -> int:
        states = self.states[weight.kind not in ("hidden", "expert")]
        copy = 4 if self.master_weights and self._size(weight) < 4 else 0
        return self._held(weight, zero=1) * (states * self._state_size(weight) + copy)

    def _size(self, weight: _Weight) -> int:
        return 4 if weight.kind == "router" else self.size

    def _state_size(self, weight: _Weight) -> int:
        return 4 if self.master_weights else self._size(weight)

    def _whole(self, weight: _Weight) -> int:
        """Values on a rank before ZeRO shards them."""
        if weight.kind == "expert":
            return _ceil(self.config.experts, self.layout.expert) * (weight.numel // self.config.experts)
        return _ceil(weight.numel, self.layout.tensor) if weight.split else weight.numel

    def _held(self, weight: _Weight, zero: int) -> int:
        """Values on a rank, of what ZeRO shards from stage `zero` on."""
        layout, whole = self.layout, self._whole(weight)
        if layout.zero < zero:
            return whole
        return _ceil(whole, layout.data * layout.tensor // layout.expert if weight.kind == "expert" else layout.data)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _short(n: int, unit: str) -> str:
    """`n` with two decimals, in powers of 1000.

    Example::

        >>> _short(70_272, "B")
        '70.27 kB'
    """
    value, prefixes = float(n), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.2f} {prefixes[0]}{unit}" if n >= 1000 else f"{n} {unit}"


def _check(config: ModelConfig, seq_len: int, mtp_layers: int, layout: Layout) -> None:
    if not 1 <= seq_len <= config.max_seq_len:
        raise ConfigError(f"seq_len={seq_len}: valid 1..{config.max_seq_len} (model.max_seq_len)")
    if mtp_layers < 0:
        raise ConfigError(f"mtp_layers={mtp_layers}: must be at least 0")
    if config.heads % layout.tensor:
        raise ConfigError(f"layout: tensor={layout.tensor} does not divide model.heads={config.heads}")
    if layout.pipeline > config.depth:
        raise ConfigError(f"layout: pipeline={layout.pipeline}; valid 1..{config.depth} (model.depth)")
    if config.moe_layers and layout.expert > config.experts:
        raise ConfigError(f"layout: expert={layout.expert}; valid 1..{config.experts} (model.experts)")


def _check_name(what: str, got: str, valid: Iterable[str]) -> None:
    if got not in valid:
        raise ConfigError(f"unknown {what} {got!r}: {nearest(got, valid)}")
