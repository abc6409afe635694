"""The chat template: how a question is put to the model, and how a worked solution is written.

<|bos|><|user|>QUESTION<|assistant|>            the prompt
<think>THOUGHT</think><answer>ANSWER</answer><|end|>   the completion

An environment writes into a completion: a tool's <result>TEXT</result>, or the next question of a conversation.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from lit_reason.data.tokenizer import ByteTokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Tags around question, thought and answer; the defaults are single tokens of `ByteTokenizer`.

    Example::

        >>> ChatTemplate().render_prompt("1 + 2 =")
        '<|bos|><|user|>1 + 2 =<|assistant|>'
        >>> ChatTemplate().render_solution("1+2=3", "3")
        '<think>1+2=3</think><answer>3</answer><|end|>'
    """

    before_question: str = "<|bos|><|user|>"
    after_question: str = "<|assistant|>"
    think_open: str = "<think>"
    think_close: str = "</think>"
    answer_open: str = "<answer>"
    answer_close: str = "</answer>"
    end: str = "<|end|>"
    result_open: str = "<result>"
    result_close: str = "</result>"

    def render_prompt(self, question: str) -> str:
        """The prompt as text, for people; models get `prompt_ids`."""
        return f"{self.before_question}{question}{self.after_question}"

    def render_solution(self, thought: str, answer: str) -> str:
        """The completion as text, for people; models get `solution_ids`."""
        think = f"{self.think_open}{thought}{self.think_close}"
        return f"{think}{self.answer_open}{answer}{self.answer_close}{self.end}"

    def jinja(self) -> str:
        """`render_prompt` of a single question, for tokenizers of transformers and for vLLM's chat."""
        before, after = (json.dumps(text, ensure_ascii=False) for text in (self.before_question, self.after_question))
        refusal = "this model was trained on one question at a time: give one message of the role user, a text"
        return (
            "{%- if messages | length != 1 or messages[0]['role'] != 'user' or messages[0]['content'] is not string -%}"
            f"{{{{ raise_exception({json.dumps(refusal)}) }}}}{{%- endif -%}}"
            f"{{{{ {before} + messages[0]['content'] + {after} }}}}"
        )

    def prompt_ids(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """The prompt as ids; the question's own characters never become special tokens."""
        return [
            *tokenizer.encode(self.before_question, specials=True),
            *tokenizer.encode(question),
            *tokenizer.encode(self.after_question, specials=True),
        ]

    def result_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """What a tool said, as ids, to be read in the middle of a completion."""
        return [
            *tokenizer.encode(self.result_open, specials=True),
            *tokenizer.encode(self.without_tags(text)),
            *tokenizer.encode(self.result_close, specials=True),
        ]

    def next_question_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """A further message to the model, after the stop token of its own: `prompt_ids` without the first token."""
        ids = self.prompt_ids(tokenizer, self.without_tags(text))
        return ids[1:] if ids[0] == tokenizer.bos_id else ids

    def without_tags(self, text: str) -> str:
        """`text` without any of the tags: decoded, its own would look like the model's, and could answer for it."""
        tags = (self.think_open, self.think_close, self.answer_open, self.answer_close)
        pattern = "|".join(re.escape(tag) for tag in (*tags, self.result_open, self.result_close))
        while (rest := re.sub(pattern, "", text)) != text:  # what is left of "<ans<answer>wer>" is a tag again
            text = rest
        return text

    def solution_ids(self, tokenizer: Tokenizer, thought: str, answer: str) -> list[int]:
        """The completion as ids, ending in the tokenizer's first stop token."""
        return [
            *tokenizer.encode(self.think_open, specials=True),
            *tokenizer.encode(thought),
            *tokenizer.encode(self.think_close + self.answer_open, specials=True),
            *tokenizer.encode(answer),
            *tokenizer.encode(self.answer_close, specials=True),
            tokenizer.stop_ids[0],
        ]


def default_chat(tokenizer: Tokenizer) -> ChatTemplate:
    """The template that fits: tags as single tokens for bytes, plain words around the question for any other."""
    if isinstance(tokenizer, ByteTokenizer):
        return ChatTemplate()
    bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
    return ChatTemplate(
        before_question=f"{bos}User: ",
        after_question="\nAssistant: ",
        end=tokenizer.decode([tokenizer.stop_ids[0]]),
    )
