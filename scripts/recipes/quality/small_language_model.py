"""
A small language model that has read news, abstracts and sentences about films, and none about photographs, for
`duostream benchmark quality --text`.

    python scripts/recipes/quality/small_language_model.py path/to/data runs/small_language_model

The folder `path/to/data` has `ag_news`, `scitldr` and `sst2`, each with `train.jsonl` and `validation.jsonl`.
"""

import sys
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from duostream import train_tokenizer

COLUMNS = {"ag_news": "text", "scitldr": "document", "sst2": "sentence"}
BLOCK_LEN = 256


def load_texts(folder: str, split: str) -> Dataset:
    parts = []
    for name, column in COLUMNS.items():
        rows = load_dataset("json", data_files=f"{folder}/{name}/{split}.jsonl", split="train")
        parts.append(rows.select_columns([column]).rename_columns({column: "text"} if column != "text" else {}))
    return concatenate_datasets(parts)


def main(data: str, output_dir: str, max_steps: int = 700) -> None:
    set_seed(0)
    texts = {split: load_texts(data, split) for split in ("train", "validation")}
    tokenizer = train_tokenizer(texts["train"]["text"], vocab_size=4096)

    def as_blocks(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = [i for text in batch["text"] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        return {"input_ids": [ids[i : i + BLOCK_LEN] for i in range(0, len(ids) - BLOCK_LEN + 1, BLOCK_LEN)]}

    train_rows, eval_rows = (rows.map(as_blocks, batched=True, remove_columns="text") for rows in texts.values())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        initializer_range=256**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = TrainingArguments(
        f"{output_dir}_run",
        max_steps=max_steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        args,
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_rows,
        eval_rows.select(range(min(300, len(eval_rows)))),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
