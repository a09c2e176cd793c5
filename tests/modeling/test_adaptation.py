"""Ways to train less than all weights, or with less: adapters, frozen streams, noise, low precision, compiling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import FULL, VISIONS
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_models import (
    KINDS,
    LLAMA,
    PICTURE,
    SIGLIP,
    Row,
    batch,
    difference,
    ragged_rows,
    small_model,
)
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from duostream import DuoStreamForConditionalGeneration, DuoStreamForSequenceClassification

STREAMS = {"text": "text_model", "vision": "vision_model", "fusion": "fusion_model"}
PROJECTIONS = r"(q_proj|v_proj|query|value|c_attn)"


def with_labels(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels.masked_fill(labels == model.config.image_token_id, -100)}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


VIRTUAL_TOKENS = 3
PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, encoder_hidden_size=16),
    # By itself PEFT counts the text stream's layers alone
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, num_layers=4),
}


@pytest.mark.parametrize("num_image_update_layers", [None, 0])
@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
def test_virtual_tokens_are_learnt_and_stand_in_front_of_text_and_pictures(
    config: PeftConfig, num_image_update_layers: int | None
) -> None:
    model = small_model("llama", num_image_update_layers=num_image_update_layers)
    rows = ragged_rows(model)
    adapted = get_peft_model(model, config)
    for weight in adapted.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    inputs = batch(rows)
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    together = logits(adapted, {**inputs, "mm_token_type_ids": types})
    prompt = slice(0, together.shape[1] - types.shape[1])
    for row, states in zip(rows, together, strict=True):
        alone = logits(adapted, batch([row]))[0]
        own = states[-len(row.ids) :]
        assert difference(torch.cat([states[prompt], own]), alone) < 1e-4
    torch.manual_seed(0)
    adapted.train()(**with_labels(model, inputs)).loss.backward()
    (learnt, *_) = [weight.grad for weight in adapted.prompt_encoder.parameters()]
    if isinstance(config, PrefixTuningConfig):
        learnt = learnt.view(VIRTUAL_TOKENS, config.num_layers, -1).transpose(
            0, 1
        )  # (num_layers, virtual_tokens, ...)
    assert all(each.abs().sum() > 0 for each in learnt)


def test_a_learned_prefix_is_read_by_a_classifier_and_is_no_part_of_the_mean() -> None:
    model = small_model("llama", cls=DuoStreamForSequenceClassification, num_labels=3)
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL_TOKENS, num_layers=4)
    adapted = get_peft_model(model, config)
    torch.nn.init.normal_(adapted.prompt_encoder.default.embedding.weight)
    rows = ragged_rows(model)
    alone = torch.cat([logits(adapted, row.inputs) for row in rows])
    assert difference(alone, torch.cat([logits(model, row.inputs) for row in rows])) > 1e-2
    for side in ("left", "right"):
        assert difference(logits(adapted, batch(rows, side)), alone) < 1e-4
    adapted.train()(**batch(rows), labels=torch.zeros(len(rows), dtype=torch.long)).loss.backward()
    assert adapted.prompt_encoder.default.embedding.weight.grad.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("name", ["prompt tuning", "p-tuning"])
def test_behind_virtual_tokens_several_sequences_in_a_row_are_read_as_rows(name: str) -> None:
    model = small_model("llama")
    adapted = get_peft_model(model, PROMPTS[name]).eval()
    first, second = Row(model, PICTURE, 3), Row(model, 5)
    packed = {"input_ids": torch.cat([first.ids, second.ids])[None], "pixel_values": first.pictures}
    packed["segment_ids"] = torch.tensor([[1] * len(first.ids) + [2] * len(second.ids)])
    states = logits(adapted, packed)[0, VIRTUAL_TOKENS:]
    alone = [logits(adapted, row.inputs)[0, VIRTUAL_TOKENS:] for row in (first, second)]
    assert difference(states, torch.cat(alone)) < 1e-4


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
def test_behind_virtual_tokens_a_row_is_written_as_without_a_cache(config: PeftConfig) -> None:
    model = small_model("llama")
    rows = ragged_rows(model)
    adapted = get_peft_model(model, config).eval()
    for weight in adapted.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    options = {"max_new_tokens": 4, "do_sample": False}
    together = adapted.generate(**batch(rows), **options)
    for row, written in zip(rows, together, strict=True):
        ids = row.ids
        for _ in range(4):
            pictures = {"pixel_values": row.pictures} if len(row.pictures) else {}
            scores = logits(adapted, {"input_ids": ids[None], **pictures})[0, -1]
            ids = torch.cat([ids, scores.argmax()[None]])
        assert torch.equal(written[-4:], ids[-4:])


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_adapts_one_stream_and_is_saved_loaded_and_merged(kind: str, stream: str, tmp_path: Path) -> None:
    model = small_model(kind)
    inputs = batch(ragged_rows(model))
    before = logits(model, inputs)
    # A regular expression names the stream; the projector between the streams is small enough to be trained whole
    config = LoraConfig(r=4, target_modules=rf".*\.{STREAMS[stream]}\..*{PROJECTIONS}", modules_to_save=["projector"])
    adapted = get_peft_model(model, config)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert all(f".{STREAMS[stream]}." in name or ".projector." in name for name in trained)
    assert any(f".{STREAMS[stream]}." in name for name in trained) and any(".projector." in name for name in trained)

    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):  # half of an adapter starts at zero
        optimizer.zero_grad()
        adapted.train()(**with_labels(model, inputs)).loss.backward()
        optimizer.step()
    after = logits(adapted, inputs)
    assert difference(after, before) > 1e-3

    adapted.save_pretrained(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").glob("*.bin")] == []
    loaded = PeftModel.from_pretrained(small_model(kind), tmp_path / "adapter")
    assert difference(logits(loaded, inputs), after) < 1e-5
    merged = loaded.merge_and_unload()
    assert difference(logits(merged, inputs), after) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, inputs), logits(merged, inputs))
    assert torch.equal(again.generate(**inputs, max_new_tokens=3), merged.generate(**inputs, max_new_tokens=3))


def test_embeddings_that_give_more_than_a_tensor_go_with_checkpointing() -> None:
    torch.manual_seed(0)
    text = AutoModelForCausalLM.from_config(FULL["llama"]())
    vision = AutoModel.from_config(VISIONS["swin"]())
    model = DuoStreamForConditionalGeneration.from_backbones(text, vision, num_fusion_layers=2).train()
    model.activation_checkpointing_enable()
    row = Row(model, PICTURE, 5)
    model(**row.inputs, labels=row.ids[None]).loss.backward()
    assert model.model.vision_model.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_streams_keep_no_graph(kind: str, checkpointing: bool) -> None:
    model = small_model(kind).train()
    model.freeze("text", "vision")
    if checkpointing:
        model.activation_checkpointing_enable()
    states: dict[str, Tensor] = {}
    for name in STREAMS.values():
        getattr(model.model, name).register_forward_hook(
            lambda module, args, outputs, name=name: states.update({name: outputs.last_hidden_state})
        )
    model(**with_labels(model, batch(ragged_rows(model)))).loss.backward()
    assert not states["text_model"].requires_grad and not states["vision_model"].requires_grad
    assert states["fusion_model"].requires_grad
    with_gradient = {name.split(".")[1] for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient == {"projector", "fusion_model"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_of_the_fusion_stack_learn_with_checkpointing_where_all_before_it_is_frozen(
    use_reentrant: bool,
) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = small_model()
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=rf".*\.fusion_model\..*{PROJECTIONS}"))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)  # zero at first, it would let no gradient through
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        adapted.train()(**with_labels(model, batch(ragged_rows(model)))).loss.backward()
        return {name: weight.grad for name, weight in adapted.named_parameters() if weight.grad is not None}

    expected, got = gradients(False), gradients(True)
    assert expected and expected.keys() == got.keys()
    assert all(difference(expected[name], got[name]) < 1e-5 for name in expected)


def test_a_frozen_stream_passes_gradients_on_to_its_inputs() -> None:
    model = small_model().train()
    model.freeze("text", "vision")
    inputs = with_labels(model, batch([Row(model, PICTURE, 4), Row(model, PICTURE, 4)]))
    ids = inputs.pop("input_ids")
    words = model.get_input_embeddings()(ids).detach().requires_grad_()
    pictures = inputs.pop("pixel_values").requires_grad_()
    types = (ids == model.config.image_token_id).long()
    model(**inputs, inputs_embeds=words, pixel_values=pictures, mm_token_type_ids=types).loss.backward()
    assert words.grad.abs().sum() > 0 and pictures.grad.abs().sum() > 0


def test_neftune_puts_noise_on_the_words_in_training_alone(tmp_path: Path) -> None:
    def losses(alpha: float | None) -> tuple[float, float]:
        model = small_model()
        inputs = with_labels(model, batch([Row(model, PICTURE, 6) for _ in range(4)]))
        rows = [{name: value[i] for name, value in inputs.items()} for i in range(4)]
        options: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "report_to": "none"}
        args = TrainingArguments(
            str(tmp_path), **options, save_strategy="no", neftune_noise_alpha=alpha, remove_unused_columns=False
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        with torch.no_grad():
            after = model.eval()(**inputs).loss
        return trainer.state.log_history[0]["loss"], float(after)

    plain, noisy = losses(None), losses(50.0)
    assert abs(plain[0] - noisy[0]) > 1e-3
    assert plain[1] == noisy[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_reads_trains_and_writes(kind: str, dtype: torch.dtype) -> None:
    model = small_model(kind)
    inputs = batch(ragged_rows(model))
    expected = logits(model, inputs)
    model = model.to(dtype)
    got = logits(model, inputs)
    assert got.dtype == dtype
    valid = inputs["attention_mask"].bool()
    correlation = torch.corrcoef(torch.stack([got[valid].float().flatten(), expected[valid].flatten()]))[0, 1]
    assert correlation > 0.99
    loss = model.train()(**with_labels(model, inputs)).loss
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    assert model.eval().generate(**inputs, max_new_tokens=3).shape == (len(valid), valid.shape[1] + 3)


@pytest.mark.slow
def test_a_compiled_training_step_has_the_same_gradients_and_is_compiled_for_any_number_of_labels() -> None:
    model = small_model().train()
    first = model.config.image_seq_length
    torch._dynamo.reset()
    counters.clear()
    # One graph with its gradients is ours; what the default backend makes of it, in two minutes, is torch's
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    num_graphs = []
    for num_labels in (6, 5, 4, 3):
        inputs = with_labels(model, batch([Row(model, PICTURE, 6), Row(model, PICTURE, 6)]))
        inputs["labels"][:, first + num_labels :] = -100
        inputs = {**inputs, "images_per_row": 1, "targets_per_row": num_labels}
        gradients = []
        for each in (model, compiled):
            model.zero_grad()
            each(**inputs).loss.backward()
            gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert difference(gradient, gradients[1][name]) < 1e-3, name
        num_graphs.append(counters["stats"]["unique_graphs"])
    # The second is for any number of labels
    assert num_graphs == [1, 2, 2, 2]


@pytest.mark.slow
def test_a_compiled_forward_goes_on_with_batches_of_other_sizes() -> None:
    model = small_model().train()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager")
    num_graphs = []
    for num_rows, num_words in ((4, 6), (3, 7), (5, 4), (2, 9), (6, 5), (3, 8)):
        inputs = with_labels(model, batch([Row(model, PICTURE, num_words) for _ in range(num_rows)]))
        inputs |= {"images_per_row": 1, "targets_per_row": num_words}
        assert difference(compiled(**inputs).loss, model(**inputs).loss) < 1e-5
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[-1] == num_graphs[2] <= 4


def test_linear_layers_in_eight_bits_on_a_cpu_say_nearly_the_same() -> None:
    model = small_model()
    inputs = batch(ragged_rows(model))
    expected = logits(model, inputs)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    got = logits(quantized, inputs)
    assert difference(got, expected) > 0
    valid = inputs["attention_mask"].bool()
    correlation = torch.corrcoef(torch.stack([got[valid].flatten(), expected[valid].flatten()]))[0, 1]
    assert correlation > 0.98
    assert quantized.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    "options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}], ids=["8 bits", "4 bits"]
)
def test_weights_are_loaded_in_fewer_bits_but_for_the_head_and_the_projector(options: dict, tmp_path: Path) -> None:
    # On a CPU, bitsandbytes takes four bits in widths that are multiples of 64
    stack = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    vision = {**SIGLIP, "hidden_size": 64, "intermediate_size": 128}
    model = small_model(text_config=stack, fusion_stack_config=stack, vision_config=vision)
    model.save_pretrained(tmp_path)
    quantized = DuoStreamForConditionalGeneration.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head", "model.projector"]),
        dtype=torch.float32,
        device_map="cpu",
    )
    linears = {name: type(each) for name, each in quantized.named_modules() if isinstance(each, torch.nn.Linear)}
    whole = {name for name, kind in linears.items() if kind is torch.nn.Linear}
    assert whole == {"lm_head", "model.projector.layers.1", "model.projector.layers.3"}
    assert len(linears) > 20
    inputs = batch(ragged_rows(model))
    valid = inputs["attention_mask"].bool()
    both = torch.stack([logits(each, inputs)[valid].flatten().float() for each in (model, quantized)])
    assert torch.corrcoef(both)[0, 1] > (0.98 if "load_in_8bit" in options else 0.8)
    assert quantized.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
