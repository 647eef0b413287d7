"""Teach a Gemma to transcribe a folder of recordings, `a.wav` beside `a.txt`, with adapters on decoder and audio tower.

python examples/finetune_gemma_audio.py google/gemma-3n-E2B-it recordings/ --output adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path

from audiomm import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    DataCollatorForCausalLM,
    LoraConfig,
    Trainer,
    TrainingArguments,
    add_lora,
    save_lora,
    trainable_report,
)

PROMPT = "Write down word for word what is said in this recording."


def sample(recording: Path) -> dict:
    question = [{"type": "audio", "path": str(recording)}, {"type": "text", "text": PROMPT}]
    answer = recording.with_suffix(".txt").read_text(encoding="utf-8").strip()
    return {
        "path": str(recording),
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", default="gemma-adapter")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args(argv)

    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForMultimodalLM.from_pretrained(arguments.model)
    add_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    print({part: numbers for part, numbers in trainable_report(model).items() if numbers[0]})
    options = TrainingArguments(
        arguments.output, max_steps=arguments.steps, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none"
    )
    samples = [sample(path) for path in sorted(arguments.data.glob("*.wav"))]
    Trainer(model, options, data_collator=DataCollatorForCausalLM(processor), train_dataset=samples).train()
    save_lora(model, arguments.output)


if __name__ == "__main__":
    main()
