import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from duostream import train_tokenizer

TEXTS = ["What color is the square?", "Ein großer roter Kreis oben links.", "左上角有一个大的红色圆形。"]
SMALLEST = 256 + 7  # all bytes, and the special tokens


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 20, 400)


@given(text=st.text(max_size=60))
@example(text="你好，世界：左上角有一个红色圆形")
@example(text="Größe, Straße, ÄÖÜ; ein Maß — 3 €")
@example(text="👩‍👩‍👧 waves 👋🏽 with a flag 🇩🇪")
@example(text="  two leading spaces, a\ttab\r\n\n\nnew lines, and spaces behind \n ")
@example(text="e\u0301 is two code points, \u00e9 is one; \u0000 and \u200b too")
@example(text="a comma , a full stop . and I 'm a question ?")
@settings(max_examples=60)
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(st.text(max_size=20), min_size=2, max_size=4))
@settings(max_examples=20)
def test_any_texts_come_back_exactly_from_a_padded_batch(tokenizer, texts):
    batch = tokenizer(texts, padding=True)["input_ids"]
    assert len({len(row) for row in batch}) == 1
    assert tokenizer.batch_decode(batch, skip_special_tokens=True) == texts


def test_a_saved_tokenizer_encodes_and_decodes_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "  a , b . \n", "<|user|>Hi<|assistant|>"]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.pad_token_id == tokenizer.pad_token_id
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_special_tokens_come_first_in_a_fixed_order(tokenizer):
    # A config's `image_token_id` is 2 by default
    names = ["<|pad|>", "<|end|>", "<|image|>", "<|user|>", "<|assistant|>", "<|system|>", "<|mask|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.bos_token is None
    assert set(names) == set(tokenizer.all_special_tokens)


def test_a_special_token_is_one_token_and_left_out_on_request(tokenizer):
    ids = tokenizer.encode("<|user|>a<|end|>")
    assert ids == [3, *tokenizer.encode("a"), 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode("a", add_special_tokens=False)


def test_merges_are_learnt_from_the_texts(tokenizer):
    for text in TEXTS:
        assert len(tokenizer.encode(text)) < len(text.encode()) / 2


def test_the_vocabulary_is_as_large_as_the_texts_allow_and_no_larger_than_asked(tokenizer):
    assert len(tokenizer) <= 400
    assert len(train_tokenizer(TEXTS, SMALLEST + 10)) == SMALLEST + 10
    assert len(train_tokenizer([], 400)) == SMALLEST


def test_the_smallest_vocabulary_still_holds_every_byte():
    tokenizer = train_tokenizer(TEXTS, SMALLEST)
    assert len(tokenizer) == SMALLEST
    assert tokenizer.decode(tokenizer.encode("ß 你 👋")) == "ß 你 👋"


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match=f"`vocab_size` is {SMALLEST - 1}; expected at least {SMALLEST}"):
        train_tokenizer(TEXTS, SMALLEST - 1)


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    # Resumed pretraining trains its tokenizer again
    assert train_tokenizer(iter(TEXTS * 20), 400).get_vocab() == tokenizer.get_vocab()


def test_the_longest_input_is_kept():
    assert train_tokenizer(TEXTS, 300, model_max_length=77).model_max_length == 77
