"""What carries loss in a conversation, over templates that behave as those of real models do.

The templates are written for these tests: each does in a few lines what its models' template does in one respect.
Expected labels are texts: in ⟦ ⟧ is what carries loss.
"""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from perta_fast import InputError
from perta_fast.data.rows import Row, rows_from
from perta_fast.data.samples import IGNORED, by_row, encode, row_count, truncated_count
from perta_fast.models.loading import Subject, samples_for
from perta_fast.progress import Event
from perta_fast.rules import Estimator
from perta_fast.runs.estimate_importance import estimate_importance
from tests.support.models import CHAT_TEMPLATE, llama, tokenizer

Content = dict[str, Any]


def made(template: str, *marks: str, end: str = "<eos>") -> PreTrainedTokenizerFast:
    """A tokenizer with this template, and ``marks`` as special tokens."""
    chosen = tokenizer(template)
    chosen.add_special_tokens({"additional_special_tokens": [mark for mark in marks if mark != "<eos>"]})
    chosen.eos_token = end
    return chosen


def shown(chosen: PreTrainedTokenizerFast, row: Content, *stops: str) -> list[str]:
    """The samples of a row, in ⟦ ⟧ what carries loss."""
    ends = [chosen.convert_tokens_to_ids(stop) for stop in stops]
    return [sample.marked(chosen) for sample in encode([Row(row, "here")], chosen, 1000, ends)]


def talk(*contents: str | Content, system: str | None = None) -> Content:
    """A conversation: user, assistant, user, ...; a dictionary is an assistant's whole message."""
    messages: list[Content] = [] if system is None else [{"role": "system", "content": system}]
    for k, content in enumerate(contents):
        own = content if isinstance(content, dict) else {"content": content}
        messages.append({"role": ("user", "assistant")[k % 2], **own})
    return {"messages": messages}


QUESTION = {"question": "Who?", "answer": "Me."}
TWO = talk("Who?", "Me.", "And?", "You.")

# Qwen 3: an empty think block before the last answer; think blocks of earlier turns are dropped.
BLOCK = made(
    "{%- set ns = namespace(asked=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought = m.reasoning_content or '' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.asked %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + call.name + '</tool_call>' }}{%- endfor %}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "<|im_start|>", "<|im_end|>", end="<|im_end|>",
)  # fmt: skip

# Mistral 7B v0.3, Nemo: the system message stands in the last message, if that is the user's.
LAST = made(
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- for m in rest %}{%- if m.role == 'user' %}{{- '[INST] ' }}"
    "{%- if loop.last and system is defined %}{{- system + '\n\n' }}{%- endif %}{{- m.content + '[/INST]' }}"
    "{%- else %}{%- for call in m.tool_calls or [] %}{{- '[CALL]' + call.name }}{%- endfor %}"
    "{%- if m.content %}{{- ' ' + m.content }}{%- endif %}{{- eos_token }}{%- endif %}{%- endfor %}",
    "[INST]", "[/INST]", "[CALL]",
)  # fmt: skip

# Phi 3: the end of text after all.
AFTER_ALL = made(
    "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}",
    "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip

# gpt-oss: another end at the last turn, channels, reasoning of the last turn alone.
CHANNELS = made(
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if m.thinking and loop.last %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", end="<|return|>",
)  # fmt: skip

# DeepSeek R1 and its distillations, QwQ: the generation prompt opens a think block that the rendered answer lacks.
OPENED = made(
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<A>' + m.content.split('</think>')[-1] + eos_token }}{%- else %}{{- '<U>' + m.content }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<A><think>\n' }}{%- endif %}",
    "<A>", "<U>",
)  # fmt: skip

# Qwen 3.5: the generation prompt opens the think block that the rendered turn has.
OPENED_BOTH = made(
    BLOCK.chat_template.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"),
    "<|im_start|>", "<|im_end|>", end="<|im_end|>",
)  # fmt: skip

# Command R7B: marks around the answer, and the header of a next turn after it.
NEXT_HEADER = made(
    "{%- for m in messages %}{{- '<T><' + m.role + '>' }}"
    "{{- '<R>' + m.content + '</R>' if m.role == 'assistant' else m.content }}{{- '</T>' }}{%- endfor %}"
    "{{- '<T><assistant>' }}{%- if add_generation_prompt %}{{- '<R>' }}{%- endif %}",
    "<T>", "</T>", "<R>", "</R>", "<user>", "<assistant>", end="</T>",
)  # fmt: skip

# GLM 4.5: no turn is closed; the model stops by beginning the user's next one.
UNCLOSED = made(
    "{%- for m in messages %}{{- '<|' + m.role + '|>\n' }}"
    "{{- '<think></think>\n' + m.content.strip() if m.role == 'assistant' else m.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
    "<|user|>", "<|assistant|>",
)  # fmt: skip

# Apertus: a turn is closed by what follows it.
CLOSED_LATER = made(
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if not loop.first %}{{- '</A>' }}{%- endif %}{{- '<U>' + m.content + '</U>' }}"
    "{%- else %}{{- '<A>' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<A>' }}{%- endif %}",
    "<A>", "</A>", "<U>", "</U>", end="</A>",
)  # fmt: skip

# Llama 2: contents are stripped; a space before the answer, and one before its end.
SPACES = made(
    "{%- for m in messages %}{{- '[INST] ' + m.content.strip() + ' [/INST]' if m.role == 'user' else "
    "' ' + m.content.strip() + ' ' + eos_token }}{%- endfor %}"
)

# Alpaca and its like: no mark at all, but a line break after each turn.
UNMARKED = made(
    "{%- for m in messages %}{{- '### ' + m.role + ':\n' + m.content + '\n\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### assistant:\n' }}{%- endif %}"
)

# Kimi K3: words between the marks that end a turn; the last one stops the model.
WORDS_IN_END = made(
    "{%- for m in messages %}{{- '<|open|>' + m.role + '<|sep|>' + m.content + '<|close|>' + m.role + '<|end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|open|>assistant<|sep|>' }}{%- endif %}",
    "<|open|>", "<|sep|>", "<|close|>", "<|end|>", end="<|end|>",
)  # fmt: skip

TABLE: dict[str, tuple[PreTrainedTokenizerFast, Content, list[str]]] = {
    "an empty think block": (
        BLOCK, QUESTION,
        ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Me.<|im_end|>⟧\n"],
    ),
    "an empty think block in each turn as it is spoken": (
        BLOCK, TWO,
        [
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Me.<|im_end|>⟧\n",
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦You.<|im_end|>⟧\n",
        ],
    ),
    "reasoning in the content": (
        BLOCK, talk("Who?", "<think>\nHm.\n</think>\n\nMe."),
        ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nHm.\n</think>\n\nMe.<|im_end|>⟧\n"],
    ),
    "reasoning in a field of its own": (
        BLOCK, talk("Who?", {"content": "Me.", "reasoning_content": "Hm."}),
        ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nHm.\n</think>\n\nMe.<|im_end|>⟧\n"],
    ),
    "reasoning that the generation prompt opens": (
        OPENED_BOTH, talk("Who?", "<think>\nHm.\n</think>\n\nMe."),
        ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦Hm.\n</think>\n\nMe.<|im_end|>⟧\n"],
    ),
    "an empty think block that the generation prompt opens": (
        OPENED_BOTH, QUESTION,
        ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Me.<|im_end|>⟧\n"],
    ),
    "a call": (
        BLOCK, talk("Who?", {"content": "", "tool_calls": [{"name": "find"}]}),
        [
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            "⟦<tool_call>find</tool_call><|im_end|>⟧\n"
        ],
    ),
    "reasoning on one line": (
        BLOCK, talk("Who?", "<think>Hm.</think>Me."),
        ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nHm.\n</think>\n\nMe.<|im_end|>⟧\n"],
    ),
    "reasoning alone": (
        BLOCK, talk("Who?", {"content": "", "reasoning_content": "Hm."}),
        ["<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nHm.\n</think>\n\n<|im_end|>⟧\n"],
    ),
    "a call without a content": (
        BLOCK, talk("Who?", {"content": None, "tool_calls": [{"name": "find"}]}),
        [
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            "⟦<tool_call>find</tool_call><|im_end|>⟧\n"
        ],
    ),
    "a question that the header holds": (
        BLOCK, {**talk("a", "Me."), "tools": [{"name": "find"}]},
        ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Me.<|im_end|>⟧\n"],
    ),
    "a call after a system message that only the last user's message shows": (
        LAST, talk("Who?", {"content": "", "tool_calls": [{"name": "find"}]}, system="Brief."),
        ["[INST] Brief.\n\nWho?[/INST]⟦[CALL]find<eos>⟧"],
    ),
    "words in the end of a turn": (
        WORDS_IN_END, QUESTION,
        ["<|open|>user<|sep|>Who?<|close|>user<|end|><|open|>assistant<|sep|>⟦Me.<|close|>assistant<|end|>⟧"],
    ),
    "a system message that only the last user's message shows": (
        LAST, talk("Who?", "Me.", "And?", "You.", system="Brief."),
        [
            "[INST] Brief.\n\nWho?[/INST] ⟦Me.<eos>⟧",
            "[INST] Who?[/INST] Me.<eos>[INST] Brief.\n\nAnd?[/INST] ⟦You.<eos>⟧",
        ],
    ),
    "no system message there": (LAST, TWO, ["[INST] Who?[/INST] ⟦Me.<eos>⟧[INST] And?[/INST] ⟦You.<eos>⟧"]),
    "the end of text after all": (
        AFTER_ALL, TWO,
        [
            "<|user|>\nWho?<|end|>\n<|assistant|>\n⟦Me.<|end|>⟧\n"
            "<|user|>\nAnd?<|end|>\n<|assistant|>\n⟦You.<|end|>⟧\n<eos>"
        ],
    ),
    "another end at the last turn": (
        CHANNELS, TWO,
        [
            "<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>final<|message|>⟦Me.<|return|>⟧",
            "<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>final<|message|>Me.<|end|>"
            "<|start|>user<|message|>And?<|end|><|start|>assistant<|channel|>final<|message|>⟦You.<|return|>⟧",
        ],
    ),
    "reasoning in a channel": (
        CHANNELS, talk("Who?", {"content": "Me.", "thinking": "Hm."}),
        [
            "<|start|>user<|message|>Who?<|end|><|start|>assistant⟦<|channel|>analysis<|message|>Hm.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Me.<|return|>⟧"
        ],
    ),
    "a think block that only the prompt opens": (
        OPENED, TWO, ["<U>Who?<A>⟦Me.<eos>⟧<U>And?<A>⟦You.<eos>⟧"],
    ),
    "a think block that the template drops": (
        OPENED, talk("Who?", "<think>Hm.</think>Me."), ["<U>Who?<A>⟦Me.<eos>⟧"],
    ),
    "the header of a next turn": (
        NEXT_HEADER, TWO,
        ["<T><user>Who?</T><T><assistant><R>⟦Me.</R></T>⟧<T><user>And?</T><T><assistant><R>⟦You.</R></T>⟧<T><assistant>"],
    ),
    "turns that what follows closes": (
        CLOSED_LATER, TWO, ["<U>Who?</U><A>⟦Me.</A>⟧<U>And?</U><A>⟦You.</A>⟧"],
    ),
    "spaces that the template puts": (
        SPACES, talk("Who?", " Me.\n", "And?", "You."),
        ["[INST] Who? [/INST] ⟦Me.⟧ ⟦<eos>⟧[INST] And? [/INST] ⟦You.⟧ ⟦<eos>⟧"],
    ),
    "no marks": (UNMARKED, QUESTION, ["### user:\nWho?\n\n### assistant:\n⟦Me.<eos>⟧"]),
}  # fmt: skip


# "Who?" and "Me." in each template, whatever form the row has.
ONE_TURN: dict[str, tuple[PreTrainedTokenizerFast, str]] = {
    "Qwen 3": (
        BLOCK,
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Me.<|im_end|>⟧\n",
    ),
    "Qwen 3.5": (
        OPENED_BOTH,
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Me.<|im_end|>⟧\n",
    ),
    "Mistral": (LAST, "[INST] Who?[/INST] ⟦Me.<eos>⟧"),
    "Phi": (AFTER_ALL, "<|user|>\nWho?<|end|>\n<|assistant|>\n⟦Me.<|end|>⟧\n<eos>"),
    "gpt-oss": (
        CHANNELS, "<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>final<|message|>⟦Me.<|return|>⟧",
    ),
    "R1": (OPENED, "<U>Who?<A>⟦Me.<eos>⟧"),
    "Command R7B": (NEXT_HEADER, "<T><user>Who?</T><T><assistant><R>⟦Me.</R></T>⟧<T><assistant>"),
    "GLM": (UNCLOSED, "<|user|>\nWho?<|assistant|>\n<think></think>\n⟦Me.<eos>⟧"),
    "Apertus": (CLOSED_LATER, "<U>Who?</U><A>⟦Me.</A>⟧"),
    "Llama 2": (SPACES, "[INST] Who? [/INST] ⟦Me.⟧ ⟦<eos>⟧"),
    "Alpaca": (UNMARKED, "### user:\nWho?\n\n### assistant:\n⟦Me.<eos>⟧"),
    "Kimi": (
        WORDS_IN_END,
        "<|open|>user<|sep|>Who?<|close|>user<|end|><|open|>assistant<|sep|>⟦Me.<|close|>assistant<|end|>⟧",
    ),
}  # fmt: skip
ASKED, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
SAME: list[Content] = [
    QUESTION,
    {"prompt": "Who?", "completion": "Me."},
    {"prompt": "Who?", "response": "Me."},
    {"instruction": "Who?", "input": "", "output": "Me."},
    {"messages": [ASKED, SAID]},
    {"messages": [ASKED, SAID], "question": None, "tools": None},
    {"prompt": [ASKED], "completion": [SAID]},
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
    {"conversations": [ASKED, {**SAID, "weight": 1}]},
]


@pytest.mark.parametrize("name", ONE_TURN)
def test_every_form_of_a_row_has_the_same_labels(name: str) -> None:
    chosen, expected = ONE_TURN[name]
    samples = encode(rows_from(SAME), chosen, 1000)
    assert [sample.marked(chosen) for sample in samples] == [expected] * len(SAME)
    (text,) = encode(rows_from([{"text": "Who? Me."}]), chosen, 1000)
    assert text.marked(chosen) == "⟦Who? Me.⟧"


@pytest.mark.parametrize("case", TABLE)
def test_the_assistants_words_and_the_end_of_its_turn(case: str) -> None:
    chosen, row, expected = TABLE[case]
    assert shown(chosen, row) == expected


def word_marking(like: PreTrainedTokenizerFast, *, opens: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that marks spaces as SentencePiece does, with the template and marks of ``like``.

    opens: each text between marks begins a word, as in Llama 2; or not, as in Gemma.
    """
    bpe = Tokenizer(models.BPE())
    prepended = [normalizers.Prepend("▁")] if opens else []
    bpe.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    letters = "".join(map(chr, range(32, 127))) + "\n"
    texts = [letters, *("Who? Me. And? You. Brief. Hm. user assistant system\n" * 3).splitlines()]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", chat_template=like.chat_template)
    made.add_special_tokens({"additional_special_tokens": list(like.get_added_vocab())})
    made.eos_token = like.eos_token
    return made


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("case", TABLE)
def test_the_same_with_tokens_as_sentencepiece_makes_them(case: str, opens: bool) -> None:
    """But for spaces: a space may belong to the word after it or before it."""

    def without_spaces(texts: list[str]) -> list[str]:
        return [text.replace(" ", "").replace("⟧⟦", "") for text in texts]

    like, row, expected = TABLE[case]
    assert without_spaces(shown(word_marking(like, opens=opens), row)) == without_spaces(expected)


def test_an_end_that_only_the_models_settings_name() -> None:
    header = "<|user|>\nWho?<|assistant|>\n<think></think>\n"
    assert shown(UNCLOSED, QUESTION) == [f"{header}⟦Me.<eos>⟧"]
    assert shown(UNCLOSED, QUESTION, "<|user|>") == [f"{header}⟦Me.<|user|>⟧"]
    assert shown(UNCLOSED, TWO, "<|user|>") == [
        f"{header}⟦Me.<|user|>⟧\nAnd?<|assistant|>\n<think></think>\n⟦You.<|user|>⟧"
    ]


# Contents.


@pytest.mark.parametrize("chosen", [BLOCK, LAST, AFTER_ALL, CHANNELS, OPENED, NEXT_HEADER, CLOSED_LATER])
@pytest.mark.parametrize("answer", ["\nMe.", "\n\n Me. \n", "<|user|>", "Who?", "\ue0a70\ue0a8", "{{ x }}", "é😀"])
def test_any_answer_comes_back(chosen: PreTrainedTokenizerFast, answer: str) -> None:
    (sample,) = encode(rows_from([{"question": "Who?", "answer": answer}]), chosen, 1000)
    said = chosen.decode([label for label in sample.labels if label != IGNORED])
    assert answer.strip() in said
    assert "Who?" not in said.replace(answer, "")


def test_a_first_line_break_does_not_merge_with_the_header() -> None:
    """As Qwen 2.5 and SmolLM2 have it: the header ends in a line break, and two of them are one token."""
    chosen = made(AFTER_ALL.chat_template, "<|user|>", "<|assistant|>", "<|end|>")
    chosen.add_tokens(["\n\n"])
    header = "<|user|>\nWho?<|end|>\n<|assistant|>\n"
    (sample,) = encode(rows_from([{"question": "Who?", "answer": "\nMe."}]), chosen, 1000)
    prompt = chosen(header, add_special_tokens=False)["input_ids"]
    assert list(sample.input_ids[: len(prompt)]) == prompt
    assert sample.marked(chosen) == f"{header}⟦\nMe.<|end|>⟧\n<eos>"


def test_turns_of_weight_0_carry_no_loss() -> None:
    row = talk("Who?", {"content": "Me.", "weight": 0}, "And?", {"content": "You.", "weight": 1})
    assert shown(AFTER_ALL, row) == [
        "<|user|>\nWho?<|end|>\n<|assistant|>\nMe.<|end|>\n<|user|>\nAnd?<|end|>\n<|assistant|>\n⟦You.<|end|>⟧\n<eos>"
    ]
    row = talk("Who?", {"content": "Me.", "weight": 1}, "And?", {"content": "You.", "weight": 0})
    assert shown(AFTER_ALL, row) == ["<|user|>\nWho?<|end|>\n<|assistant|>\n⟦Me.<|end|>⟧\n<eos>"]


def test_tools_are_given_to_the_template() -> None:
    chosen = made("{%- for tool in tools or [] %}{{- tool.name + ';' }}{%- endfor %}" + CHAT_TEMPLATE)
    row = {**TWO, "tools": [{"name": "find"}, {"name": "run"}]}
    (text,) = shown(chosen, row)
    assert text.startswith("find;run;<|user|>Who?<eos><|assistant|>⟦Me.<eos>⟧")


# A template with marks of its own.

MARKED = CHAT_TEMPLATE.replace(
    "{{ message.content }}<eos>",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<eos>{% endgeneration %}"
    "{% else %}{{ message.content }}<eos>{% endif %}",
)
MARKED_BLOCK = BLOCK.chat_template.replace(
    "{{- content }}", "{%- generation %}{{- content }}<|im_end|>{%- endgeneration %}"
).replace("{{- '<|im_end|>\n' }}", "{{- '\n' if m.role == 'assistant' else '<|im_end|>\n' }}")


@pytest.mark.parametrize("row", [QUESTION, TWO, talk("Who?", "Me.", system="Brief."), talk("Who?", "\n é😀")])
@pytest.mark.parametrize(
    ("marking", "plain", "end"), [(MARKED, CHAT_TEMPLATE, "<eos>"), (MARKED_BLOCK, BLOCK.chat_template, "<|im_end|>")]
)
def test_ours_is_the_mask_that_a_template_gives_itself(marking: str, plain: str, end: str, row: Content) -> None:
    marks = ("<|im_start|>", "<|im_end|>")
    ours, own = (encode(rows_from([row]), made(text, *marks, end=end), 1000) for text in (plain, marking))
    assert ours == own
    assert any(label != IGNORED for label in own[0].labels)


def test_the_mask_of_a_template_is_taken_as_it_is() -> None:
    chosen = made(MARKED.replace("<eos>{% endgeneration %}", "{% endgeneration %}<eos>"))
    assert shown(chosen, QUESTION) == ["<|user|>Who?<eos><|assistant|>⟦Me.⟧<eos>"]
    weighed = talk("Who?", {"content": "Me.", "weight": 0}, "And?", "You.")
    assert shown(chosen, weighed) == ["<|user|>Who?<eos><|assistant|>Me.<eos><|user|>And?<eos><|assistant|>⟦You.⟧<eos>"]


def test_in_a_template_with_marks_too_the_header_keeps_its_tokens() -> None:
    chosen = made(
        MARKED.replace("{{ message.role }}|>", "{{ message.role }}|>\n").replace("assistant|>", "assistant|>\n")
    )
    chosen.add_tokens(["\n\n"])
    (sample,) = encode(rows_from([{"question": "Who?", "answer": "\nMe."}]), chosen, 1000)
    header = "<|user|>\nWho?<eos><|assistant|>\n"
    prompt = chosen(header, add_special_tokens=False)["input_ids"]
    assert list(sample.input_ids[: len(prompt)]) == prompt
    assert sample.marked(chosen) == f"{header}⟦\nMe.<eos>⟧"


def test_a_template_with_marks_that_hides_the_text_is_refused() -> None:
    hides = "{% for m in messages %}<|{{ m.role }}|>{% generation %}<eos>{% endgeneration %}{% endfor %}"
    with pytest.raises(InputError, match="what the assistant says is not found"):
        shown(made(hides), QUESTION)


# A row that gives several samples counts once.


def test_a_row_counts_once() -> None:
    samples = encode(rows_from([TWO, QUESTION, talk("Who?", "Me.", "And?", "It was you.")]), BLOCK, 1000)
    assert [list(numbers) for numbers in by_row(samples)] == [[0, 1], [2], [3, 4]]
    assert row_count(samples) == 3
    counts = [sample.label_count for sample in samples]
    shares = [counts[0] / sum(counts[:2]), counts[1] / sum(counts[:2]), 1.0]
    shares += [counts[3] / sum(counts[3:]), counts[4] / sum(counts[3:])]
    assert [sample.share for sample in samples] == pytest.approx(shares)


def test_a_cut_row_is_marked_in_all_its_samples() -> None:
    row = {**talk("Who?", "Me.", "And?", "You. " * 50, "Or?", "They.")}
    (whole, cut) = (encode([Row(row, "here"), Row(QUESTION, "here")], BLOCK, length) for length in (10_000, 100))
    assert [sample.truncated for sample in whole] == [False] * 4
    assert [sample.truncated for sample in cut] == [True] * (len(cut) - 1) + [False]
    assert len(cut) < len(whole)  # the last turn lies beyond the limit
    assert (row_count(cut), truncated_count(cut), truncated_count(whole)) == (2, 1, 0)


def test_a_row_in_several_samples_has_the_gradient_of_its_labels(one_thread: None) -> None:
    """The mean over all labels of the row, as if it were one sequence; its squares are those of its samples."""
    chosen = BLOCK
    model = llama(vocab_size=len(chosen))
    rows = [TWO, QUESTION]
    samples = encode(rows_from(rows), chosen, 1000)
    found = estimate_importance(model, rows, "grad", tokenizer=chosen, progress=False)
    squares = estimate_importance(model, rows, "empirical-fisher", tokenizer=chosen, progress=False)
    assert found.metadata.sample_count == squares.metadata.sample_count == 2

    def gradient(numbers: list[int]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        losses = []
        for k in numbers:
            ids = torch.tensor([samples[k].input_ids])
            logits = model(input_ids=ids).logits[0, :-1]
            labels = torch.tensor(samples[k].labels[1:])
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED))
        (torch.stack(losses).sum() / sum(samples[k].label_count for k in of_row)).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    of_row = [0, 1]
    first, parts = gradient([0, 1]), [gradient([0]), gradient([1])]
    of_row = [2]
    second = gradient([2])
    for name in first:
        expected = (first[name] + second[name]) / 2
        torch.testing.assert_close(found.tensors[name], expected, rtol=1e-4, atol=1e-7)
        expected = (sum(part[name] ** 2 for part in parts) + second[name] ** 2) / 2
        torch.testing.assert_close(squares.tensors[name], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("estimator", ["grad", "empirical-fisher"])
def test_a_row_in_several_samples_streamed(estimator: Estimator, tmp_path: Path, one_thread: None) -> None:
    llama(vocab_size=len(BLOCK)).save_pretrained(tmp_path / "model")
    BLOCK.save_pretrained(tmp_path / "model")
    rows = [TWO, QUESTION, talk("Who?", "Me.", "And?", "It was you.", "Or?", "They.")]
    found, expected = (
        estimate_importance(tmp_path / "model", rows, estimator, progress=False, **how)
        for how in ({"stream": True, "out": tmp_path / "streamed"}, {})
    )
    assert found.metadata.sample_count == expected.metadata.sample_count == 3
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=1e-7)


# Many rows.


def test_memory_beyond_the_samples_does_not_grow_with_the_rows() -> None:
    def beyond(count: int) -> int:
        rows = [
            Row({"question": f"Who wrote book {k}?", "answer": f"Author {k} wrote it."}, "here") for k in range(count)
        ]
        encode(rows[:1], BLOCK, 1000)
        tracemalloc.start()
        try:
            samples = encode(rows, BLOCK, 1000)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(samples) == count
        return peak - kept

    assert beyond(4000) < 1.5 * beyond(1000)


def test_many_rows_show_how_far_they_are() -> None:
    seen: list[Event] = []
    subject = Subject(llama(vocab_size=len(BLOCK)), BLOCK, "live module")
    for count in (10, 2500):
        samples_for(subject, [Row(QUESTION, "here")] * count, None, seen.append)
    assert {(event.phase, event.total, event.unit) for event in seen} == {("tokenising", 2500, "sample")}
    assert [event.done for event in seen] == sorted(event.done for event in seen)
    assert seen[-1].done == 2500


def test_the_models_settings_are_found_beside_its_weights(tmp_path: Path) -> None:
    model = llama(vocab_size=len(UNCLOSED))
    model.generation_config.eos_token_id = [0, UNCLOSED.convert_tokens_to_ids("<|user|>")]
    model.save_pretrained(tmp_path)
    rows = [Row(QUESTION, "here")]
    for subject in (
        Subject(model, UNCLOSED, "live module"),
        Subject(llama(vocab_size=len(UNCLOSED)), UNCLOSED, str(tmp_path)),  # as a structure without weights
    ):
        (sample,) = samples_for(subject, rows, None)
        assert sample.marked(UNCLOSED).endswith("⟦Me.<|user|>⟧")


# What cannot be found is refused.


def test_an_answer_that_the_template_hides_is_refused() -> None:
    with pytest.raises(InputError, match=r"here: what the assistant says is not found in what the chat template"):
        shown(made("{% for m in messages %}<|{{ m.role }}|>{% endfor %}"), QUESTION)
