"""The library's pipelines take each head with the processor's parts, and give what the model gives."""

import pytest
import torch
from PIL import Image
from tiny_models import roughen
from transformers import pipeline
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from duostream import (
    DuoStreamConfig,
    DuoStreamForConditionalGeneration,
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForSequenceClassification,
    DuoStreamModel,
    DuoStreamProcessor,
    train_tokenizer,
)

WORDS = ["a large red circle", "a small blue square"]


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer(WORDS * 20, 300)
    return DuoStreamProcessor(SiglipImageProcessorPil(size={"height": 24, "width": 24}), tokenizer, image_seq_length=4)


def model_of(head, processor, **kwargs):
    torch.manual_seed(0)
    config = DuoStreamConfig.from_preset(
        "tiny", vocab_size=len(processor.tokenizer), vision_config={"image_size": 24}, **kwargs
    )
    config.image_token_id = processor.image_token_id
    processor.image_seq_length = config.image_seq_length
    return roughen(head(config), scale=0.05)


def test_fill_mask(processor):
    model = model_of(DuoStreamForMaskedLM, processor)
    text = "a large <|mask|> circle"
    (best, *_) = pipeline("fill-mask", model=model, tokenizer=processor.tokenizer)(text)
    inputs = processor.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits[0]
    place = inputs["input_ids"][0].tolist().index(processor.tokenizer.mask_token_id)
    assert best["token"] == int(logits[place].argmax())
    assert best["score"] == pytest.approx(float(logits[place].softmax(-1).max()), rel=1e-4)


def test_text_classification(processor):
    model = model_of(DuoStreamForSequenceClassification, processor, id2label={0: "no", 1: "yes", 2: "maybe"})
    found = pipeline("text-classification", model=model, tokenizer=processor.tokenizer, top_k=None)(WORDS)
    with torch.no_grad():
        for text, scores in zip(WORDS, found, strict=True):
            logits = model(input_ids=processor.tokenizer(text, return_tensors="pt")["input_ids"]).logits[0]
            expected = dict(zip(("no", "yes", "maybe"), logits.softmax(-1).tolist(), strict=True))
            assert {item["label"]: item["score"] for item in scores} == pytest.approx(expected, rel=1e-4)


def test_zero_shot_image_classification(processor):
    model = model_of(DuoStreamForImageTextRetrieval, processor)
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    picture = Image.new("RGB", (30, 30), "red")
    found = classify(picture, candidate_labels=WORDS, hypothesis_template="{}")
    pixel_values = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    texts = processor.tokenizer(WORDS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(texts["input_ids"], pixel_values, texts["attention_mask"]).logits_per_image[0]
    expected = dict(zip(WORDS, logits.softmax(-1).tolist(), strict=True))
    assert {item["label"]: item["score"] for item in found} == pytest.approx(expected, rel=1e-4)


def test_feature_extraction(processor):
    model = model_of(DuoStreamModel, processor)
    states = pipeline("feature-extraction", model=model, tokenizer=processor.tokenizer)(WORDS[0])
    with torch.no_grad():
        expected = model(**processor.tokenizer(WORDS[0], return_tensors="pt")).last_hidden_state
    assert torch.allclose(torch.tensor(states), expected, atol=1e-5)


def test_feature_extraction_of_sentences_is_the_same_alone_and_in_a_batch(processor):
    extract = pipeline("feature-extraction", model=model_of(DuoStreamModel, processor), tokenizer=processor.tokenizer)
    texts = [WORDS[0], "a circle", f"{WORDS[0]} {WORDS[1]}"]
    alone = [extract(text, return_tensors=True)[0].mean(dim=0) for text in texts]
    lengths = [len(ids) for ids in processor.tokenizer(texts)["input_ids"]]
    assert len(set(lengths)) == 3  # so that there is padding
    together = extract(texts, batch_size=3, return_tensors=True, tokenize_kwargs={"padding": True})
    for one, states, length in zip(alone, together, lengths, strict=True):
        # Padded on the left
        torch.testing.assert_close(states[0, -length:].mean(dim=0), one, atol=1e-5, rtol=0)


def test_text_generation(processor):
    model = model_of(DuoStreamForConditionalGeneration, processor)
    write = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False}
    (written,) = write(WORDS[0], **options)
    inputs = processor.tokenizer(WORDS[0], return_tensors="pt")
    sequence = model.generate(**inputs, **options)[0]
    assert written["generated_text"] == processor.decode(sequence, skip_special_tokens=True)


@pytest.mark.parametrize("num_pictures", [1, 3])
def test_image_text_to_text(processor, num_pictures):
    model = model_of(DuoStreamForConditionalGeneration, processor)
    say = pipeline("image-text-to-text", model=model, processor=processor)
    colors = ("red", "green", "blue")[:num_pictures]
    content = [{"type": "image", "image": Image.new("RGB", (30, 30), color)} for color in colors]
    content += [{"type": "text", "text": "What is it?"}]
    conversation = [{"role": "user", "content": content}]
    (said,) = say(text=conversation, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said["generated_text"] == processor.decode(tokens, skip_special_tokens=True)
