#!/usr/bin/env python3
"""Times training steps of `dataflow` and of PyTorch side by side, and prints a table of ratios.

    cargo build --release
    python tests/bench/against_pytorch.py PATH/torch_step.py [--models llama,gla] [--sizes quick] [--precisions f32]

The machine drifts, so only figures that were taken in turn count: each round runs PyTorch and this program once,
and a cell is the median over the rounds of PyTorch's time over ours, both in the round. Times are medians of a
run's steps; the column of the fastest steps compares those, which other work on the machine disturbs least. The peer script is any that takes `--model --config --batch --mode --dtype --threads --steps --warmup` and
prints one JSON object with `step_ms_median` and `step_ms_min` as its last line. Keep the machine idle meanwhile.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ["llama", "rwkv", "gla", "retnet", "mamba", "longhorn"]
SIZES = {
    "shakespeare": dict(batch=8, block=256, set=dict(vocab=65, n_layer=6, n_head=6, d_model=384)),
    "quick": dict(batch=12, block=64, set=dict(vocab=65, n_layer=4, n_head=4, d_model=128)),
}
# times faster than PyTorch that the project wants to be, by model
WANTED = {
    ("shakespeare", "f32"): dict(llama=1.3, rwkv=1.3, gla=1.25, retnet=1.4, mamba=3.0, longhorn=3.2),
    ("shakespeare", "bf16"): dict(llama=1.3, rwkv=1.3, gla=1.3, retnet=1.4, mamba=3.0, longhorn=3.0),
    ("quick", "f32"): dict(llama=2.0, rwkv=2.0, gla=2.0, retnet=2.0, mamba=8.0, longhorn=8.0),
}
# PyTorch's large temporaries come back faster from an allocator that keeps its pages
ALLOCATOR = dict(MALLOC_MMAP_THRESHOLD_="8589934592", MALLOC_TRIM_THRESHOLD_="17179869184")


def last_json(command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(a, model, size, precision):
    s = SIZES[size]
    settings = [x for name, value in s["set"].items() for x in ("--set", f"{name}={value}")]
    return last_json([a.program, "bench", str(ROOT / "models" / f"{model}.ron"), "--batch", str(s["batch"]),
                      "--block", str(s["block"]), *settings, "--steps", str(a.steps), "--threads", str(a.threads),
                      "--precision", precision, "--json"])


def theirs(a, model, size, precision, mode):
    return last_json([a.python, a.peer, "--model", model, "--config", size, "--batch", str(SIZES[size]["batch"]),
                      "--mode", mode, "--dtype", precision, "--threads", str(a.threads), "--steps", str(a.steps),
                      "--warmup", "2"], **ALLOCATOR)


def measure(a, model, size, precision):
    rounds = []
    for _ in range(a.rounds):
        peers = [theirs(a, model, size, precision, mode) for mode in a.modes.split(",")]
        rounds.append((min(peers, key=lambda p: p["step_ms_median"]), ours(a, model, size, precision)))
    middle = lambda figure: statistics.median(figure(peer, own) for peer, own in rounds)
    return dict(model=model, size=size, precision=precision, rounds=len(rounds),
                ratio=middle(lambda p, o: p["step_ms_median"] / o["step_ms_median"]),
                ratio_of_fastest=middle(lambda p, o: p["step_ms_min"] / o["step_ms_min"]),
                pytorch_ms=middle(lambda p, o: p["step_ms_median"]), dataflow_ms=middle(lambda p, o: o["step_ms_median"]),
                roofline_fraction=middle(lambda p, o: o["roofline_fraction"]),
                wanted=WANTED.get((size, precision), {}).get(model))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("peer", help="the script that times PyTorch")
    ap.add_argument("--python", default=sys.executable, help="the interpreter that has PyTorch")
    ap.add_argument("--program", default=str(ROOT / "target/release/dataflow"))
    ap.add_argument("--models", default=",".join(MODELS))
    ap.add_argument("--sizes", default=",".join(SIZES))
    ap.add_argument("--precisions", default="f32,bf16")
    ap.add_argument("--modes", default="eager", help="of PyTorch, comma-separated: eager, compile; the best counts")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--steps", type=int, default=5)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--json", action="store_true", help="print one JSON object for each cell instead of the table")
    a = ap.parse_args()
    if a.rounds < 3:
        ap.error("--rounds must be at least 3: a median of fewer says little")
    if not a.json:
        print("| size | precision | model | PyTorch, ms | dataflow, ms | times faster | of the fastest steps | wanted | "
              "of the roofline |")
        print("|---|---|---|---|---|---|---|---|---|")
    for size in a.sizes.split(","):
        for precision in a.precisions.split(","):
            for model in a.models.split(","):
                cell = measure(a, model, size, precision)
                if a.json:
                    print(json.dumps(cell), flush=True)
                    continue
                wanted = f"{cell['wanted']:.2f}" if cell["wanted"] else ""
                print(f"| {size} | {precision} | {model} | {cell['pytorch_ms']:.1f} | {cell['dataflow_ms']:.1f} | "
                      f"{cell['ratio']:.2f} | {cell['ratio_of_fastest']:.2f} | {wanted} | {cell['roofline_fraction']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
