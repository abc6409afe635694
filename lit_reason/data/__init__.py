"""Problems, tokens and worked solutions: everything that comes before generation."""

from lit_reason.data.chat import ChatTemplate, default_chat
from lit_reason.data.curriculum import Curriculum
from lit_reason.data.cursor import PromptCursor
from lit_reason.data.datamodule import SFTData, TextData
from lit_reason.data.loader import CursorLoader
from lit_reason.data.priming import priming
from lit_reason.data.prompts import PromptData, load_prompts
from lit_reason.data.questions import canonical, held_out, prompt_id
from lit_reason.data.solvers import solve
from lit_reason.data.sources import GSM8K, JSONL, ReasoningGym
from lit_reason.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, check_fingerprint, load_tokenizer

__all__ = [
    "GSM8K",
    "JSONL",
    "ByteTokenizer",
    "ChatTemplate",
    "Curriculum",
    "CursorLoader",
    "HFTokenizer",
    "PromptCursor",
    "PromptData",
    "ReasoningGym",
    "SFTData",
    "TextData",
    "Tokenizer",
    "canonical",
    "check_fingerprint",
    "default_chat",
    "held_out",
    "load_prompts",
    "load_tokenizer",
    "priming",
    "prompt_id",
    "solve",
]
