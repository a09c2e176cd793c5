"""What is composed, or made from nothing, pads prompts and ends answers, and does so once it is saved."""

import json
from pathlib import Path
from typing import Any

import pytest
from backbones import COMMON, GROUPED, VISIONS
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import DuoStreamDataCollator, train_tokenizer
from duostream.scripts.compose import ComposeArguments, compose
from duostream.scripts.pretrain import PretrainArguments, new_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "is", "red", "user", "assistant", "<", ">", "|"]


def bert_tokenizer() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def endless_tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    AutoModel.from_config(VISIONS["siglip"]()).save_pretrained(tmp_path / "vision")
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


def save_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A text encoder, and the fusion stack to compose it with."""
    config = BertConfig(**{**COMMON, "bos_token_id": None, "eos_token_id": None})
    BertModel(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    PhiConfig(**COMMON).save_pretrained(folder / "fusion")
    return {"text": str(folder / "text"), "fusion_config": str(folder / "fusion"), "output_dir": ""}


@pytest.mark.parametrize(("task", "side"), [("chat", "left"), ("retrieval", "right")])
def test_the_side_that_prompts_are_padded_on_is_saved(vision: Path, tmp_path: Path, task: str, side: str) -> None:
    LlamaForCausalLM(LlamaConfig(**{**GROUPED, "vocab_size": 263})).save_pretrained(tmp_path / "text")
    train_tokenizer([], 263).save_pretrained(tmp_path / "text")
    config = tmp_path / "text" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "padding_side"}))
    args = ComposeArguments(str(tmp_path / "text"), str(vision), "", num_fusion_layers=1, task=task)
    _, processor = compose(args)
    processor.save_pretrained(tmp_path / "composed")
    for each in (processor, AutoProcessor.from_pretrained(tmp_path / "composed")):
        assert each.tokenizer.padding_side == side
        mask = each(text=["a", "abc"], padding=True)["attention_mask"][0]
        assert mask == ([0, 0, 1] if side == "left" else [1, 0, 0])


def test_a_text_encoder_is_composed_to_end_answers_as_its_tokenizer_ends_texts(vision: Path, tmp_path: Path) -> None:
    model, processor = compose(ComposeArguments(vision=str(vision), **save_encoder(tmp_path, bert_tokenizer())))
    model.save_pretrained(tmp_path / "composed")
    processor.save_pretrained(tmp_path / "composed")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "composed")
    processor = AutoProcessor.from_pretrained(tmp_path / "composed")
    end = WORDS.index("[SEP]")
    assert model.generation_config.eos_token_id == end
    row = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "it is red"}]}
    labels = DuoStreamDataCollator(processor)([row])["labels"][0]
    assert labels[labels != -100].tolist() == [*processor.tokenizer.encode("it is red", add_special_tokens=False), end]


def test_a_model_pretrained_with_an_encoders_tokenizer_ends_answers_as_it_ends_texts(tmp_path: Path) -> None:
    bert_tokenizer().save_pretrained(tmp_path)
    model, _ = new_model(PretrainArguments(tokenizer=str(tmp_path)), Dataset.from_list([]))
    assert model.generation_config.eos_token_id == WORDS.index("[SEP]")


def test_a_model_that_writes_is_not_made_where_nothing_would_end_answers(vision: Path, tmp_path: Path) -> None:
    options = {"vision": str(vision), **save_encoder(tmp_path, endless_tokenizer())}
    with pytest.raises(ValueError, match="no `eos_token` and no `sep_token`, so that nothing would end answers"):
        compose(ComposeArguments(**options))
    compose(ComposeArguments(**options, task="classification"))
    with pytest.raises(ValueError, match="nothing would end answers"):
        new_model(PretrainArguments(tokenizer=options["text"]), Dataset.from_list([]))
    new_model(PretrainArguments(tokenizer=options["text"], lm_weight=0, itc_weight=1), Dataset.from_list([]))
