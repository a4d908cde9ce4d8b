from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.text.factories import gguf_bpe, gguf_gemma, gguf_sentencepiece
from tgi_cli.detokenizer import Detokenizer, TextDelta
from tgi_cli.tokenizer import Tokenizer, load_tokenizer

KINDS = ("byte level", "sentencepiece", "gemma")
VOCAB = 420  # the smallest of the three


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    place: Path = tmp_path_factory.mktemp("tokenizers")
    paths = (
        gguf_bpe(place / "b.gguf", "qwen2"),
        gguf_sentencepiece(place / "s.gguf"),
        gguf_gemma(place / "g.gguf"),
    )
    return {kind: load_tokenizer(str(path)) for kind, path in zip(KINDS, paths, strict=True)}


token_ids = st.lists(st.integers(0, VOCAB + 5), max_size=60)
chunked = st.lists(st.lists(st.integers(0, VOCAB + 5), max_size=5), max_size=20)
kinds = st.sampled_from(KINDS)


def visible_and_open(tokenizer: Tokenizer, prompt: list[int], skip: bool) -> str:
    """The decoded prompt without an unfinished last character."""
    raw = [tokenizer.token_bytes(i) for i in prompt if not (skip and tokenizer.is_special(i))]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    finished = decoder.decode(b"".join(raw))
    whole = tokenizer.decode(prompt, skip)
    return whole if not decoder.getstate()[0] else whole[: len(whole) - 1] if finished else ""


@settings(max_examples=150)
@given(kind=kinds, chunks=chunked, skip=st.booleans())
def test_deltas_join_to_the_decoded_answer(
    tokenizers: dict[str, Tokenizer], kind: str, chunks: list[list[int]], skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    stream = Detokenizer(tokenizer, (), skip_special_tokens=skip)
    deltas = [stream.push(chunk) for chunk in chunks]
    text = "".join(delta.text for delta in deltas) + stream.finish()
    answer = [token_id for chunk in chunks for token_id in chunk]
    assert text == tokenizer.decode(answer, skip)
    assert [len(delta.token_texts) for delta in deltas] == [len(chunk) for chunk in chunks]
    assert stream.finish() == ""


@settings(max_examples=150)
@given(kind=kinds, prompt=token_ids, answer=token_ids, skip=st.booleans())
def test_answer_continues_its_prompt(
    tokenizers: dict[str, Tokenizer], kind: str, prompt: list[int], answer: list[int], skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    stream = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    text = stream.push(answer).text + stream.finish()
    seen = visible_and_open(tokenizer, prompt, skip)
    assert seen + text == tokenizer.decode([*prompt, *answer], skip)


def stop_reference(text: str, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
    """Character by character: the stop string complete first, of those the longest."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return end - len(stop), end, stop
    return None


@settings(max_examples=300)
@given(
    data=st.data(),
    text=st.text("abc €", max_size=60),
    stops=st.lists(st.text("abc €", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_tokens(
    tokenizers: dict[str, Tokenizer],
    data: st.DataObject,
    text: str,
    stops: list[str],
    include: bool,
) -> None:
    tokenizer = tokenizers["byte level"]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=20)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
    stream = Detokenizer(tokenizer, (), stop=tuple(stops), include_stop=include)
    seen = ""
    found = stop_reference(text, tuple(stops))
    limit = len(text) if found is None else found[1] if include else found[0]
    last = TextDelta("", [])
    for token_id in ids:
        last = stream.push([token_id])
        seen += last.text
        # Never more than may be shown, and never less than is certain.
        assert text[:limit].startswith(seen)
        if last.stopped is not None:
            break
    seen += stream.finish()
    assert seen == text[:limit]
    assert stream.stopped == (found and found[2])
    if found is not None:
        assert last.stop_span is not None
        ends, total = [], 0
        for token_id in ids:
            total += len(tokenizer.token_bytes(token_id))
            ends.append(total)
        first = len(text[: found[0]].encode())
        begin = next(i for i, end in enumerate(ends) if end > first)
        final = next(i for i, end in enumerate(ends) if end >= len(text[: found[1]].encode()))
        # A character belongs to the token that completes it.
        whole = len(text[: found[0] + 1].encode())
        shown = next(i for i, end in enumerate(ends) if end >= whole)
        assert begin <= last.stop_span[0] == shown
        assert last.stop_span[1] == final


def push_text(stream: Detokenizer, tokenizer: Tokenizer, *pieces: str) -> list[TextDelta]:
    return [stream.push(tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces]


def test_character_in_several_tokens_comes_whole(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gemma"]
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") or -1 for byte in "🤖".encode()]
    stream = Detokenizer(tokenizer, ())
    deltas = [stream.push([token_id]) for token_id in ids]
    assert [delta.text for delta in deltas] == ["", "", "", "🤖"]
    assert [delta.token_texts for delta in deltas] == [[""], [""], [""], ["🤖"]]
    assert stream.push(ids[:2]).text == ""
    assert stream.finish() == "\ufffd"


def test_text_that_may_be_a_stop_waits(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte level"]
    stream = Detokenizer(tokenizer, (), stop=("###", "<end>"))
    texts = [delta.text for delta in push_text(stream, tokenizer, "a#", "#", "b<en", "dx", "<e")]
    assert texts == ["a", "", "##b", "<endx", ""]
    assert stream.finish() == "<e"


def test_stop_inside_one_token_and_across_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte level"]
    word = tokenizer.encode(" hello", add_special_tokens=False)
    for stop, cut, kept in (("ell", " h", " hell"), ("o w", " hell", " hello w")):
        for include, expected in ((False, cut), (True, kept)):
            stream = Detokenizer(tokenizer, (), stop=(stop,), include_stop=include)
            first = stream.push(word)
            rest = push_text(stream, tokenizer, " world")[0]
            assert first.text + rest.text + stream.finish() == expected
            assert stream.stopped == stop


def test_nothing_comes_after_a_stop(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte level"]
    ids = [tokenizer.encode(char, add_special_tokens=False)[0] for char in "abcXYdef"]
    stream = Detokenizer(tokenizer, (), stop=("XY",))
    delta = stream.push(ids)
    assert delta == TextDelta("abc", ["a", "b", "c", "X", "Y"], "XY", (3, 4))
    assert stream.push(ids) == TextDelta("", [], "XY", (3, 4))
    assert stream.finish() == ""


def test_special_tokens_have_a_text_but_are_not_in_the_answer(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["byte level"]
    ids = tokenizer.encode("hi<|im_end|>", add_special_tokens=False)
    delta = Detokenizer(tokenizer, ()).push(ids)
    assert delta.text == "hi"
    assert delta.token_texts[-1] == "<|im_end|>"
    shown = Detokenizer(tokenizer, (), skip_special_tokens=False).push(ids)
    assert shown.text == "hi<|im_end|>"


@pytest.mark.parametrize("skip", [False, True])
def test_special_token_as_stop(tokenizers: dict[str, Tokenizer], skip: bool) -> None:
    tokenizer = tokenizers["byte level"]
    ids = tokenizer.encode("hi<|im_end|>more", add_special_tokens=False)
    stop = ("<|im_end|>", "ij")
    stream = Detokenizer(tokenizer, (), stop=stop, skip_special_tokens=skip)
    delta = stream.push(ids)
    at = ids.index(2)
    assert (delta.text, delta.stopped, delta.stop_span) == ("hi", "<|im_end|>", (at, at))
    assert len(delta.token_texts) == at + 1


def test_leading_space_goes_only_where_the_text_begins(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    prompt = tokenizer.encode("hello", add_special_tokens=True)
    (word,) = tokenizer.encode("the", add_special_tokens=False)
    assert Detokenizer(tokenizer, ()).push([word, word]).text == "the the"
    assert Detokenizer(tokenizer, [1]).push([word, word]).text == "the the"
    assert Detokenizer(tokenizer, prompt).push([word, word]).text == " the the"


def test_work_is_linear_in_the_answer(tokenizers: dict[str, Tokenizer]) -> None:
    """Nothing decoded is kept, also when every token may be the start of a stop string."""
    tokenizer = tokenizers["byte level"]
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    stream = Detokenizer(tokenizer, (), stop=("aaab", "b" * 50))
    total = 0
    for _ in range(5000):
        total += len(stream.push([letter]).text)
        assert len(stream._held) <= 3
        assert len(stream._held_from) <= 3
    assert total + len(stream.finish()) == 5000


@pytest.mark.parametrize(
    ("stops", "stopped", "text"),
    [
        (("the", "h"), "h", " t"),  # complete first, though it begins later
        (("e", "he", "the"), "the", " "),  # complete together: the longest
        (("the", "the"), "the", " "),
        (("", "e"), "e", " th"),
    ],
)
def test_several_stops_in_one_token(
    tokenizers: dict[str, Tokenizer], stops: tuple[str, ...], stopped: str, text: str
) -> None:
    tokenizer = tokenizers["byte level"]
    (word,) = tokenizer.encode(" the", add_special_tokens=False)
    delta = Detokenizer(tokenizer, (), stop=stops).push([word])
    assert (delta.text, delta.stopped, delta.stop_span) == (text, stopped, (0, 0))
