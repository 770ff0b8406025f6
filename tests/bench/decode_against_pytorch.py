#!/usr/bin/env python3
"""Times decoding of `dataflow` and of PyTorch in turn, and prints a table of ratios.

    cargo build --release
    python tests/bench/decode_against_pytorch.py [--sizes shakespeare,120m] [--batches 1,16] [--rounds 3]

A round runs PyTorch (tests/peers/decode.py) and then this program, at the same sizes behind as many tokens; a cell is the
median over the rounds of PyTorch's time per token over ours, both in the round. LLaMA stands against `generate` as nanoGPT has it,
which runs the whole context again for each token, and against a step with a key-value cache; Longhorn against its
recurrence written by hand. The last column is the share of what memory allows: bytes of the parameters over the measured
rate, over the time of a step. Keep the machine idle meanwhile.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "shakespeare": dict(context=256, vocab=65, layers=6, heads=6, d_model=384),
    "120m": dict(context=256, vocab=50304, layers=12, heads=12, d_model=768),
}
OUR_NAMES = dict(vocab="vocab", layers="n_layer", heads="n_head", d_model="d_model")


def last_json(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def theirs(a, size, batch):
    s = SIZES[size]
    flags = [part for name, value in s.items() for part in (f"--{name.replace('_', '-')}", value)]
    return last_json([a.python, ROOT / "tests/peers/decode.py", *flags, "--batch", batch, "--threads", a.threads,
                      "--steps", a.peer_steps, "--cache"])


def ours(a, model, size, batch, weights):
    s = SIZES[size]
    settings = [part for name, key in OUR_NAMES.items() for part in ("--set", f"{key}={s[name]}")]
    # learned positions and the like end at `block`
    settings += ["--set", f"block={2 * s['context']}"]
    return last_json([a.program, "bench", ROOT / f"models/{model}.ron", "--decode", "--batch", batch, "--block",
                      s["context"], *settings, "--steps", a.steps, "--threads", a.threads, "--weights", weights,
                      "--json"])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--program", default=ROOT / "target/release/dataflow")
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--sizes", default=",".join(SIZES))
    p.add_argument("--batches", default="1,16")
    p.add_argument("--weights", default="f32")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--peer-steps", type=int, default=6)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    a = p.parse_args()
    print("| size | batch | model | against | PyTorch, tokens/s | dataflow, tokens/s | times faster | of the bound |")
    print("|---|---|---|---|---|---|---|---|")
    for size in a.sizes.split(","):
        for batch in map(int, a.batches.split(",")):
            rounds = []
            for _ in range(a.rounds):
                peer = theirs(a, size, batch)
                own = {m: ours(a, m, size, batch, w) for w in [a.weights] for m in ("llama", "longhorn")}
                rounds.append((peer, own))
            for model, name, against in [("llama", "llama", "generate"), ("llama", "llama_cached", "key-value cache"),
                                         ("longhorn", "longhorn", "recurrent step")]:
                middle = lambda pick: statistics.median(pick(peer[name], own[model]) for peer, own in rounds)
                print(f"| {size} | {batch} | {model} | {against} | {middle(lambda t, o: t['tokens_per_s']):.1f} "
                      f"| {middle(lambda t, o: o['tokens_per_s']):.1f} "
                      f"| {middle(lambda t, o: o['tokens_per_s'] / t['tokens_per_s']):.2f} "
                      f"| {middle(lambda t, o: o['bound_fraction']):.2f} |", flush=True)


if __name__ == "__main__":
    main()
