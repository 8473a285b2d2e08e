"""Everything about scfm that only a GPU can tell, in under eight minutes, as one JSON.

    python scripts/bench/gpu.py gpu.json                     # on a CUDA device
    python scripts/bench/gpu.py gpu.json --device cpu --tiny # a try of every part, on small shapes

Needs torch, numpy, numba and lightning, no more. The most important part is first. Each has a share of the time; what
one leaves goes to the next. What goes wrong in one is written down with its traceback and loses nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpu_kernels import attention_speed, matmuls, numerics, usable
from gpu_record import Record
from gpu_training import beside_dense, end_to_end, largest_pack, no_waiting

from scfm.evaluation.provenance import commit
from scfm.model.attention import pick_backend
from scfm.version import __version__

DEADLINE = 460.0
# part -> its seconds
PARTS: dict[Callable[[Record], None], float] = {
    numerics: 80,
    matmuls: 15,
    end_to_end: 190,
    beside_dense: 60,
    attention_speed: 40,
    no_waiting: 25,
    largest_pack: 50,
}


def about(device: torch.device, tiny: bool) -> dict[str, object]:
    """Return what the figures depend on."""
    cuda = device.type == "cuda"
    return {
        "scfm": __version__,
        "commit": commit() or os.environ.get("COMMIT"),  # a copy of the tree has no history
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "tiny": tiny,
        "backends": usable(device, 64),
        "auto": pick_backend(device, torch.bfloat16, 64),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script where there is no GPU")
    parser.add_argument("--parts", nargs="*", metavar="PART", help="only these", choices=[p.__name__ for p in PARTS])
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for everything")
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    record = Record(options.out, device, options.tiny, options.deadline)
    record.about = about(device, options.tiny)
    print("  ".join(f"{name} {value}" for name, value in record.about.items()), flush=True)
    until = 0.0
    for part, seconds in PARTS.items():
        if options.parts and part.__name__ not in options.parts:
            continue
        until += seconds * options.deadline / DEADLINE
        with record.running(part.__name__, until if not options.parts else options.deadline):
            part(record)
    failures = record.failures
    print(f"{record.path}: {'all parts ran' if not failures else 'failed: ' + '; '.join(failures)}")


if __name__ == "__main__":
    main()
