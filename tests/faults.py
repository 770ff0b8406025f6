"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with a run that was left alone.

    cargo build --release
    python3 tests/faults.py TEXT [--kills 20] [--seed S] [--set stage.field=value]…

Runs pipelines/shakespeare_quick.ron on the file TEXT, shortened to 400 steps with a checkpoint every 25 and an evaluation
every 50; each --set changes that, --full leaves the pipeline as it is. Kills fall anywhere between the start of the process
and its end, under one or two threads. A run that reaches its end before it was killed often enough is compared and
another one begun. Rows of metrics (all but the speed), weights, moments and counters must be the same bit for bit.
"""
import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = os.environ.get("DATAFLOW", ROOT / "target/release/dataflow")
SHORT = ["train.steps=400", "last.every=25", "eval.every=50", "eval.batches=5"]


def start(arguments, out, folder):
    pipeline = ROOT / "pipelines/shakespeare_quick.ron"
    command = [PROGRAM, "run", pipeline, "--out", out, *arguments]
    log = open(folder / f"{out.name}.log", "a")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def left(run):
    """What a run leaves, by name: its figures without those of time, and its tensors."""
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    for row in rows:
        row.pop("tokens_per_s", None)
        row.pop("mfu", None)
    found = {"rows": rows}
    for path in [run / "best.safetensors", run / "last.safetensors", *(run / "checkpoints").glob("*/*.safetensors")]:
        found[str(path.relative_to(run))] = path.read_bytes()
    return found


def compare(alone, other):
    assert alone.keys() == other.keys(), f"other files: {sorted(alone.keys() ^ other.keys())}"
    assert len(alone["rows"]) == len(other["rows"]), (len(alone["rows"]), len(other["rows"]))
    for a, b in zip(alone["rows"], other["rows"]):
        assert a == b, f"{a} alone, {b} when killed"
    for name in alone:
        assert alone[name] == other[name], f"{name} differs"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    print(f"seed {options.seed}")
    changes = [f'text.from=[File("{options.text.resolve()}")]', f"model.file={ROOT / 'models/longhorn.ron'}"]
    changes += [*([] if options.full else SHORT), *options.set]
    arguments = [part for change in changes for part in ("--set", change)]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        begin = time.monotonic()
        assert start(arguments, folder / "alone", folder).wait() == 0, (folder / "alone.log").read_text()
        whole = time.monotonic() - begin
        alone = left(folder / "alone")
        print(f"alone: {len(alone['rows'])} rows in {whole:.1f} s")
        kills = finished = 0
        while kills < options.kills:
            out = folder / f"killed-{finished}"
            moments = []
            while True:
                resume = (out / "resolved.ron").exists()
                threads = ["--threads", str(dice.choice([1, 2]))]
                # on resuming, the settings are the run's own
                run = start([*(["--resume"] if resume else []), *arguments, *threads], out, folder)
                moment = dice.uniform(0, 4 * whole / options.kills)
                try:
                    code = run.wait(moment if kills < options.kills else None)
                except subprocess.TimeoutExpired:
                    run.kill()
                    run.wait()
                    kills += 1
                    moments.append(f"{moment:.2f}")
                    continue
                assert code == 0, (folder / f"{out.name}.log").read_text()
                break
            compare(alone, left(out))
            finished += 1
            print(f"killed after {', '.join(moments) or 'nothing'} s: the same {len(alone)} parts, bit for bit")
    print(f"{kills} kills in {finished} runs: nothing was lost")


if __name__ == "__main__":
    sys.exit(main())
