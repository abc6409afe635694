"""One identity per question: canonical text, id, and the train/test split that hangs on nothing else.

Seeds cannot keep train and test apart (a procedural dataset's seeds 1 and 2 give the same items shifted by one, and an
easy task repeats itself), so an item is held out by the hash of its question, whichever seed, source or run met it.
"""

from __future__ import annotations

import hashlib
import unicodedata

from lit_reason.errors import ConfigError


def canonical(question: str) -> str:
    """Unicode NFKC, case folded, white space collapsed: what makes two questions the same.

    Example::

        >>> canonical("  What is\\n\\n2 + 3?")
        'what is 2 + 3?'
    """
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split())


def prompt_id(question: str) -> str:
    """The first 16 hex digits of sha256 of the canonical question."""
    return hashlib.sha256(canonical(question).encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def held_out(prompt_id: str, fraction: float) -> bool:
    """True for the share `fraction` (0..1) of all possible questions that is never trained on.

    Raising the fraction only adds questions to the test side: those held out at 0.1 are also held out at 0.2.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"got held_out_fraction={fraction}; give a number from 0 to 1, e.g. 0.1")
    return int(prompt_id, 16) < fraction * 16**16
