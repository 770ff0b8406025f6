"""Runs lm-eval's `local-completions` model against `dataflow serve`, and compares its log-likelihoods with `dataflow eval`.

    cargo build --release
    pip install 'lm-eval[api]'
    python3 tests/log_likelihoods.py

Trains a small character-level model on a text made here, serves it, and lets lm-eval score a task of a few lines: the
log-likelihood of a continuation given its context. The same number follows from `eval --text` of the two texts, as the
difference of their sums. Says that it was skipped, and succeeds, where lm-eval is not installed.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = os.environ.get("DATAFLOW", ROOT / "target/release/dataflow")
TOLERANCE = 1e-3
# without anything from the network
OFFLINE = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
PIPELINE = """Pipeline(
    about: "a model to be asked", seed: 3,
    stages: [
        ("text", Text(from: [File("text.txt")]), []),
        ("tokens", Chars(validation: 0.1), ["text"]),
        ("batches", Windows(batch: 8, block: 64), ["tokens"]),
        ("model", Model(file: "MODEL", config: {"d_model": 32, "n_layer": 2, "n_head": 2}), ["batches"]),
        ("loss", CrossEntropy, ["model", "batches"]),
        ("optimizer", AdamW(lr: Constant(1e-2), clip: 1.0), ["loss"]),
        ("train", Train(steps: 100), ["optimizer"]),
        ("last", Checkpoint(keep: Last), ["train"]),
    ],
)
"""
TASK = """task: small_task
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def dataflow(folder, *arguments):
    done = subprocess.run([PROGRAM, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def log_likelihood(folder, text):
    """Of all characters but the first, by `eval` on one window."""
    (folder / "one.txt").write_text(text)
    rows = json.loads(dataflow(folder, "eval", "run", "--text", "one.txt", "--block", str(len(text) - 1), "--json"))
    assert rows["blocks"][0]["tokens"] == len(text) - 1, rows
    return -rows["loss"] * (len(text) - 1)


def served(model, folder):
    """Trains a model and serves it: the process, and its address."""
    lines = [f"line {i}: to be, or not to be, that is the question" for i in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "pipe.ron").write_text(PIPELINE.replace("MODEL", str(ROOT / f"models/{model}.ron")))
    dataflow(folder, "run", "pipe.ron", "--out", "run")
    server = subprocess.Popen([PROGRAM, "serve", "run", "--port", "0"], cwd=folder, stdout=subprocess.PIPE, text=True)
    for line in server.stdout:
        if line.startswith("listening at "):
            return server, line.removeprefix("listening at ").strip()
    raise AssertionError("the server did not start")


def ask(model):
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        server, address = served(model, folder)
        try:
            dice, text = random.Random(1), (folder / "text.txt").read_text()
            documents = []
            while len(documents) < 8:
                start, context, rest = dice.randrange(5000), dice.randrange(2, 30), dice.randrange(1, 25)
                piece = text[start:start + context + rest]
                # lm-eval moves white space from the end of a context to the continuation
                if not piece[context - 1].isspace():
                    documents.append(dict(context=piece[:context], continuation=piece[context:]))
            documents.append(dict(context="line 7: to be", continuation="qqq"))
            (folder / "test.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
            (folder / "task.yaml").write_text(TASK.replace("FILE", str(folder / "test.jsonl")))
            found = lm_eval.simple_evaluate(
                model="local-completions",
                model_args=f"model=run,base_url={address}/completions,num_concurrent=4",
                tasks=["small_task"], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                log_samples=True, bootstrap_iters=0)
            samples = found["samples"]["small_task"]
            assert len(samples) == len(documents), (len(samples), len(documents))
            worst = 0.0
            for sample in samples:
                value = float(sample["filtered_resps"][0][0])
                context, continuation = sample["doc"]["context"], sample["doc"]["continuation"]
                wanted = log_likelihood(folder, context + continuation) - log_likelihood(folder, context)
                worst = max(worst, abs(value - wanted))
                print(f"{model}: {context!r} {continuation!r}: lm-eval {value:.5f}, eval {wanted:.5f}")
            assert worst < TOLERANCE, worst
            print(f"{model}: {len(samples)} log-likelihoods differ by {worst:.1e} at most")
        finally:
            server.terminate()
            assert server.wait(60) == 0, "the server did not end well"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="longhorn,llama")
    options = parser.parse_args()
    missing = [name for name in ("lm_eval", "aiohttp", "tenacity", "requests") if not importlib.util.find_spec(name)]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed (pip install 'lm-eval[api]')")
        return
    os.environ.update(OFFLINE)
    for model in options.models.split(","):
        ask(model)


if __name__ == "__main__":
    sys.exit(main())
