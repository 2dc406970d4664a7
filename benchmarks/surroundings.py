"""What a figure depends on besides the code that is measured: written into the JSON lines of the scripts beside it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any


def surroundings() -> dict[str, Any]:
    """Kind of CPU, its cores, how many processes computed during the last quarter of an hour, commit, date."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    cpu = f"{told.get('model name', '?')} (family {told.get('cpu family', '?')}, model {told.get('model', '?')})"
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    load = round(os.getloadavg()[2], 1)
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, "commit": commit, "date": time.strftime("%F")}
