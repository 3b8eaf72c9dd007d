"""Print the versions of packages beside those that are pinned: python tests/newer_versions.py PINS NAME..."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

pins = dict(re.findall(r"^([\w-]+)==(\S+)$", Path(sys.argv[1]).read_text(), flags=re.MULTILINE))
for name in sys.argv[2:]:
    found = version(name)
    print(f"{name} {found}" + ("" if found == pins[name] else f" (pinned: {pins[name]})"))
