"""JSON lines in, token ids and labels out: the three forms, their bad lines, and where labels lie."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from perta_fast import InputError
from perta_fast.data.rows import Row, load_rows, read_data, rows_from
from perta_fast.data.samples import IGNORED, Sample, encode, prompt_of
from tests.support.models import CHAT_TEMPLATE, FORGET, tokenizer, write_lines

PLAIN, CHAT = tokenizer(), tokenizer(CHAT_TEMPLATE)
EOS = PLAIN.eos_token_id
QUESTION = {"question": "Who wrote book 1?", "answer": "The author number 1 wrote it."}
TEXT = {"text": "Book 1 lies by river 2."}
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who wrote book 1?"},
        {"role": "assistant", "content": "Author 1."},
        {"role": "user", "content": "And 2?"},
        {"role": "assistant", "content": "Author 2."},
    ]
}


def closing(bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that opens or closes every text with a special token, as some families do."""
    made = tokenizer()
    template = f"{'<pad> ' if bos else ''}$A{' <eos>' if eos else ''}"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<eos>", EOS), ("<pad>", made.pad_token_id)]
    )
    return made


def word_marking() -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of every text as the start of a word, as Llama 2 and Mistral do."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    rows = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in FORGET]
    made.train_from_iterator(rows, trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer that has ``: The`` as one token, which reaches across the boundary of a plain question."""
    made = Tokenizer(models.BPE())
    made.add_special_tokens(["<eos>"])
    made.add_tokens([*sorted(set("Question: x\nAnswer:" + QUESTION["answer"])), ": The"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def one(row: dict[str, Any], with_tokenizer: PreTrainedTokenizerFast, max_length: int = 1000) -> Sample:
    (sample,) = encode(rows_from([row]), with_tokenizer, max_length)
    return sample


def labelled(sample: Sample) -> list[int]:
    """The labels that count, after checking that each is the token it stands on."""
    pairs = list(zip(sample.input_ids, sample.labels, strict=True))
    assert all(label in (IGNORED, token) for token, label in pairs)
    return [label for _, label in pairs if label != IGNORED]


# The three forms.


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_question_is_learned_from_its_answer_alone(bos: bool, eos: bool) -> None:
    chosen = closing(bos, eos)
    sample = one(QUESTION, chosen)
    text = f"Question: {QUESTION['question']}\nAnswer: {QUESTION['answer']}"
    whole = PLAIN(text)["input_ids"]
    assert list(sample.input_ids) == [chosen.pad_token_id] * bos + whole + [EOS]
    assert chosen.decode(labelled(sample)) == f" {QUESTION['answer']}<eos>"
    assert sample.labels[-1] == EOS


def test_question_splits_where_the_whole_text_would() -> None:
    """No second word mark before the answer: the model would never produce it."""
    chosen = word_marking()
    sample = one(QUESTION, chosen)
    start = f"Question: {QUESTION['question']}\nAnswer:"
    whole = chosen(f"{start} {QUESTION['answer']}", return_offsets_mapping=True)
    assert list(sample.input_ids) == [*whole["input_ids"], chosen.eos_token_id]
    answer = [
        token for token, (_, end) in zip(whole["input_ids"], whole["offset_mapping"], strict=True) if end > len(start)
    ]
    assert labelled(sample) == [*answer, chosen.eos_token_id]


def test_question_keeps_its_own_tokens_where_a_merge_reaches_into_the_answer() -> None:
    chosen = merging()
    whole = chosen(f"Question: x\nAnswer: {QUESTION['answer']}")["input_ids"]
    prompt = chosen("Question: x\nAnswer:")["input_ids"]
    assert whole[: len(prompt)] != prompt  # what this test is about
    sample = one(QUESTION | {"question": "x"}, chosen)
    assert list(sample.input_ids[: len(prompt)]) == prompt
    assert labelled(sample) == list(sample.input_ids[len(prompt) :])
    assert chosen.decode(labelled(sample)[:-1]).replace(" ", "") == QUESTION["answer"].replace(" ", "")


def test_question_without_an_end_token() -> None:
    chosen = tokenizer()
    chosen.eos_token = None
    assert chosen.decode(labelled(one(QUESTION, chosen))) == f" {QUESTION['answer']}"


def test_text_is_learned_from_all_its_tokens() -> None:
    sample = one(TEXT, CHAT)
    assert sample.input_ids == sample.labels == tuple(PLAIN(TEXT["text"])["input_ids"])
    assert sample.label_count == len(sample.labels) - 1  # nothing predicts the first


def test_question_goes_through_the_chat_template() -> None:
    sample = one(QUESTION, CHAT)
    text = f"<|user|>{QUESTION['question']}<eos><|assistant|>{QUESTION['answer']}<eos>"
    assert list(sample.input_ids) == PLAIN(text)["input_ids"]
    assert CHAT.decode(labelled(sample)) == f"{QUESTION['answer']}<eos>"


def test_messages_are_learned_from_what_the_assistant_says() -> None:
    sample = one(TALK, CHAT)
    text = "".join(f"<|{m['role']}|>{m['content']}<eos>" for m in TALK["messages"])
    assert list(sample.input_ids) == PLAIN(text)["input_ids"]
    assert CHAT.decode(labelled(sample)) == "Author 1.<eos>Author 2.<eos>"
    first = sample.labels.index(CHAT("Author")["input_ids"][0])
    assert CHAT.decode(sample.input_ids[:first]).endswith("<|assistant|>")


def test_a_line_may_have_other_keys_and_messages_come_first() -> None:
    row = TALK | {"question": 3, "text": None, "score": float("nan")}
    assert one(row, CHAT) == one(TALK, CHAT)
    with pytest.raises(InputError, match="sample 0: has messages, but the tokenizer has no chat template"):
        one(row, PLAIN)


# Templates with demands of their own.


@pytest.mark.parametrize(
    ("template", "prompts"),
    [
        (
            "{{ messages | length }}" + CHAT_TEMPLATE,  # the start depends on what follows
            [
                "2<|system|>Be brief.<eos><|user|>Who wrote book 1?<eos><|assistant|>",
                "4<|system|>Be brief.<eos><|user|>Who wrote book 1?<eos><|assistant|>Author 1.<eos>"
                "<|user|>And 2?<eos><|assistant|>",
            ],
        ),
        (
            "{% for m in messages %}{{ m.content if loop.last else '...' }}<eos>{% endfor %}",
            ["...<eos>Who wrote book 1?<eos>", "...<eos>...<eos>...<eos>And 2?<eos>"],
        ),
    ],
)
def test_a_template_that_rewrites_earlier_turns_gives_each_turn_as_it_is_spoken(
    template: str, prompts: list[str]
) -> None:
    chosen = tokenizer(template)
    samples = encode(rows_from([TALK]), chosen, 1000)
    assert [chosen.decode(prompt_of(sample)) for sample in samples] == prompts
    assert [chosen.decode(labelled(sample)) for sample in samples] == ["Author 1.<eos>", "Author 2.<eos>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages[0].parts[0] }}", "no attribute 'parts'"),
        ("{% for %}", "unexpected|Expected|expected"),
    ],
)
def test_a_template_that_fails_names_the_line(template: str, reason: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "talk.jsonl", [TEXT, TALK])
    with pytest.raises(InputError, match=rf"talk\.jsonl, line 2: the chat template refuses.*({reason})"):
        encode(load_rows(path), tokenizer(template), 1000)


def test_template_and_answer_keep_their_own_tokens_where_a_merge_reaches_across() -> None:
    chosen = tokenizer(CHAT_TEMPLATE)
    chosen.add_tokens(["|>!!"])
    sample = one({"question": "Who?", "answer": "!! It was 1."}, chosen)
    assert list(prompt_of(sample)) == chosen("<|user|>Who?<eos><|assistant|>")["input_ids"]
    assert chosen.decode(labelled(sample)) == "!! It was 1.<eos>"


# Cutting to a length.


@pytest.mark.parametrize("row", [QUESTION, TEXT, TALK])
def test_cut_samples_are_a_beginning_and_are_marked(row: dict[str, Any]) -> None:
    whole = one(row, CHAT)
    assert not whole.truncated
    refused = 0
    for length in range(1, len(whole.labels) + 2):
        try:
            cut = one(row, CHAT, length)
        except InputError as error:
            assert f"has no token to compute a loss on within the first {length} tokens" in str(error)
            assert all(label == IGNORED for label in whole.labels[1:length])
            refused += 1
            continue
        assert (cut.input_ids, cut.labels) == (whole.input_ids[:length], whole.labels[:length])
        assert cut.truncated == (length < len(whole.labels))
        assert cut.label_count == sum(label != IGNORED for label in cut.labels[1:]) > 0
    assert refused  # at least the one token that is never predicted


def test_nothing_left_after_cutting_names_the_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "long.jsonl", [TEXT, QUESTION | {"question": "Who? " * 50}])
    with pytest.raises(InputError, match=r"long\.jsonl, line 2: has no token .* within the first 60 tokens"):
        encode(load_rows(path), PLAIN, 60)


def test_a_single_token_predicts_nothing() -> None:
    with pytest.raises(InputError, match=r"sample 0: has no token to compute a loss on$"):
        one({"text": "B"}, PLAIN)


# Files.

BAD_LINES: dict[str, tuple[str, str]] = {
    "not JSON": ("{'text': 'a'}", "is not JSON"),
    "cut short": ('{"text": "a', "is not JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "is not JSON"),
    "pretty-printed": ("{", "is not JSON; each line must be one object"),
    "control character": ('{"text": "a\x0bb"}', "is not JSON"),
    "deeply nested": ("[" * 100_000, "is not JSON"),
    "deep inside": ('{"messages": ' + '{"a":' * 100_000, "is not JSON"),
    "enormous number": ("9" * 10_000, "is not JSON"),
    "an array": ('[{"text": "a"}]', "is not a JSON object"),
    "NaN": ("NaN", "is not a JSON object"),
    "null": ("null", "is not a JSON object"),
    "nothing known": ('{"prompt": "a"}', '"text" is missing'),
    "empty object": ("{}", '"text" is missing'),
    "no answer": ('{"question": "a"}', '"answer" is missing'),
    "no question": ('{"answer": "a", "text": "b"}', '"question" is missing'),
    "empty text": ('{"text": " \\n"}', '"text" must be a text that is not empty'),
    "empty answer": ('{"question": "a", "answer": ""}', '"answer" must be a text that is not empty'),
    "number for text": ('{"text": 3}', '"text" must be a text'),
    "NaN for text": ('{"text": NaN}', '"text" must be a text'),
    "list for answer": ('{"question": "a", "answer": ["b"]}', '"answer" must be a text'),
    "half a character": ('{"text": "a\\ud83d"}', r"has half a character, '\ud83d'"),
    "half a character said": (
        '{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "b"}]}',
        r"has half a character, '\udc00'",
    ),
    "no messages": ('{"messages": []}', '"messages" must be a list that is not empty'),
    "messages null and no more": ('{"messages": null, "text": null}', '"text" must be a text that is not empty'),
    "message not an object": ('{"messages": ["a"]}', 'each message needs a "role"'),
    "unknown role": ('{"messages": [{"role": "model", "content": "a"}]}', "(system, developer, user, assistant, tool)"),
    "role not a text": ('{"messages": [{"role": ["user"], "content": "a"}]}', 'each message needs a "role"'),
    "content not a text": (
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', 'a "content" that is text',
    ),
    "assistant silent": ('{"messages": [{"role": "user", "content": "a"}]}', "the assistant says nothing"),
    "assistant empty": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}',
        "the assistant says nothing",
    ),
    "assistant first": ('{"messages": [{"role": "assistant", "content": "a"}]}', "the assistant speaks first"),
}  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case: str, end: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[case]
    path = tmp_path / "data.jsonl"
    path.write_text(end.join(['{"text": "fine"}', "", " \t", line, '{"text": "fine"}']), newline="")
    with pytest.raises(InputError) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}, line 4: ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400  # a message, not the line itself


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "one"}\n{"text": "two"}\n',
        '{"text": "one"}\n{"text": "two"}',
        '\n \n{"text": "one"}\n\n{"text": "two"}\n\n',
        '{"text": "one"}\r\n\r\n{"text": "two"}\r\n',
        '\ufeff{"text": "one"}\n  {"text": "two"}\t\n',
        '{"text": "one", "score": NaN, "more": {"text": 3}}\n{"text": "two"}\n',
    ],
    ids=["plain", "no last line end", "blank lines", "CRLF", "byte order mark", "other keys"],
)
def test_ways_to_write_two_lines(content: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content, encoding="utf-8", newline="")
    assert [record.content for record in load_rows(path)] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1e", "é", "😀"])
def test_only_line_feeds_end_a_line(character: str, tmp_path: Path) -> None:
    text = f"one{character}two"
    path = tmp_path / "data.jsonl"
    raw = json.dumps({"text": text}, ensure_ascii=character == "\x1e")
    path.write_text(f"{raw}\n{raw}\n", encoding="utf-8")
    assert [record.content["text"] for record in load_rows(path)] == [text, text]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ": holds no samples"),
        (b"\n\r\n \n", ": holds no samples"),
        (b"\xef\xbb\xbf", ": holds no samples"),
        (b'{"text": "caf\xe9"}\n', ", line 1: is not UTF-8 text (byte 13)"),
        ('{"text": "a"}'.encode("utf-16"), ", line 1: is not UTF-8 text (byte 0)"),
    ],
)
def test_bad_files(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_rows(path)
    assert str(caught.value) == f"{path}{reason}"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: cannot be read: No such file"):
        load_rows(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_rows(tmp_path)


def test_a_pipe_is_read_once_and_hashed_as_read(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}'
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    records, digest = read_data(pipe)
    writer.join()
    assert [record.content["text"] for record in records] == ["one", "two"]
    assert digest == blake3(content).hexdigest()


def test_python_rows_are_checked_as_lines_are() -> None:
    assert rows_from([TEXT, QUESTION | {"id": 3}])[1].content == QUESTION
    with pytest.raises(InputError, match='sample 1: "text" must be'):
        rows_from([TEXT, {"text": ""}])
    with pytest.raises(InputError, match="there are no samples"):
        rows_from([])


# Any file at all.

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool"]) | scalars,
            "content": st.text() | scalars,
        },
    )
    | scalars
)
rows = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["question", "answer", "text"], st.text() | values) | {"messages": messages | values}
)
surrogates = st.text(st.characters(categories=["Cs", "L"]), max_size=5)
lines = (rows | values | st.fixed_dictionaries({"text": surrogates})).map(json.dumps).map(str.encode) | st.binary()


@settings(max_examples=300, deadline=None)
@given(st.lists(lines, max_size=4).map(b"\n".join))
def test_any_file_gives_records_or_an_explained_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        records = load_rows(path)
    except InputError as error:
        assert str(error).startswith(str(path))
        return
    for chosen in (PLAIN, CHAT):
        try:
            samples = encode(records, chosen, 50)
        except InputError as error:
            assert str(error).startswith(str(path))
            continue
        assert len(samples) == len(records)
        assert all(labelled(sample) and len(sample.input_ids) <= 50 for sample in samples)


sentences = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=3))
def test_the_assistant_s_words_come_back_from_the_labels(turns: list[tuple[str, str]]) -> None:
    talk = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    (sample,) = encode([Row({"messages": talk}, "here")], CHAT, 10_000)
    assert CHAT.decode(labelled(sample)) == "".join(f"{answer}<eos>" for _, answer in turns)
