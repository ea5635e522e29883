"""The PyTorch side of a comparison.

    peer.py prepare FOLDER           writes weights and inputs that both sides read
    peer.py trial FOLDER VARIANT     times one way to compute the row, and writes its outputs
    peer.py worker FOLDER VARIANT    runs when it is told to, one line of JSON for each run

FOLDER holds row.json, the row's declaration.
"""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "systems"))

# A run that takes longer is not tried twice.
LONG_MS = 3000.0


def say(**message):
    print(json.dumps(message), flush=True)


def peak_kib():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def milliseconds(run, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) * 1e3 / repeats


def prepare(task, row, folder):
    import torch

    torch.manual_seed(20260101)
    task.prepare(row, folder)


def trial(task, row, folder, variant):
    end_with_parent()
    opened = task(row, folder, variant)
    outputs = opened.check()
    if row["repeats"] > 1:
        opened.run()
    times = [milliseconds(opened.run, row["repeats"])]
    if times[0] < LONG_MS:
        times.append(milliseconds(opened.run, row["repeats"]))
    peak = getattr(opened, "peak_kib", None) or peak_kib()
    if outputs is not None:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in outputs.items()}, folder / f"{slug(variant)}.safetensors")
    say(ms=min(times), peak_kib=peak)


def end_with_parent():
    """Stops when the harness is stopped: its end of our input closes."""

    def watch():
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def slug(variant):
    return "torch-" + "".join(c if c.isalnum() else "-" for c in variant)


def worker(task, row, folder, variant):
    imported = peak_kib()
    opened = task(row, folder, variant)
    say(ready=True, base_kib=imported)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("run"):
            say(ms=milliseconds(opened.run, row["repeats"]), peak_kib=getattr(opened, "peak_kib", None))
        else:
            break


def main():
    command, folder, *rest = sys.argv[1:]
    folder = Path(folder)
    row = json.loads((folder / "row.json").read_text())
    system = importlib.import_module(row["system"])
    if not getattr(system, "LIGHT", False):
        import torch

        torch.set_num_threads(row["threads"])
    task = system.TASKS[row["task"]]
    {"prepare": prepare, "trial": trial, "worker": worker}[command](task, row, folder, *rest)


if __name__ == "__main__":
    main()
