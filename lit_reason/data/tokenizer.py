"""Tokenizers: a byte-level one that ships with the small models, and any Hugging Face one by path or hub name.

Text of a user or a dataset is encoded with `specials=False`: a question that holds the characters `<answer>` then
becomes plain bytes and can never forge a special token. Only templates are encoded with `specials=True`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from lit_reason.errors import DataError

BYTE_SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)
BYTE_FILE = "byte_tokenizer.json"


@runtime_checkable
class Tokenizer(Protocol):
    """What every stage asks of a tokenizer."""

    vocab_size: int
    pad_id: int
    bos_id: int | None
    stop_ids: tuple[int, ...]

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Token ids; text that spells a special token becomes that token only if `specials`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens spelled out."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that identify the vocabulary: equal fingerprints mean equal ids for equal text."""
        ...

    def save(self, path: str | Path) -> None:
        """Write into the folder `path` what `load_tokenizer(path)` needs."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are ids 0..255, special tokens 256.., the rest up to 271 is reserved.

    272 ids: a multiple of 16, so that the unembedding's matrix product has no ragged edge.

    Example::

        >>> ByteTokenizer().encode("1+2<think>", specials=True)
        [49, 43, 50, 261]
    """

    vocab_size = 272
    specials = BYTE_SPECIALS

    def __init__(self) -> None:
        self._ids = {text: 256 + i for i, text in enumerate(BYTE_SPECIALS)}
        self._texts = {i: text for text, i in self._ids.items()}
        self._split = re.compile("(" + "|".join(re.escape(text) for text in BYTE_SPECIALS) + ")")
        self.pad_id: int = self._ids["<|pad|>"]
        self.bos_id: int | None = self._ids["<|bos|>"]
        self.stop_ids: tuple[int, ...] = (self._ids["<|end|>"],)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Bytes of `text`; with `specials`, the spelled-out special tokens become single ids."""
        if not specials:
            return list(text.encode("utf-8", errors="replace"))
        ids: list[int] = []
        for piece in self._split.split(text):
            special = self._ids.get(piece)
            ids.extend([special] if special is not None else piece.encode("utf-8", errors="replace"))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens spelled out; bytes that are no UTF-8 become U+FFFD (models do write such)."""
        out, run = [], bytearray()
        for i in map(int, ids):
            if 0 <= i < 256:
                run.append(i)
                continue
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is outside this tokenizer's 0..{self.vocab_size - 1}")
            out.append(run.decode("utf-8", errors="replace"))
            run.clear()
            out.append(self._texts.get(i, f"<|reserved_{i}|>"))
        out.append(run.decode("utf-8", errors="replace"))
        return "".join(out)

    def fingerprint(self) -> str:
        return _digest(["bytes", self.vocab_size, *BYTE_SPECIALS])

    def save(self, path: str | Path) -> None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"type": "bytes", "specials": BYTE_SPECIALS, "fingerprint": self.fingerprint()}
        (folder / BYTE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def save_for_transformers(tokenizer: Tokenizer, folder: Path, chat_template: str | None) -> None:
    """What `AutoTokenizer.from_pretrained(folder)` needs for the same ids.

    There a special token that is spelled out in a question becomes that token; `encode(text)` here keeps it bytes.

    Args:
        chat_template: Jinja text; None leaves the tokenizer its own, if it has one.
    """
    tokenizer.save(folder)
    if isinstance(tokenizer, ByteTokenizer):
        _save_bytes(tokenizer, folder)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _save_bytes(tokenizer: ByteTokenizer, folder: Path) -> None:
    """The byte tokenizer as a byte-level BPE without merges."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    specials = [*BYTE_SPECIALS, *(f"<|reserved_{i}|>" for i in range(256 + len(BYTE_SPECIALS), tokenizer.vocab_size))]
    vocabulary = _byte_letters() | {text: 256 + i for i, text in enumerate(specials)}
    backend = Backend(models.BPE(vocabulary, merges=[]))  # type: ignore[call-arg]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[misc]
    backend.decoder = decoders.ByteLevel()  # type: ignore[misc]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    pad, bos, _, _, end, *_ = BYTE_SPECIALS
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=end, clean_up_tokenization_spaces=False
    ).save_pretrained(str(folder))
    # transformers 5 writes a class name that 4 does not know; both know this one.
    config = folder / "tokenizer_config.json"
    document = json.loads(config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _byte_letters() -> dict[str, int]:
    """The letter by which byte-level vocabularies write each byte: itself where it can be seen, else U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


class HFTokenizer:
    """A Hugging Face tokenizer from a local folder or a hub name; think and answer tags are ordinary text to it.

    Args:
        path: folder with `tokenizer.json` and friends, or a hub name such as `"Qwen/Qwen3-0.6B"`.
        revision: commit of a hub repository; a pinned one makes the vocabulary reproducible.
    """

    def __init__(self, path: str | Path, revision: str | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            self._hf = AutoTokenizer.from_pretrained(str(path), revision=revision or "main")
        except (OSError, ValueError) as error:
            raise DataError(
                f"no tokenizer at {str(path)!r}: {error}\n"
                "Give 'bytes', a folder that holds tokenizer.json, or a Hugging Face name such as 'Qwen/Qwen3-0.6B'."
            ) from error
        stop = self._hf.eos_token_id
        if stop is None:
            raise DataError(f"the tokenizer at {str(path)!r} has no eos_token; set one in its tokenizer_config.json")
        pad = self._hf.pad_token_id
        self.vocab_size: int = len(self._hf)
        self.pad_id: int = stop if pad is None else pad
        self.bos_id: int | None = self._hf.bos_token_id
        self.stop_ids: tuple[int, ...] = (stop,)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        return list(self._hf.encode(text, add_special_tokens=False, split_special_tokens=not specials))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._hf.decode([int(i) for i in ids], skip_special_tokens=False))

    def fingerprint(self) -> str:
        backend = getattr(self._hf, "backend_tokenizer", None)
        if backend is None:
            return _digest(sorted(self._hf.get_vocab().items()))
        record = json.loads(backend.to_str())
        # the two are call-time state, not vocabulary
        return _digest({key: value for key, value in record.items() if key not in ("truncation", "padding")})

    def save(self, path: str | Path) -> None:
        self._hf.save_pretrained(str(path))


def load_tokenizer(name_or_path: str | Path = "bytes") -> Tokenizer:
    """`"bytes"`, a folder written by `Tokenizer.save`, any local Hugging Face folder, or a hub name."""
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    record_path = Path(name_or_path) / BYTE_FILE
    if not record_path.is_file():
        return HFTokenizer(name_or_path)
    tokenizer = ByteTokenizer()
    try:
        saved = json.loads(record_path.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record_path} is damaged ({error}); copy it again from where the model came from") from error
    check_fingerprint(tokenizer, saved, where=str(record_path))
    return tokenizer


def check_fingerprint(tokenizer: Tokenizer, expected: str, where: str = "the checkpoint") -> None:
    """Refuse a tokenizer whose vocabulary is not the one that `where` was made with."""
    got = tokenizer.fingerprint()
    if got != expected:
        raise DataError(
            f"the tokenizer does not match {where}: its fingerprint is {got}, expected {expected}. "
            "Load the tokenizer that was saved beside the model: load_tokenizer(FOLDER)."
        )


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
