"""Every head reads with the same three transformers, and is right whatever stands beside a row."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import (
    KINDS,
    PICTURE,
    VOCAB_SIZE,
    Row,
    batch,
    difference,
    places,
    ragged_rows,
    small_config,
    small_model,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from duostream import (
    DuoStreamForConditionalGeneration,
    DuoStreamForImageTextRetrieval,
    DuoStreamForMaskedLM,
    DuoStreamForPreTraining,
    DuoStreamForSequenceClassification,
)
from duostream.modeling.heads_duostream import mean_pool
from duostream.modeling.objectives_duostream import contrastive_loss, hard_negatives

HEADS = {
    AutoModelForMaskedLM: DuoStreamForMaskedLM,
    AutoModelForSequenceClassification: DuoStreamForSequenceClassification,
    AutoModelForVisualQuestionAnswering: DuoStreamForSequenceClassification,
    AutoModelForZeroShotImageClassification: DuoStreamForImageTextRetrieval,
    AutoModelForImageTextToText: DuoStreamForConditionalGeneration,
    AutoModelForPreTraining: DuoStreamForPreTraining,
}
OBJECTIVES = ("lm", "mlm", "itc", "itm")
SIDES = ("left", "right")
ENCODER_KINDS = (*KINDS, "bert", "roberta")


def weights(**given):
    return {f"{name}_weight": given.get(name, 0.0) for name in OBJECTIVES}


def pretraining_inputs(model, num_rows=4):
    """Rows of a picture and a text, with some tokens masked, and the texts on their own."""
    rows = [Row(model, PICTURE, 6) for _ in range(num_rows)]
    inputs = batch(rows)
    first = model.config.image_seq_length
    labels = inputs["input_ids"].clone()
    labels[:, : first + 1] = -100
    masked_labels = labels.clone()
    masked_labels[:, ::2] = -100
    masked_input_ids = torch.where(masked_labels == -100, inputs["input_ids"], 1)
    return {
        **inputs,
        "labels": labels,
        "masked_input_ids": masked_input_ids,
        "masked_labels": masked_labels,
        "paired_input_ids": inputs["input_ids"][:, first:],
    }


@pytest.mark.parametrize("head", [DuoStreamForPreTraining, DuoStreamForMaskedLM])
@pytest.mark.parametrize("trains", [False, True])
def test_placeholders_in_labels_are_ignored_though_they_have_no_number_in_the_vocabulary(head, trains):
    model = small_model(cls=head, image_token_id=VOCAB_SIZE).train(trains)
    inputs = batch([Row(model, PICTURE, 6), Row(model, 2, PICTURE, 3)])
    hidden = inputs["input_ids"] == VOCAB_SIZE
    with torch.no_grad():
        got = model(**inputs, labels=inputs["input_ids"]).loss
        assert got == model(**inputs, labels=inputs["input_ids"].masked_fill(hidden, -100)).loss


@pytest.mark.parametrize(("auto_class", "head"), HEADS.items(), ids=lambda item: item.__name__)
def test_a_pretrained_checkpoint_loads_into_every_head_and_only_a_new_head_is_new(tmp_path, auto_class, head):
    pretrained = small_model(cls=DuoStreamForPreTraining)
    pretrained.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is head
    new = {"score.weight", "score.bias"} if head is DuoStreamForSequenceClassification else set()
    assert info["missing_keys"] == new
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    state = pretrained.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.state_dict().items() if name not in new)


@pytest.mark.parametrize("head", list(dict.fromkeys(HEADS.values())), ids=lambda head: head.__name__)
def test_saving_and_loading_a_head_changes_nothing(tmp_path, head):
    model = small_model(cls=head)
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


@pytest.mark.parametrize("kind", ENCODER_KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_masked_lm_gives_a_row_the_same_logits_alone_and_in_a_padded_batch(kind, side):
    model = small_model(kind, cls=DuoStreamForMaskedLM)
    rows = ragged_rows(model)
    with torch.no_grad():
        together = model(**batch(rows, side)).logits
        for i, place in places(rows, side):
            alone = model(**rows[i].inputs).logits[0]
            assert difference(together[i, place], alone) < 2e-4


def test_masked_lm_reads_both_ways_whatever_token_types_say():
    model = small_model(cls=DuoStreamForMaskedLM)
    row = Row(model, PICTURE, 8)
    changed = row.ids.clone()
    changed[-1] = 3 + (changed[-1] - 2) % (VOCAB_SIZE - 3)
    with torch.no_grad():
        before = model(**row.inputs).logits
        after = model(input_ids=changed[None], pixel_values=row.pictures).logits
        with_types = model(**row.inputs, token_type_ids=torch.ones(1, len(row), dtype=torch.long)).logits
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-4
    assert difference(before, with_types) == 0


@pytest.mark.parametrize("cls", [DuoStreamForMaskedLM, DuoStreamForSequenceClassification])
@torch.no_grad()
def test_a_head_that_reads_both_ways_reads_without_a_cache_whatever_it_is_told(cls):
    model = small_model(cls=cls)
    inputs = Row(model, PICTURE, 8).inputs
    for use_cache in (None, False, True):
        assert difference(model(**inputs, use_cache=use_cache).logits, model(**inputs).logits) == 0


def test_masked_lm_loss_is_the_cross_entropy_at_the_masked_positions():
    model = small_model(cls=DuoStreamForMaskedLM)
    inputs = batch([Row(model, PICTURE, 8), Row(model, 5)])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3], labels[1, -1] = 7, 11
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    expected = -(outputs.logits[0, -3].log_softmax(-1)[7] + outputs.logits[1, -1].log_softmax(-1)[11]) / 2
    assert torch.isclose(outputs.loss, expected, atol=1e-5)


def test_masked_labels_beside_other_objectives_are_those_of_masked_lm_alone():
    options = {"image_token_id": VOCAB_SIZE + 3, "lm_weight": 0.0, "itc_weight": 0.0, "itm_weight": 0.0}
    alone = small_model(cls=DuoStreamForMaskedLM, **options)
    model = DuoStreamForPreTraining(alone.config).eval()
    model.load_state_dict(alone.state_dict(), strict=False)
    inputs = Row(model, PICTURE, 8).inputs
    labels = inputs["input_ids"].clone()  # placeholders, too, of which nothing is learnt
    masked_input_ids = inputs.pop("input_ids")
    expected = alone(masked_input_ids, labels=labels, **inputs).loss
    got = model(masked_input_ids, masked_input_ids=masked_input_ids, masked_labels=labels, **inputs)
    torch.testing.assert_close(got.mlm_loss, expected)
    with pytest.raises(ValueError, match="`masked_input_ids` are given without `masked_labels`"):
        model(masked_input_ids, masked_input_ids=masked_input_ids, **inputs)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_a_classifier_gives_a_row_the_same_scores_alone_and_in_a_padded_batch(kind, side):
    model = small_model(kind, cls=DuoStreamForSequenceClassification, num_labels=5)
    rows = [*ragged_rows(model), Row(model, PICTURE)]
    with torch.no_grad():
        together = model(**batch(rows, side)).logits
        alone = torch.cat([model(**row.inputs).logits for row in rows])
    assert together.shape == (5, 5)
    assert difference(together, alone) < 2e-4


def test_a_classifier_takes_pictures_alone():
    model = small_model(cls=DuoStreamForSequenceClassification, num_labels=3)
    rows = [Row(model, PICTURE) for _ in range(3)]
    with torch.no_grad():
        alone = model(pixel_values=torch.cat([row.pictures for row in rows])).logits
        assert difference(alone, model(**batch(rows)).logits) == 0


def test_a_classifier_learns_classes_soft_scores_and_numbers():
    row = Row(small_model(), PICTURE, 4).inputs
    model = small_model(cls=DuoStreamForSequenceClassification, num_labels=3)
    outputs = model(**row, labels=torch.tensor([2]))
    assert torch.isclose(outputs.loss, -outputs.logits.log_softmax(-1)[0, 2])
    soft = torch.tensor([[0.3, 0.0, 0.9]])
    model = small_model(cls=DuoStreamForSequenceClassification, num_labels=3)
    outputs = model(**row, labels=soft)
    scores = outputs.logits.sigmoid()
    expected = -(soft * scores.log() + (1 - soft) * (1 - scores).log()).mean()
    assert torch.isclose(outputs.loss, expected, atol=1e-5)
    model = small_model(cls=DuoStreamForSequenceClassification, num_labels=1)
    outputs = model(**row, labels=torch.tensor([4.5]))
    assert torch.isclose(outputs.loss, (outputs.logits[0, 0] - 4.5) ** 2)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_that_is_no_class_is_an_error(label):
    model = small_model(cls=DuoStreamForSequenceClassification, num_labels=3)
    with pytest.raises(ValueError, match="from 0 to 2"):
        model(**Row(model, 5).inputs, labels=torch.tensor([label]))


@pytest.mark.parametrize("kind", ENCODER_KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_retrieval_gives_a_text_the_same_embedding_alone_and_in_a_padded_batch(kind, side):
    model = small_model(kind, cls=DuoStreamForImageTextRetrieval)
    rows = [Row(model, n) for n in (3, 8, 5)]
    with torch.no_grad():
        together = model.get_text_features(**batch(rows, side)).pooler_output
        alone = torch.cat([model.get_text_features(**row.inputs).pooler_output for row in rows])
    assert difference(together, alone) < 1e-5
    assert torch.allclose(together.norm(dim=-1), torch.ones(3))


def test_retrieval_scores_every_text_with_every_picture():
    model = small_model(cls=DuoStreamForImageTextRetrieval)
    texts = batch([Row(model, n) for n in (3, 8)])
    pictures = torch.cat([Row(model, PICTURE).pictures for _ in range(3)])
    with torch.no_grad():
        outputs = model(**texts, pixel_values=pictures)
    assert outputs.loss is None
    assert outputs.logits_per_text.shape == (2, 3)
    assert torch.equal(outputs.logits_per_image, outputs.logits_per_text.T)
    with pytest.raises(ValueError, match="2 texts, 3 pictures"):
        model(**texts, pixel_values=pictures, return_loss=True)


def test_the_contrastive_losses_are_those_of_their_papers():
    torch.manual_seed(0)
    texts, images = (torch.nn.functional.normalize(torch.randn(4, 6), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(1.3), torch.tensor(-0.7)
    scores = scale.exp() * texts @ images.T + bias
    sigmoid = sum(
        -torch.nn.functional.logsigmoid(scores[i, j] if i == j else -scores[i, j]) for i in range(4) for j in range(4)
    )
    assert torch.isclose(contrastive_loss(texts, images, scale, bias, "sigmoid"), sigmoid / 4)
    softmax = -(scores.log_softmax(1).diag().sum() + scores.log_softmax(0).diag().sum()) / 8
    assert torch.isclose(contrastive_loss(texts, images, scale, bias, "softmax"), softmax)


def test_a_hard_negative_is_never_the_right_one_and_mostly_the_closest():
    scores = torch.eye(5) * 100
    scores[:, 3] += 8
    drawn = torch.stack([hard_negatives(scores) for _ in range(200)])
    assert not (drawn == torch.arange(5)).any()
    assert (drawn[:, :3] == 3).float().mean() > 0.9
    assert hard_negatives(scores, sample=False)[:3].tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_reading_ready_states_together_is_reading_the_row(kind):
    model = small_model(kind, cls=DuoStreamForMaskedLM).model
    rows = [Row(model, PICTURE, n) for n in (7, 4)]
    inputs = batch(rows, side="right")
    first = model.config.image_seq_length
    text_mask = inputs["attention_mask"][:, first:]
    with torch.no_grad():
        whole = model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).last_hidden_state
        image_states = model.get_image_features(inputs["pixel_values"]).pooler_output
        text_states = model.read_text(inputs["input_ids"][:, first:], text_mask).last_hidden_state
        fused = model.fuse(image_states, text_states, text_mask)
    for i, place in places(rows, "right"):
        assert difference(fused[i, place], whole[i, place]) < 2e-4


def test_matching_tells_a_pair_by_its_picture():
    model = small_model(cls=DuoStreamForImageTextRetrieval)
    texts, pictures = (
        batch([Row(model, 3), Row(model, 8)]),
        torch.cat([Row(model, PICTURE).pictures for _ in range(2)]),
    )
    with torch.no_grad():
        own = model.match(**texts, pixel_values=pictures)
        swapped = model.match(**texts, pixel_values=pictures.flip(0))
    assert own.shape == (2, 2)
    assert (own - swapped).abs().min() > 1e-5


def test_pretraining_sums_its_objectives_by_weight_and_reports_each():
    chosen = {"lm": 1.0, "mlm": 0.5, "itc": 0.25, "itm": 2.0}
    model = small_model(cls=DuoStreamForPreTraining, **weights(**chosen))
    outputs = model(**pretraining_inputs(model))
    total = sum(weight * outputs[f"{name}_loss"] for name, weight in chosen.items())
    assert torch.isclose(outputs.loss, total)


def test_gradient_checkpointing_gives_the_gradients_of_all_objectives():
    model = small_model(cls=DuoStreamForPreTraining).train()
    inputs = pretraining_inputs(model)

    def gradients():
        torch.manual_seed(0)  # of the negatives that are drawn
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        assert difference(gradient, expected[name]) < 1e-4, name


def test_an_evaluation_gives_the_same_matching_loss_each_time():
    model = small_model(cls=DuoStreamForPreTraining, **weights(itm=1.0))
    inputs = pretraining_inputs(model, num_rows=8)
    with torch.no_grad():
        first, *others = [model(**inputs).loss for _ in range(8)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_stream_tells_its_hidden_states_and_attentions_where_they_are_asked_for(kind):
    model = small_model(cls=DuoStreamForImageTextRetrieval)
    inputs = {"text": batch([Row(model, 5)]), "image": {"pixel_values": Row(model, PICTURE).pictures}}[kind]
    read = {"text": model.get_text_features, "image": model.get_image_features}[kind]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain, full = read(**inputs), read(**inputs, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    assert len(full.hidden_states) == 3 and len(full.attentions) == 2
    assert torch.equal(plain.pooler_output, full.pooler_output)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_weight_of_zero_switches_an_objective_off(name):
    model = small_model(cls=DuoStreamForPreTraining, **weights(**{name: 2.0}))
    outputs = model(**pretraining_inputs(model))
    assert [other for other in OBJECTIVES if outputs.get(f"{other}_loss") is not None] == [name]
    assert torch.isclose(outputs.loss, 2 * outputs[f"{name}_loss"])


def test_pretraining_losses_are_those_of_the_heads(tmp_path):
    model = small_model(cls=DuoStreamForPreTraining)
    inputs = pretraining_inputs(model)
    model.save_pretrained(tmp_path)
    row = {name: inputs[name] for name in ("pixel_values", "attention_mask")}
    with torch.no_grad():
        outputs = model(**inputs)
        writer = DuoStreamForConditionalGeneration.from_pretrained(tmp_path).eval()
        lm = writer(**row, input_ids=inputs["input_ids"], labels=inputs["labels"])
        filler = DuoStreamForMaskedLM.from_pretrained(tmp_path).eval()
        mlm = filler(**row, input_ids=inputs["masked_input_ids"], labels=inputs["masked_labels"])
        finder = DuoStreamForImageTextRetrieval.from_pretrained(tmp_path).eval()
        itc = finder(inputs["paired_input_ids"], inputs["pixel_values"], return_loss=True)
    assert difference(outputs.logits, lm.logits) < 1e-5
    for name, expected in (("lm_loss", lm), ("mlm_loss", mlm), ("itc_loss", itc)):
        assert torch.isclose(outputs[name], expected.loss, rtol=1e-4), name


def test_accumulated_batches_give_the_token_losses_of_one_batch():
    model = small_model(cls=DuoStreamForPreTraining, **weights(lm=1.0, mlm=1.0)).train()
    inputs = pretraining_inputs(model)
    inputs["labels"][0, -3:], inputs["masked_labels"][1] = -100, -100
    counts = {
        "num_items_in_batch": (inputs["labels"] != -100).sum(),
        "num_masked_in_batch": (inputs["masked_labels"] != -100).sum(),
    }
    whole = model(**inputs).loss
    parts = [
        model(**{name: value[half] for name, value in inputs.items()}, **counts).loss
        for half in (slice(0, 2), slice(2, 4))
    ]
    assert torch.isclose(whole, sum(parts), rtol=1e-4)


def test_objectives_that_a_trainer_does_not_count_weigh_by_the_share_of_labels():
    torch.manual_seed(0)
    model = small_model(cls=DuoStreamForPreTraining, **weights(mlm=1.0, itc=1.0)).train()
    inputs = pretraining_inputs(model)
    inputs["labels"][0, -3:] = -100
    counts = [int((inputs["labels"][half, 1:] != -100).sum()) for half in (slice(0, 2), slice(2, 4))]
    assert counts[0] != counts[1]
    parts = [{name: value[half] for name, value in inputs.items()} for half in (slice(0, 2), slice(2, 4))]
    expected = [model(**part).loss * count / sum(counts) for part, count in zip(parts, counts, strict=True)]
    found = [model(**part, num_items_in_batch=sum(counts)).loss for part in parts]
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-5)
    # Answers that were all cut away
    inputs["labels"].fill_(-100)
    assert model(**inputs, num_items_in_batch=0).loss.isfinite()


@pytest.mark.parametrize("is_projected", [True, False])
def test_pretraining_takes_pictures_that_were_read_before(is_projected):
    model = small_model(cls=DuoStreamForPreTraining, **weights(lm=1.0, mlm=1.0, itc=1.0))
    inputs = pretraining_inputs(model)
    expected = model(**inputs)
    features = model.get_image_features(inputs.pop("pixel_values"))
    if not is_projected:
        features = BaseModelOutputWithPooling(last_hidden_state=features.last_hidden_state)
    found = model(**inputs, mm_encoder_outputs={"image": features})
    for name in ("loss", "lm_loss", "mlm_loss", "itc_loss"):
        assert torch.isclose(found[name], expected[name], rtol=1e-5), name


@pytest.mark.parametrize("kind", ["classes", "soft scores", "numbers", "whole numbers"])
def test_accumulated_batches_give_the_classification_loss_of_one_batch(kind):
    labels = {
        "classes": torch.tensor([0, 2, 1, 1]),
        "soft scores": torch.rand(4, 3),
        "numbers": torch.tensor([0.5, 2.0, -1.0, 3.0]),
        "whole numbers": torch.tensor([0, 2, 1, 3]),
    }[kind]
    num_labels = 1 if "numbers" in kind else 3
    model = small_model(cls=DuoStreamForSequenceClassification, num_labels=num_labels).train()
    inputs = {**batch([Row(model, PICTURE, 5) for _ in range(4)]), "labels": labels}
    whole = model(**inputs).loss
    halves = [{name: value[half] for name, value in inputs.items()} for half in (slice(0, 2), slice(2, 4))]
    parts = [model(**half, num_items_in_batch=torch.tensor(labels.numel())).loss for half in halves]
    assert torch.isclose(whole, sum(parts), rtol=1e-4)


def test_the_number_that_marks_no_class_is_one_to_come_near_to():
    # `Trainer` doesn't count it
    labels = torch.tensor([0.5, -100.0, 2.0, -100.0])
    model = small_model(cls=DuoStreamForSequenceClassification, num_labels=1).train()
    inputs = {**batch([Row(model, 5) for _ in range(4)]), "labels": labels}
    found = model(**inputs, num_items_in_batch=(labels != -100).sum())
    assert torch.isclose(found.loss, (found.logits.squeeze(1) - labels).square().mean())


def test_pairs_may_be_some_of_the_pictures():
    model = small_model(cls=DuoStreamForPreTraining, **weights(itc=1.0))
    inputs = pretraining_inputs(model)
    chosen = torch.tensor([1, 3])
    some = {**inputs, "paired_input_ids": inputs["paired_input_ids"][chosen], "paired_images": chosen}
    alone = {name: value[chosen] for name, value in inputs.items()}
    with torch.no_grad():
        assert torch.isclose(model(**some).itc_loss, model(**alone).itc_loss, rtol=1e-5)


def test_a_single_pair_has_nothing_to_be_mistaken_for():
    model = small_model(cls=DuoStreamForPreTraining, **weights(lm=1.0, itm=1.0))
    outputs = model(**pretraining_inputs(model, num_rows=1))
    assert outputs.itm_loss is None
    assert torch.isclose(outputs.loss, outputs.lm_loss)


@pytest.mark.parametrize(("name", "num_pairs"), [("itc", 0), ("itm", 0), ("itm", 1)])
def test_of_a_batch_without_pairs_to_tell_apart_nothing_is_learnt(name, num_pairs):
    model = small_model(cls=DuoStreamForPreTraining, **weights(**{name: 1.0})).train()
    inputs = pretraining_inputs(model, num_rows=1)
    if not num_pairs:
        del inputs["paired_input_ids"]
    loss = model(**inputs).loss
    loss.backward()
    assert loss == 0 and all(weight.grad is None or not weight.grad.any() for weight in model.parameters())


def test_smoothed_labels_that_would_take_the_other_objectives_away_are_refused():
    model = small_model(cls=DuoStreamForPreTraining, **weights(lm=1.0, mlm=1.0)).train()
    inputs = pretraining_inputs(model)
    del inputs["labels"]  # as `Trainer` does
    with pytest.raises(ValueError, match=r"`labels` are missing, .*`label_smoothing_factor`"):
        model(**inputs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
def test_a_contrastive_loss_is_summed_in_full_precision(loss_type):
    embeds = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).bfloat16()
    scale, bias = torch.tensor(2.0).bfloat16(), torch.tensor(-1.0).bfloat16()
    assert contrastive_loss(*embeds, scale, bias, loss_type).dtype == torch.float32


def test_the_mean_of_a_long_text_is_within_half_precision():
    states = torch.full((1, 2000, 2), 60.0).half()
    assert mean_pool(states, torch.ones(1, 2000)).tolist() == [[60.0, 60.0]]


def test_an_encoder_is_pretrained_without_language_modelling_only():
    with pytest.raises(ValueError, match="reads both ways"):
        DuoStreamForPreTraining(small_config("bert"))
    model = small_model("bert", cls=DuoStreamForPreTraining, **weights(mlm=1.0, itc=1.0, itm=1.0))
    assert model(**pretraining_inputs(model)).loss.isfinite()


@pytest.mark.parametrize("name", ["contrastive_loss", "projector_type"])
def test_an_unknown_choice_is_an_error(name):
    with pytest.raises(ValueError, match=f"`{name}` is 'neither'; there are"):
        small_config(**{name: "neither"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_negative_weight_is_an_error(name):
    with pytest.raises(ValueError, match=f"`{name}_weight` is -1"):
        small_config(**{f"{name}_weight": -1.0})


@pytest.mark.parametrize("head", [DuoStreamForMaskedLM, DuoStreamForPreTraining], ids=lambda head: head.__name__)
def test_in_training_logits_are_of_labels_alone_with_the_same_losses(head):
    config = small_config("llama", **weights(lm=1.0, mlm=2.0))
    torch.manual_seed(0)
    model = head(config)
    inputs = pretraining_inputs(model)
    hints = {"targets_per_row": 5, "masked_per_row": 3}
    if head is DuoStreamForMaskedLM:
        inputs = {name: value for name, value in inputs.items() if not name.startswith(("masked", "paired"))}
        del hints["masked_per_row"]
    model.training = True  # the head alone: dropout and batch norm would tell the two apart
    whole, told = model(**inputs), model(**inputs, **hints)
    assert told.logits.shape[:2] == (4, 5) and whole.logits.shape[1] > 5
    for name in {"loss", "lm_loss", "mlm_loss"} & set(whole):
        assert abs(told[name] - whole[name]) < 1e-5
    model.config.loss_chunk_size = 4
    chunked = model(**inputs, **hints)
    assert chunked.logits is None
    for name in {"loss", "lm_loss", "mlm_loss"} & set(whole):
        assert abs(chunked[name] - whole[name]) < 1e-5


def _losses_of_a_rank(rank, world_size, store, sizes, loss_type, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    texts, images, weight = _embeddings(sum(sizes))
    first = sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    loss = contrastive_loss(*_project(texts[own], images[own], weight), loss_type, num_pairs=sum(sizes))
    loss.backward()
    results.put((loss.item(), weight.grad.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def _embeddings(number):
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randn(number, 6, generator=generator) for _ in range(2))
    return texts, images, torch.ones(6, requires_grad=True)


def _project(texts, images, weight):
    normalize = torch.nn.functional.normalize
    return normalize(texts * weight, dim=-1), normalize(images * weight, dim=-1), torch.tensor(1.0), torch.tensor(-0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "sizes"), [*itertools.product(("sigmoid", "softmax"), ((3, 3), (1, 4)))])
def test_ranks_together_have_the_contrastive_loss_and_gradient_of_one_batch(tmp_path, loss_type, sizes):
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_losses_of_a_rank, (2, tmp_path / "store", sizes, loss_type, results), nprocs=2)
    losses, gradients = zip(*(results.get() for _ in range(2)), strict=True)
    texts, images, weight = _embeddings(sum(sizes))
    expected = contrastive_loss(*_project(texts, images, weight), loss_type)
    expected.backward()
    assert sum(losses) == pytest.approx(expected.item(), rel=1e-5)
    assert torch.tensor(gradients).sum(0).tolist() == pytest.approx(weight.grad.tolist(), abs=1e-5)


def test_a_classifier_takes_pictures_alone_that_were_read_before():
    model = small_model(cls=DuoStreamForSequenceClassification)
    pictures = torch.randn(2, 3, *[model.config.vision_config.image_size] * 2)
    with torch.no_grad():
        read = {"image": model.model.get_image_features(pictures)}
        assert torch.equal(model(mm_encoder_outputs=read).logits, model(pixel_values=pictures).logits)
    with pytest.raises(ValueError, match="expected `input_ids`, `inputs_embeds`, or pictures alone"):
        model()


@pytest.mark.parametrize("name", ["input_ids", "pixel_values"])
def test_retrieval_of_one_kind_alone_says_what_reads_it(name):
    model = small_model(cls=DuoStreamForImageTextRetrieval)
    inputs = Row(model, PICTURE, 3).inputs
    with pytest.raises(ValueError, match="`get_text_features` or `get_image_features`"):
        model(**{name: inputs[name]})


@pytest.mark.parametrize("image_token_id", [2, VOCAB_SIZE], ids=["within the vocabulary", "beyond it"])
def test_retrieval_reads_no_markers_of_pictures_in_a_text(image_token_id):
    model = small_model(cls=DuoStreamForImageTextRetrieval, image_token_id=image_token_id)
    inputs = Row(model, PICTURE, 3).inputs
    texts = {"input_ids": inputs["input_ids"]}
    for read, given in ((model, inputs), (model.match, inputs), (model.get_text_features, texts)):
        with pytest.raises(ValueError, match=r"`input_ids` hold placeholders.*without markers"):
            read(**given)


def test_matching_needs_a_picture_for_each_text():
    model = small_model(cls=DuoStreamForImageTextRetrieval)
    texts, picture = batch([Row(model, 3), Row(model, 8)]), Row(model, PICTURE).pictures
    with pytest.raises(ValueError, match="2 texts, 1 pictures"):
        model.match(**texts, pixel_values=picture)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(0)], ids=str)
def test_where_nothing_is_masked_nothing_is_learnt(trains, num_items_in_batch):
    model = small_model(cls=DuoStreamForMaskedLM).train(trains)
    inputs = Row(model, PICTURE, 3).inputs
    labels = torch.full_like(inputs["input_ids"], -100)
    loss = model(**inputs, labels=labels, num_items_in_batch=num_items_in_batch).loss
    loss.backward()
    assert loss == 0 and all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
