"""Ask a routed vLLM server about an image: `python examples/vllm_client.py URL MODEL IMAGE QUESTION`.

Start the server by `vllm serve MODEL` with the arguments that `reroute-kernels vllm-args MODEL POLICY` prints. A client
needs nothing of this library: routed or not, the server speaks OpenAI's API.
"""

import base64
import json
import mimetypes
import sys
from pathlib import Path
from urllib.request import Request, urlopen


def main(url: str, model: str, image: str, question: str) -> None:
    kind = mimetypes.guess_type(image)[0] or "image/png"
    picture = f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 32, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{url.rstrip('/')}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urlopen(request) as response:
        print(json.load(response)["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main(*sys.argv[1:])
