"""Batches for masked tokens, classes and pairs hold what the rows said, and nothing to stumble over."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PythonBackend
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import (
    DuoStreamClassificationCollator,
    DuoStreamDataCollator,
    DuoStreamMaskedLMCollator,
    DuoStreamPreTrainingCollator,
    DuoStreamProcessor,
    DuoStreamRetrievalCollator,
    train_tokenizer,
)

NUM_TOKENS = 4
CAPTIONS = ["a large red circle in the center", "a small blue square at the top", "two dogs running over green grass"]


@pytest.fixture(scope="module")
def processor():
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return DuoStreamProcessor(image_processor, train_tokenizer(CAPTIONS * 30, 300), image_seq_length=NUM_TOKENS)


def caption_row(i, num_images=1):
    parts = [{"type": "image", "text": None}] * num_images + [{"type": "text", "text": "What is it?"}]
    return {
        "images": [Image.new("RGB", (20, 20), (80 * i, 10, 10))] * num_images,
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": CAPTIONS[i % 3]}]}],
        "row": i,
    }


def test_only_tokens_of_answers_are_masked_and_the_labels_are_what_they_were(processor):
    torch.manual_seed(0)
    rows = [caption_row(i) for i in range(3)] * 10
    plain = DuoStreamPreTrainingCollator(processor, mlm=False, pairs=False)(rows)
    batch = DuoStreamMaskedLMCollator(processor, mlm_probability=0.5)(rows)
    is_masked = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_masked], plain["input_ids"][is_masked])
    assert (plain["labels"][is_masked] != -100).all()
    assert torch.equal(batch["input_ids"][~is_masked], plain["input_ids"][~is_masked])
    assert not torch.isin(plain["input_ids"][is_masked], torch.tensor(processor.tokenizer.all_special_ids)).any()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_by_a_seed_a_row_has_the_same_tokens_masked_in_whatever_batch_it_stands(processor, padding_side):
    processor = copy.deepcopy(processor)
    processor.tokenizer.padding_side = padding_side
    rows = [caption_row(i) for i in range(3)]
    rows[1]["completion"][0]["content"] = [{"type": "text", "text": "a long answer " * 9}]
    for collator in (
        DuoStreamMaskedLMCollator(processor, mlm_probability=0.5, mask_seed=3),
        DuoStreamPreTrainingCollator(processor, mlm_probability=0.5, mask_seed=3),
    ):
        prefix = "masked_" if isinstance(collator, DuoStreamPreTrainingCollator) else ""

        def of_row(batch, i, prefix=prefix):
            is_valid = batch["attention_mask"][i] == 1
            return [batch[f"{prefix}{name}"][i, is_valid].tolist() for name in ("input_ids", "labels")]

        together = collator(rows)
        torch.rand(3)  # as dropout draws
        for i, row in enumerate(rows):
            assert of_row(collator([row]), 0) == of_row(together, i)
        assert any(label != -100 for label in of_row(together, 1)[1])
    other = DuoStreamMaskedLMCollator(processor, mlm_probability=0.5, mask_seed=4)(rows)
    assert not torch.equal(other["labels"], together["masked_labels"])


def test_most_are_replaced_by_the_mask_some_by_any_token_some_stay(processor):
    torch.manual_seed(0)
    rows = [caption_row(i) for i in range(3)] * 200
    plain = DuoStreamPreTrainingCollator(processor, mlm=False, pairs=False)(rows)
    batch = DuoStreamMaskedLMCollator(processor, mlm_probability=0.3)(rows)
    is_masked = batch["labels"] != -100
    share = is_masked.sum() / (plain["labels"] != -100).sum()
    replaced = (batch["input_ids"] == processor.tokenizer.mask_token_id)[is_masked].float().mean()
    stayed = (batch["input_ids"] == plain["input_ids"])[is_masked].float().mean()
    assert 0.2 < share < 0.32
    assert 0.77 < replaced < 0.83
    assert 0.08 < stayed < 0.12


def test_no_token_ever_becomes_the_placeholder_of_a_picture(processor):
    torch.manual_seed(0)
    collator = DuoStreamMaskedLMCollator(processor, mlm_probability=0.9)
    collator.masking.mask_replace_prob, collator.masking.random_replace_prob = 0.0, 1.0
    batch = collator([caption_row(i) for i in range(3)] * 100)
    assert ((batch["input_ids"] == processor.image_token_id).sum(dim=1) == NUM_TOKENS).all()


def word_piece():
    vocab = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "play": 3, "##ing": 4, "##s": 5, "dog": 6, "ball": 7, ".": 8}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


@pytest.mark.parametrize("kind", ["bytes", "word pieces"])
def test_whole_words_are_masked_or_not_at_all(kind):
    torch.manual_seed(0)
    tokenizer = word_piece() if kind == "word pieces" else train_tokenizer([], 263)
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, image_seq_length=NUM_TOKENS
    )
    collator = DuoStreamMaskedLMCollator(processor, mlm_probability=0.4, whole_word_mask=True)
    text = "dogs playing ball. dog plays balls"
    batch = collator([{"text": text}] * 50)
    # A token for each letter; or for each of these
    tokens = (
        ["dog", "##s", "play", "##ing", "ball", ".", "dog", "play", "##s", "ball", "##s"]
        if kind == "word pieces"
        else list(text)
    )
    first = [not t.startswith("##") if kind == "word pieces" else t in " ." for t in tokens]
    words = torch.tensor(first).long().cumsum(0)
    seen = set()
    for row in batch["labels"] != -100:
        for word in words.unique():
            chosen = row[words == word]
            assert chosen.all() or not chosen.any()
            seen.add(bool(chosen.any()))
    assert seen == {True, False}


class WithoutBackend(PythonBackend):
    """A tokenizer written in Python, as BERT's for Japanese."""

    def __init__(self, tokens):
        self.tokens = ["[PAD]", "[UNK]", "[MASK]", *tokens]
        super().__init__(pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")

    @property
    def vocab_size(self):
        return len(self.tokens)

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)} | self.added_tokens_encoder

    def _convert_token_to_id(self, token):
        return self.tokens.index(token) if token in self.tokens else 1

    def _convert_id_to_token(self, index):
        return self.tokens[index]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bytes", [" café", " über", ",", " Привет", " мир", " 左上角", "."]),
        # In whose vocabulary there is a word of hashes
        ("hashes", [" plain", " words", "##", " Title"]),
        ("pieces", ["▁caf", "<0xC3>", "<0xA9>", "▁pl", "ain", "."]),
        ("pieces", ["▁caf", "é", "Ġ", "▁नम", "स्", "ते"]),
        ("word pieces without a backend", ["play", "##ing", "dog", "##s"]),
    ],
)
def test_words_that_are_spelled_by_bytes_are_masked_whole(kind, words):
    torch.manual_seed(0)
    if "pieces" in kind:
        vocab = {token: i for i, token in enumerate(["[PAD]", "[MASK]", "▁", *words])}
        backend = Tokenizer(models.BPE(vocab, merges=[], byte_fallback=True))
        if "backend" in kind:
            tokenizer = WithoutBackend(words)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", mask_token="[MASK]")
        ids = tokenizer.convert_tokens_to_ids(words)
        lengths = {6: [3, 2, 1] if "." in words else [3, 3], 4: [2, 2]}[len(words)]
    else:
        tokenizer = train_tokenizer(["## Title ## Title"] * 5 if kind == "hashes" else [], 300)
        assert ("##" in tokenizer.get_vocab()) == (kind == "hashes")
        rows = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        ids, lengths = [token for row in rows for token in row], [len(row) for row in rows]
    processor = DuoStreamProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, image_seq_length=NUM_TOKENS
    )
    collator = DuoStreamMaskedLMCollator(processor, mlm_probability=0.4, whole_word_mask=True)
    input_ids = torch.tensor([ids] * 50)
    _, labels = collator.mask(input_ids, input_ids.clone())
    for row in labels != -100:
        assert all(chosen.all() or not chosen.any() for chosen in row.split(lengths))
    assert set((labels != -100).flatten().tolist()) == {True, False}


def test_a_tokenizer_without_a_mask_is_refused(processor):
    tokenizer = train_tokenizer([], 263)
    tokenizer.mask_token = None
    bare = DuoStreamProcessor(processor.image_processor, tokenizer, image_seq_length=NUM_TOKENS)
    with pytest.raises(ValueError, match="no mask token"):
        DuoStreamMaskedLMCollator(bare)
    DuoStreamPreTrainingCollator(bare, mlm=False)


def test_pairs_are_the_rows_with_one_picture_and_their_texts(processor):
    rows = [caption_row(0), caption_row(1, num_images=0), caption_row(2, num_images=2), caption_row(1)]
    batch = DuoStreamPreTrainingCollator(processor)(rows)
    texts = processor.tokenizer.batch_decode(batch["paired_input_ids"], skip_special_tokens=True)
    assert texts == [CAPTIONS[0], CAPTIONS[1]]
    assert batch["paired_images"].tolist() == [0, 3]
    assert len(batch["pixel_values"]) == 4


def test_rows_without_pictures_make_no_pairs(processor):
    batch = DuoStreamPreTrainingCollator(processor)([caption_row(0, num_images=0)])
    assert "paired_input_ids" not in batch and "masked_input_ids" in batch


def test_pictures_that_are_stored_as_states_make_pairs_too(processor):
    rows = [{**caption_row(i), "image_features": [torch.zeros(NUM_TOKENS, 24)]} for i in range(2)]
    expected = DuoStreamPreTrainingCollator(processor)([caption_row(i) for i in range(2)])
    for kept in ({"images": None}, {}):
        batch = DuoStreamPreTrainingCollator(processor)([{**row, **kept} for row in rows])
        assert torch.equal(batch["paired_input_ids"], expected["paired_input_ids"])
        assert "pixel_values" not in batch and len(batch["mm_encoder_outputs"]["image"].last_hidden_state) == 2


def test_where_nothing_is_masked_there_are_labels_that_say_so(processor):
    batch = DuoStreamPreTrainingCollator(processor, mlm=False)([caption_row(0)])
    assert "masked_input_ids" not in batch
    assert batch["masked_labels"].shape == batch["labels"].shape and (batch["masked_labels"] == -100).all()


def test_retrieval_pairs_each_picture_with_its_text(processor):
    batch = DuoStreamRetrievalCollator(processor)([caption_row(i) for i in range(3)])
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == CAPTIONS and batch["return_loss"] is True
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


def test_retrieval_names_the_row_whose_picture_is_not_there_to_read(processor):
    row = {**caption_row(1), "image_features": [torch.zeros(NUM_TOKENS, 24)]}
    with pytest.raises(ValueError, match="Row 1: expected a picture in `images`"):
        DuoStreamRetrievalCollator(processor)([caption_row(0), row])


@pytest.mark.parametrize("num_images", [0, 2])
def test_retrieval_names_the_row_that_has_not_one_picture(processor, num_images):
    with pytest.raises(ValueError, match=f"Row 1: expected one picture .* not {num_images}"):
        DuoStreamRetrievalCollator(processor)([caption_row(0), caption_row(1, num_images=num_images)])


@pytest.mark.parametrize(
    ("collator", "options"), [(DuoStreamRetrievalCollator, {}), (DuoStreamPreTrainingCollator, {"mlm": False})]
)
@pytest.mark.parametrize("text", ["", " "], ids=repr)
def test_a_picture_without_a_text_that_belongs_to_it_names_its_row(processor, collator, options, text):
    said = {**caption_row(1), "completion": [{"role": "assistant", "content": text}]}
    for row in (said, {"images": said["images"], "text": text}):
        with pytest.raises(ValueError, match=r"Row 1.*: expected a text that belongs to the picture"):
            collator(processor, **options)([caption_row(0), row])


@pytest.mark.parametrize(
    ("collator", "options"), [(DuoStreamRetrievalCollator, {}), (DuoStreamPreTrainingCollator, {"mlm": False})]
)
def test_of_several_conversations_none_is_the_pictures_text(processor, collator, options):
    def packed(*rows):
        return {"images": rows[0]["images"], "row": 7, "conversations": list(rows)}

    def of(row):
        return {name: row[name] for name in ("prompt", "completion", "images")}

    collate = collator(processor, **options)
    one, plain = collate([packed(of(caption_row(0)))]), collate([caption_row(0)])
    assert one.keys() == plain.keys()
    name = "input_ids" if collator is DuoStreamRetrievalCollator else "paired_input_ids"
    assert torch.equal(one[name], plain[name])
    with pytest.raises(ValueError, match="Row 7 has 2 `conversations`: expected one, whose text"):
        collate([packed(of(caption_row(0)), of(caption_row(1)))])


@pytest.mark.parametrize(
    ("collator", "options"),
    [(DuoStreamDataCollator, {}), (DuoStreamRetrievalCollator, {}), (DuoStreamPreTrainingCollator, {"mlm": False})],
)
def test_no_row_is_cut_to_nothing(processor, collator, options):
    with pytest.raises(ValueError, match="`max_length` is 0; expected 1 or more"):
        collator(processor, max_length=0, **options)


def test_several_texts_are_not_classified_as_one(processor):
    row = {"images": [], "conversations": [{"text": "red"}, {"text": "blue"}], "label": 0}
    with pytest.raises(ValueError, match="give one conversation a row"):
        DuoStreamClassificationCollator(processor, num_labels=2)([row])


def test_the_most_labels_that_a_row_has_are_told_where_tokens_are_predicted(processor):
    rows = [caption_row(i) for i in range(3)]

    def most(labels):
        return int((labels != -100).sum(dim=1).max())

    batch = DuoStreamPreTrainingCollator(processor)(rows)
    assert batch["targets_per_row"] == most(batch["labels"]) > batch["masked_per_row"] == most(batch["masked_labels"])
    batch = DuoStreamMaskedLMCollator(processor)(rows)
    assert batch["targets_per_row"] == most(batch["labels"])
    text = [{"text": CAPTIONS[0], "label": 1}]
    assert "targets_per_row" not in DuoStreamClassificationCollator(processor, num_labels=2)(text)
    # The first token, too, which is predicted where virtual tokens are in front
    batch = DuoStreamPreTrainingCollator(processor, mlm=False)([{"text": CAPTIONS[0]}])
    assert batch["targets_per_row"] == len(processor.tokenizer(CAPTIONS[0])["input_ids"])


def test_a_text_to_classify_is_encoded_as_the_pipelines_do(processor):
    collator = DuoStreamClassificationCollator(processor, num_labels=3)
    picture = Image.new("RGB", (20, 20))
    rows = [{"images": [picture], "text": CAPTIONS[0], "label": 2}, {"text": "", "images": [picture], "label": 0}]
    batch = collator(rows)
    own = [processor.image_token_id] * NUM_TOKENS + processor.tokenizer(CAPTIONS[0])["input_ids"]
    assert batch["input_ids"][0].tolist() == own
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(own), NUM_TOKENS]
    assert batch["labels"].tolist() == [2, 0]


def test_a_marker_in_a_text_to_classify_is_no_picture(processor):
    batch = DuoStreamClassificationCollator(processor, num_labels=2)([{"text": "<|image|> ?", "label": 1}])
    assert processor.image_token_id not in batch["input_ids"]


@pytest.mark.parametrize(
    ("label", "num_labels", "message"),
    [
        (3, 3, "from 0 to 2, not 3"),
        (-1, 3, "not -1"),
        (None, 3, "not None"),
        (1.5, 3, "not 1.5"),
        ("cat", 3, "not 'cat'"),
        ([1.0, 0.0], 3, "expected 3 scores"),
        (True, 1, "not True"),
        (np.int64(3), 3, "not 3"),
        (torch.tensor(1.0), 3, "not 1.0"),
    ],
)
def test_a_wrong_label_names_its_row(processor, label, num_labels, message):
    collator = DuoStreamClassificationCollator(processor, num_labels=num_labels)
    with pytest.raises(ValueError, match=f"Row 7: .*{message}"):
        collator([{"text": "a", "label": label, "row": 7}])


def test_the_second_text_of_a_pair_is_not_passed_over(processor):
    collator = DuoStreamClassificationCollator(processor, num_labels=2)
    row = {"text": "a", "label": 1, "row": 7}
    assert torch.equal(collator([{**row, "text_pair": None}])["input_ids"], collator([row])["input_ids"])
    with pytest.raises(ValueError, match="Row 7 has a `text_pair`, which is not read"):
        collator([{**row, "text_pair": "b"}])


def test_scores_and_numbers_are_labels_too(processor):
    soft = DuoStreamClassificationCollator(processor, num_labels=2)([{"text": "a", "label": [0.5, 1]}])
    assert soft["labels"].tolist() == [[0.5, 1.0]]
    number = DuoStreamClassificationCollator(processor, num_labels=1)([{"text": "a", "label": 4.5}])
    assert number["labels"].tolist() == [4.5]


@pytest.mark.parametrize(
    "labels", [[True, False], [True, 0], [np.int64(1), np.bool_(False)], [torch.tensor(1), torch.tensor(0)]], ids=str
)
def test_the_number_of_a_class_may_be_a_truth_value_or_of_numpy_or_torch(processor, labels):
    collator = DuoStreamClassificationCollator(processor, num_labels=2)
    batch = collator([{"text": "a", "label": label} for label in labels])
    assert batch["labels"].dtype == torch.long and batch["labels"].tolist() == [1, 0]


def test_scores_may_be_an_array(processor):
    rows = [{"text": "a", "label": np.array([0.5, 1])}, {"text": "a", "label": torch.tensor([1, 0])}]
    batch = DuoStreamClassificationCollator(processor, num_labels=2)(rows)
    assert batch["labels"].tolist() == [[0.5, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("labels", [[1, [0.1, 0.9]], [[0.1, 0.9], 1]])
def test_a_class_in_one_row_and_scores_in_another_name_the_row(processor, labels):
    rows = [{"text": "a", "label": label, "row": 6 + i} for i, label in enumerate(labels)]
    with pytest.raises(ValueError, match=r"Row 7: its `label` is .*, and that of Row 6 .* in all rows of a batch"):
        DuoStreamClassificationCollator(processor, num_labels=2)(rows)


def test_a_text_beside_a_conversation_is_not_read(processor):
    collator = DuoStreamPreTrainingCollator(processor)
    plain, with_text = collator([caption_row(0)]), collator([{**caption_row(0), "text": "something else"}])
    for name in ("labels", "paired_input_ids", "input_ids"):
        assert torch.equal(plain[name], with_text[name])


def test_a_text_that_is_none_names_its_row(processor):
    with pytest.raises(ValueError, match="Row 3: expected text, not None"):
        DuoStreamClassificationCollator(processor, num_labels=2)([{"text": None, "label": 1, "row": 3}])


@pytest.mark.parametrize(
    ("collator", "options"),
    [
        (DuoStreamMaskedLMCollator, {}),
        (DuoStreamPreTrainingCollator, {"mlm": False}),
        (DuoStreamClassificationCollator, {"num_labels": 2}),
    ],
)
def test_what_counts_by_rows_is_not_packed(processor, collator, options):
    with pytest.raises(ValueError, match=f"{collator.__name__} takes rows as they are"):
        collator(processor, packing=True, **options)([caption_row(0)])


def test_a_text_that_is_longer_than_the_model_reads_is_named(processor, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 8)
    row = {"images": [Image.new("RGB", (20, 20))], "text": CAPTIONS[0], "row": 7}
    length = len(processor.tokenizer.tokenize(CAPTIONS[0]))
    for collator in (DuoStreamRetrievalCollator, DuoStreamMaskedLMCollator):
        with pytest.raises(ValueError, match=f"^Row 7 has {length} tokens of text, more than the 8 of"):
            collator(processor)([row])
        # Who says how long rows may be knows what the model reads
        assert collator(processor, max_length=length + 30)([row])["attention_mask"].sum() >= length
