"""Ask a model about an image, routed and unrouted: `python examples/one_image.py MODEL IMAGE QUESTION`."""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import reroute_kernels as rk


def main(checkpoint: str, image: str, question: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(image).convert("RGB"), text=prompt, return_tensors="pt")
    inputs = inputs.to(device, model.dtype)

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print("unrouted:", answer())
    with rk.apply(model, rk.suggest(model)) as routing:
        print("rerouted:", answer())
    print(routing.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
