"""What `scfm plan --device cpu` says of a run, beside the run itself: seconds and peak memory.

    python scripts/bench/plan_vs_run.py SHARDS [--repeat 3] [--key value ...]

The recipe is `pretrain/quickstart.yaml` made larger (width 128, 4 layers, 32 cells in a batch, 20 steps), so that its
memory stands out from what Python itself takes; other options are keys of the recipe. Plan and run take turns, each in
a process of its own. Measured are the seconds inside `Trainer.fit` (training, validation, checkpoints), the bytes of
tensors alive at its fullest moment (what `torch.cuda.max_memory_allocated` says of a GPU; by the profiler, in a third
process that takes three steps), and the growth of the resident memory. The weights are added: they are there before.
Cores: CPU seconds per second of the run, which shows what other processes left of the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = {
    "data.cells_per_batch": "32",
    "data.tokens_per_pack": "32768",
    "data.valid_fraction": "0.02",
    "model.width": "128",
    "model.hidden": "128",
    "model.heads": "4",
    "model.layers": "4",
    "trainer.max_steps": "20",
    "trainer.accelerator": "cpu",
}


def main(arguments: list[str]) -> None:
    shards, *rest = arguments
    given = dict(zip([name.removeprefix("--") for name in rest[::2]], rest[1::2], strict=True))
    repeats = int(given.pop("repeat", "3"))
    keys = KEYS | {"data.shards": shards} | given
    options = [part for name, value in keys.items() for part in (f"--{name}", value)]
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="scfm-plan-") as folder:
            rows.append(compare(options, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{'seconds':>25}{'tensors, MB':>25}{'process, MB':>15}")
    print("".join(f"{name:>{width}}" for name, width in 2 * [("planned", 10), ("run", 8), ("ratio", 7)]))
    for row in rows:
        (a, b), (c, d) = row["seconds"], row["tensors"]
        print(f"{a:10.1f}{b:8.1f}{a / b:7.2f}{c / 1e6:10.0f}{d / 1e6:8.0f}{c / d:7.2f}{row['process'] / 1e6:15.0f}")


def compare(options: list[str], folder: Path) -> dict[str, Any]:
    """Plan a recipe, run it, and return (planned, measured) of each figure."""
    from scfm.recipe_reader import bundled

    recipe = ["--config", str(bundled("pretrain/quickstart.yaml")), *options]
    planned = folder / "plan.json"
    command = [sys.executable, "-m", "scfm.cli", "plan", *recipe, "--device", "cpu", "--json", str(planned)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for what, more in (("run", []), ("tensors", ["--trainer.max_steps", "3"])):
        child = [sys.executable, __file__, what, str(folder / f"{what}.json"), *recipe, *more]
        subprocess.run([*child, "--out", str(folder / what)], check=True, stdout=subprocess.DEVNULL)
    plan, run, tensors = (json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "run", "tensors"))
    weights = plan["memory"]["weights"]
    return {
        "seconds": (plan["seconds"], run["seconds"]),
        "tensors": (plan["memory"]["total"], tensors["alive"] + weights),
        "process": run["growth"] + weights,
        "steps": plan["steps"],
        "ceiling_gflops": plan["ceiling"] / 1e9,
        "mfu": plan["mfu"],
        "cores": run["cores"],
    }


def run(out: Path, arguments: list[str]) -> None:
    """Run `scfm pretrain` in this process, and write what `Trainer.fit` took."""
    import lightning as L

    from scfm.cli import main as scfm

    fit, found = L.Trainer.fit, {}

    def measured(*args: Any, **kwargs: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        fit(*args, **kwargs)
        found["seconds"] = time.perf_counter() - wall
        found["cores"] = (time.process_time() - cpu) / found["seconds"]
        found["growth"] = resident("VmHWM") - before

    L.Trainer.fit = measured  # type: ignore[method-assign]
    if scfm(["pretrain", *arguments]) != 0:
        sys.exit("the run failed")
    out.write_text(json.dumps(found))


def tensors(out: Path, arguments: list[str]) -> None:
    """Run `scfm pretrain` in this process, and write the most bytes of tensors that were alive in `Trainer.fit`."""
    import lightning as L
    from torch.profiler import ProfilerActivity, profile

    from scfm.cli import main as scfm

    fit, trace = L.Trainer.fit, out.with_suffix(".trace")

    def traced(*args: Any, **kwargs: Any) -> None:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            fit(*args, **kwargs)
        profiler.export_chrome_trace(str(trace))

    L.Trainer.fit = traced  # type: ignore[method-assign]
    if scfm(["pretrain", *arguments]) != 0:
        sys.exit("the run failed")
    events = json.loads(trace.read_text())["traceEvents"]
    alive = max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
    out.write_text(json.dumps({"alive": alive}))


def resident(name: str) -> int:
    """Return a figure of /proc/self/status in bytes: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    if sys.argv[1:2] in (["run"], ["tensors"]):
        {"run": run, "tensors": tensors}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
    else:
        main(sys.argv[1:])
