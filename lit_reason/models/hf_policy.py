"""Any causal language model of transformers as a policy: `HFConfig(name=...).build()`.

    folder or hub name -> AutoModelForCausalLM (safetensors only, none of its code) -> HFModel, checked on five tokens

What a family does beyond "trunk, then output embeddings" cannot be known from its name, so `HFModel` computes five
tokens both ways when it is made and refuses a model whose logits it does not reproduce.

Trap: models in training mode may drop activations or jitter their routing; rollout, old and new log-probs would then be
of different networks. `HFConfig.build` sets those rates to 0, and so they are saved.

Shapes: B rows, T positions, M targets that count, D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError, nearest
from lit_reason.models.hf_check import attention_kinds, check_against, context
from lit_reason.models.hf_files import new_folder
from lit_reason.models.transformer import Hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_reason.models.hf_cache import PositionCache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True, slots=True)
class HFShape:
    """What the stages ask of a model's config; no multi-token prediction, no balance loss of ours.

    Args:
        source: the transformers config as JSON, so that equal shapes mean the same architecture.
    """

    max_seq_len: int
    vocab_size: int
    mtp_depth: int = 0
    mtp_loss: float = 0.0
    balance_loss: float = 0.0
    source: str = field(default="", repr=False)


@dataclass
class HFConfig:
    """Which model, and how it is held.

    Example::

        model = HFConfig("Qwen/Qwen3-0.6B").build()

    Args:
        name: a folder of transformers (config.json, *.safetensors), or a hub name.
        dtype: of the trained weights, `"float32"` or `"bfloat16"`; small updates are lost in bfloat16, and
            trainer.precision says what is computed in.
        attn: `"sdpa"` or `"eager"`.
    """

    name: str
    dtype: str = "float32"
    attn: str = "sdpa"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype={self.dtype!r}: {nearest(str(self.dtype), DTYPES)}")
        if self.attn not in ATTENTION:
            raise ConfigError(f"model.attn={self.attn!r}: {nearest(str(self.attn), ATTENTION)}")
        if Path(self.name).expanduser().is_dir():
            _check_files(Path(self.name).expanduser())
        elif self.name.startswith(("/", ".", "~")) or self.name.count("/") != 1:
            raise ConfigError(
                f"model.name={self.name}: there is no such folder. Type model.name=PATH of a folder that holds "
                "config.json and *.safetensors, or a hub name such as model.name=Qwen/Qwen3-0.6B"
            )

    def build(self) -> HFModel:
        """The model with its weights, in training mode, on the CPU.

        Raises:
            ConfigError: no such model, no causal language model, no safetensors, weights that are incomplete, or a
                family whose logits `HFModel` cannot reproduce.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        name, safe = str(Path(self.name).expanduser()), {"trust_remote_code": False}
        if not Path(name).is_dir():
            name = self.name
        try:
            config = without_noise(AutoConfig.from_pretrained(name, **safe))
            lm, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                name,
                config=config,
                dtype=DTYPES[self.dtype],
                attn_implementation=self.attn,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ConfigError(
                f"model.name={self.name} is no causal language model that transformers can load from safetensors "
                f"without code of its own: {error}\nType model.name=PATH of such a folder, or a hub name"
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"model.name={self.name}: the files lack {len(missing)} of the model's tensors ({missing[0]}, ...), "
                "which would stay random. Give the folder of a causal language model, not of a classifier or an adapter"
            )
        if lm.generation_config is not None:
            try:
                lm.generation_config.validate(strict=True)
            except ValueError:  # a temperature without do_sample, say: it loads, but could not be saved after training
                lm.generation_config.do_sample = True
        return HFModel(lm).train()


class HFModel(nn.Module):
    """A transformers model behind `CausalLM`, so that every stage and the builtin engine can use it.

    It cannot replay the experts that an engine chose: every family routes in a class of its own.

    Example::

        model = HFModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        model.save("runs/tuned")

    Args:
        lm: a causal language model of transformers; `config` is read from it once.

    Raises:
        ConfigError: a recurrent, multimodal or bidirectional model, or one whose logits come out otherwise here.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.train(lm.training)
        self.kinds, self.window = attention_kinds(lm)
        if not isinstance(output := lm.get_output_embeddings(), nn.Linear):
            raise ConfigError(f"{type(lm).__name__} names no output embeddings, so it is no causal language model")
        source = lm.config.to_json_string(use_diff=False)
        self.config = HFShape(context(lm.config), output.weight.shape[0], source=source)
        self._warned = False
        check_against(self, lm)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HFModel:  # type: ignore[override]
        """Trap: `.to(bfloat16)` would round the rotary frequencies; buffers keep their dtype."""
        kept = {name: buffer.detach() for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != kept[name].dtype:
                buffer.data = kept[name].to(buffer.device)
        return self

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BTV."""
        return self.head(self.hidden(input_ids_BT).states_BTD)

    @property
    def head(self) -> nn.Module:
        """Made when asked: the output embeddings may be replaced, and a second name for them would be saved twice."""
        head = self.full_head()
        return head.output if head.scale == 1 and head.cap is None else head  # a plain linear map goes by tiles

    def full_head(self) -> Head:
        """The output embeddings, with what follows them even if it does nothing."""
        return Head(self.lm)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def _embedding(self) -> Tensor:
        weight = self.lm.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def hidden(
        self, input_ids_BT: Tensor, valid_BT: Tensor | None = None, cache: PositionCache | None = None
    ) -> Hidden:
        """What the head reads at every position, and a balance loss of 0.

        Args:
            input_ids_BT: int64, right-padded.
            valid_BT: bool, False for padding; None: all is real.
            cache: filled with the keys and values of these positions.
        """
        B, T = input_ids_BT.shape
        if self.config.max_seq_len < T:
            raise ConfigError(f"a sequence of {T} tokens; this model takes {self.config.max_seq_len}")
        position_BT = torch.arange(T, device=input_ids_BT.device).expand(B, T)
        mask_BT = torch.ones_like(input_ids_BT) if valid_BT is None else valid_BT.long()
        states_BTD = self._trunk(input_ids_BT, mask_BT, position_BT, cache)
        return Hidden(states_BTD, states_BTD.new_zeros((), dtype=torch.float32))

    def further(self, hidden: Hidden, target_ids_BT: Tensor, valid_BT: Tensor | None = None) -> list[Hidden]:
        """Nothing: there is no multi-token prediction."""
        return []

    def states_at(self, input_ids_BT: Tensor, counts_BT: Tensor, experts_BTLK: Tensor | None = None) -> Tensor:
        """states_MD that the head reads to predict the targets that count, in row-major order.

        Args:
            input_ids_BT: int64, right-padded; what follows a row's last counted target is not computed on.
            counts_BT: bool, targets (the token after each input) that count.
            experts_BTLK: not replayed, with a warning the first time.
        """
        if experts_BTLK is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"the engine told its experts, but a {type(self.lm).__name__} of transformers cannot replay them: it "
                "chooses its own. Watch mismatch/kl; PolicyModule(..., replay_routing=False) silences this",
                stacklevel=2,
            )
        kept_B = counts_BT.any(1)
        kept_B[0] |= ~kept_B.any()  # nothing counts: one row all the same, so that there is a graph with gradients of 0
        counts_BT = counts_BT[kept_B]
        position_T = torch.arange(counts_BT.shape[1], device=counts_BT.device)
        end_B = (counts_BT * (position_T + 1)).amax(1).clamp_min(1)
        T = int(end_B.max())
        states_BTD = self.hidden(input_ids_BT[kept_B, :T], position_T[:T] < end_B[:, None]).states_BTD
        return states_BTD[counts_BT[:, :T]]

    def new_cache(self, rows: int, capacity: int) -> PositionCache:
        """An empty cache; `prefill` gives it its rows and positions."""
        from lit_reason.models.hf_cache import PositionCache

        return PositionCache()

    def prefill(self, input_ids_BT: Tensor, length_B: Tensor, cache: PositionCache) -> Tensor:
        """Reads right-padded prompts of `length_B` tokens into the cache; logits_BV of each row's last token."""
        valid_BT = torch.arange(input_ids_BT.shape[1], device=length_B.device) < length_B[:, None]
        states_BTD = self.hidden(input_ids_BT, valid_BT, cache).states_BTD
        return self.head(states_BTD[torch.arange(len(length_B), device=length_B.device), length_B - 1])

    def decode(self, token_B: Tensor, position_B: Tensor, cache: PositionCache) -> Tensor:
        """One token per row at `position_B`; logits_BV of the next."""
        from lit_reason.models.hf_cache import decode_mask

        mask = decode_mask(self.kinds, self.window, position_B, cache.at(position_B), self._embedding.dtype)
        return self.head(self._trunk(token_B[:, None], mask, position_B[:, None], cache)[:, 0])

    def _trunk(self, ids_BT: Tensor, mask: Any, position_BT: Tensor, cache: PositionCache | None) -> Tensor:
        return self.lm.base_model(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def routers(self) -> list[Any]:
        """None that is balanced without a loss."""
        return []

    def save(self, folder: str | Path, extra: Callable[[Path], object] | None = None) -> Path:
        """Writes a folder for transformers (config.json, safetensors); whole or not at all. Returns it.

        Args:
            folder: must not exist, or be empty.
            extra: writes further files, a tokenizer's for instance, into the folder that it is given.

        Raises:
            ConfigError: the folder is not empty.
        """
        folder = Path(folder).absolute()
        with new_folder(folder) as temporary:
            self.lm.save_pretrained(str(temporary))
            if extra is not None:
                extra(temporary)
        return folder


class Head(nn.Module):
    """Output embeddings, then what some families do to the logits: cap * tanh(scale * logits / cap).

    The scale is Cohere's `logit_scale`, one over Granite's `logits_scaling`, Falcon-H1's `lm_head_multiplier`; the cap
    Gemma's `final_logit_softcapping` (2408.00118).
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.output, config = cast(nn.Linear, lm.get_output_embeddings()), lm.config
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.scale *= getattr(config, "lm_head_multiplier", None) or 1.0
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, states: Tensor) -> Tensor:
        return self.finish(self.output(states))

    def finish(self, logits: Tensor) -> Tensor:
        """The logits that count, from those of the output embeddings."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def without_noise(config: Any) -> Any:
    """The config with every rate of dropout and of routing noise at 0."""
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key or key == "router_jitter_noise"):
            setattr(config, key, 0.0)
    return config


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.name={folder} holds no config.json; give the folder of a transformers model")
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for path in sorted((*folder.glob("*.bin"), *folder.glob("*.pt*")))]
    raise ConfigError(
        f"model.name={folder} holds no *.safetensors"
        + (f", only {pickled[0]}: a pickle can run code when it is read, so it is refused" if pickled else "")
        + ". Give a folder with safetensors; save_pretrained of transformers writes one"
    )
