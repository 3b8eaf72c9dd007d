"""Ask one question about every image of a folder, in batches: `python examples/folder.py MODEL FOLDER QUESTION`."""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import reroute_kernels as rk

BATCH = 8
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def main(checkpoint: str, folder: str, question: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.padding_side = "left"  # generation goes on at the end of every row
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)

    with rk.apply(model, rk.suggest(model)):
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = [[Image.open(path).convert("RGB")] for path in batch]
            inputs = processor(images=images, text=[prompt] * len(batch), padding=True, return_tensors="pt")
            inputs = inputs.to(device, model.dtype)
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for path, answer in zip(batch, answers, strict=True):
                print(f"{path.name}: {answer.strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
