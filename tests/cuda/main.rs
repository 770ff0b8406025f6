//! The CUDA device without a GPU: the built program runs with `--device cuda` on stand-ins for the driver, NVRTC and
//! cuBLASLt (kernels/cuda/emulation), which compile its kernels with g++ and run them on the processor. Device code is the
//! same as on a GPU.

mod stand_in;

use std::fs;
use std::path::{Path, PathBuf};

use stand_in::StandIn;

/// Thread orders of the emulation: ascending, descending, shuffled.
const ORDERS: [u32; 3] = [0, 1, 20_231];

/// Files of a folder of golden data.
fn golden(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder);
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    files.sort();
    files
}

/// `verify` of these files passes with every tensor compared.
fn verify(cuda: &StandIn, files: &[PathBuf], order: u32) {
    let mut arguments = vec!["verify", "--device", "cuda"];
    arguments.extend(files.iter().map(|f| f.to_str().unwrap()));
    let ran = cuda.dataflow(&arguments, order);
    assert!(ran.status.success(), "order {order}: {}{}", ran.out, ran.err);
    assert!(ran.out.contains("tensors agree"), "{}", ran.out);
}

#[test]
fn every_op_agrees_with_its_golden_file_in_any_thread_order() {
    let Some(cuda) = StandIn::find() else { return };
    for order in ORDERS {
        verify(&cuda, &golden("ops"), order);
    }
}

#[test]
fn every_model_agrees_with_its_golden_file_and_decodes() {
    let Some(cuda) = StandIn::find() else { return };
    for file in golden("models") {
        let ran = cuda.dataflow(&["verify", "--device", "cuda", file.to_str().unwrap()], ORDERS[1]);
        assert!(ran.status.success(), "{}{}", ran.out, ran.err);
        assert!(ran.out.contains("by steps"), "{}", ran.out);
    }
}

const MODELS: [&str; 6] = ["llama", "rwkv", "retnet", "gla", "mamba", "longhorn"];

/// The figures of ten steps of training: losses, norms, rates and evaluations.
fn metrics(folder: &Path) -> Vec<(String, f64)> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let mut all = Vec::new();
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let step = row["step"].as_u64().unwrap();
        for key in ["loss", "grad_norm", "lr"] {
            all.extend(row[key].as_f64().map(|x| (format!("{key} of step {step}"), x)));
        }
        for key in ["train", "val"] {
            all.extend(row["eval"][key].as_f64().map(|x| (format!("{key} loss after step {step}"), x)));
        }
    }
    all
}

#[test]
fn ten_steps_of_every_model_match_the_cpu_device() {
    let Some(cuda) = StandIn::find() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for model in MODELS {
        let file = format!("model.file={}", root.join(format!("models/{model}.ron")).display());
        let run = |device: &str, more: &[&str]| {
            let out = cuda.folder.path().join(format!("{model}-{device}-{}", more.len()));
            let mut arguments = vec!["run", "pipelines/recall.ron", "--device", device, "--set", &file];
            let sizes =
                ["model.config.d_model=32", "batches.batch=4", "train.steps=10", "eval.every=10", "eval.batches=1"];
            sizes.iter().for_each(|set| arguments.extend(["--set", set]));
            arguments.extend(["--out", out.to_str().unwrap()]);
            arguments.extend(more);
            let ran = cuda.dataflow(&arguments, ORDERS[2]);
            assert!(ran.status.success(), "{model} on {device}: {}{}", ran.out, ran.err);
            metrics(&out)
        };
        let (cpu, gpu) = (run("cpu", &[]), run("cuda", &["--precision", "f32"]));
        assert!(cpu.len() >= 30 && cpu.len() == gpu.len(), "{model}: {} and {} figures", cpu.len(), gpu.len());
        let mut largest = 0.0f64;
        for ((name, a), (_, b)) in cpu.iter().zip(&gpu) {
            let error = (a - b).abs() / a.abs().max(1e-30);
            largest = largest.max(error);
            assert!(error < 1e-4, "{model}: {name} is {a} on the processor and {b} on the stand-in");
        }
        assert_eq!(
            gpu,
            run("cuda", &["--precision", "f32", "--without", "capture"]),
            "{model}: launch by launch, other numbers"
        );
        // the default of the device
        let narrow = run("cuda", &[]);
        let mut rounding = 0.0f64;
        for ((name, a), (_, b)) in cpu.iter().zip(&narrow).filter(|((name, _), _)| name.contains("loss")) {
            let error = (a - b).abs() / a;
            rounding = rounding.max(error);
            assert!(error < 5e-3, "{model} in bf16: {name} is {b}, and {a} in f32");
        }
        assert!(narrow != gpu, "{model}: nothing was rounded");
        let count = cpu.len();
        println!(
            "{model}: {count} figures, largest relative difference {largest:.1e}, of losses in bf16 {rounding:.1e}"
        );
    }
}

#[test]
fn bad_tokens_are_reported_in_words() {
    let Some(cuda) = StandIn::find() else { return };
    let folder = cuda.folder.path();
    fs::write(folder.join("text.txt"), "the quick brown fox jumps over the lazy dog\n".repeat(50)).unwrap();
    let pipeline = "Pipeline(about: \"tokens that the model does not have\", seed: 1, stages: [
        (\"text\", Text(from: [File(\"text.txt\")]), []),
        (\"tokens\", Chars(validation: 0.1), [\"text\"]),
        (\"batches\", Windows(batch: 2, block: 8), [\"tokens\"]),
        (\"model\", Model(file: \"small.ron\"), [\"batches\"]),
        (\"loss\", CrossEntropy, [\"model\", \"batches\"]),
        (\"optimizer\", AdamW(lr: Constant(1e-3)), [\"loss\"]),
        (\"train\", Train(steps: 2), [\"optimizer\"])])";
    let model = "Model(about: \"\", config: {}, nodes: [
        (\"embedding\", Embedding(rows: 3, dim: 4), [\"tokens\"]),
        (\"logits\", Linear(out: 100), [\"embedding\"])], output: \"logits\")";
    fs::write(folder.join("pipeline.ron"), pipeline).unwrap();
    fs::write(folder.join("small.ron"), model).unwrap();
    let ran = cuda.dataflow_in(folder, &["run", "pipeline.ron", "--device", "cuda", "--out", "out"], 0);
    assert!(!ran.status.success(), "{}", ran.out);
    assert!(ran.err.contains("`embedding`: id ") && ran.err.contains("outside of a table of 3 rows"), "{}", ran.err);
}

#[test]
fn a_second_start_compiles_nothing() {
    let Some(cuda) = StandIn::find() else { return };
    let file = &golden("ops").into_iter().filter(|f| f.ends_with("silu.safetensors")).collect::<Vec<_>>();
    verify(&cuda, file, 0);
    // the stand-in compiler cannot run any more
    let mut command = cuda.command(&["verify", "--device", "cuda", file[0].to_str().unwrap()], 0);
    let output = command.env("PATH", "/nowhere").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_known_device_has_its_utilization_in_all_figures() {
    let Some(cuda) = StandIn::find() else { return };
    let folder = cuda.folder.path();
    let pipeline = "Pipeline(about: \"\", seed: 1, stages: [
        (\"text\", Text(from: [File(\"text.txt\")]), []),
        (\"tokens\", Chars(validation: 0.1), [\"text\"]),
        (\"batches\", Windows(batch: 2, block: 32), [\"tokens\"]),
        (\"model\", Model(file: \"small.ron\"), [\"batches\"]),
        (\"loss\", CrossEntropy, [\"model\", \"batches\"]),
        (\"optimizer\", AdamW(lr: Constant(1e-3)), [\"loss\"]),
        (\"train\", Train(steps: 3), [\"optimizer\"])])";
    let model = "Model(about: \"\", config: {}, nodes: [
        (\"embedding\", Embedding(rows: 40, dim: 16), [\"tokens\"]),
        (\"logits\", Linear(out: 40), [\"embedding\"])], output: \"logits\")";
    fs::write(folder.join("text.txt"), "the quick brown fox jumps over the lazy dog\n".repeat(50)).unwrap();
    fs::write(folder.join("pipeline.ron"), pipeline).unwrap();
    fs::write(folder.join("small.ron"), model).unwrap();
    let ran = cuda.dataflow_in(folder, &["plan", "small.ron", "--batch", "2", "--block", "32", "--json"], 0);
    assert!(ran.status.success(), "{}", ran.err);
    let plan: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let flops_per_token = plan["flops_per_step"].as_f64().unwrap() / 64.0;
    // rates of the data sheet: products of f32 without tensor cores, of bf16 with them
    for (precision, peak) in [("f32", 66.9e12), ("bf16", 989.4e12)] {
        let arguments = ["run", "pipeline.ron", "--device", "cuda", "--precision", precision, "--out", precision];
        let mut command = cuda.command(&arguments, 0);
        let output = command.current_dir(folder).env("EMULATION_NAME", "NVIDIA H100 80GB HBM3").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(out.lines().any(|line| line.starts_with("step 1/3") && line.contains(" % mfu | ")), "{out}");
        let rows = fs::read_to_string(folder.join(precision).join("metrics.jsonl")).unwrap();
        assert_eq!(rows.lines().count(), 3);
        for row in rows.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()) {
            let achieved = row["mfu"].as_f64().unwrap() * peak;
            let expected = flops_per_token * row["tokens_per_s"].as_f64().unwrap();
            assert!((achieved / expected - 1.0).abs() < 0.05, "{achieved} and {expected}: {row}");
        }
        let mut entries = fs::read_dir(folder.join(precision)).unwrap().flatten();
        let events = entries.find(|e| e.file_name().to_string_lossy().contains("tfevents")).unwrap();
        assert!(fs::read(events.path()).unwrap().windows(9).any(|tag| tag == b"train/mfu"));
    }
    // a device without a sheet has none
    let ran = cuda.dataflow_in(folder, &["run", "pipeline.ron", "--device", "cuda", "--out", "unknown"], 0);
    assert!(ran.status.success() && !ran.out.contains("mfu"), "{}{}", ran.out, ran.err);
    assert!(!fs::read_to_string(folder.join("unknown/metrics.jsonl")).unwrap().contains("mfu"));
}
