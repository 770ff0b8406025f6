//! Weights that PyTorch reads, and weights that PyTorch wrote. Needs Python with `torch` and `safetensors`; for the
//! published models also the environment variable `DATAFLOW_REFERENCE`, the folder of a `train.py` with
//! `build(name, vocab_size, n_layer, n_head, n_embd, block_size)`.

use std::process::Command;
use std::sync::{Arc, OnceLock};

use dataflow::App;
use dataflow::checkpoint::{Numbers, Tensor, Tensors, tensors};
use dataflow::graph::compile::{Request, compile};
use dataflow::graph::components::Options;
use dataflow::graph::session::Session;
use dataflow::kernels::device::CpuDevice;
use dataflow::saved::Saved;
use serde_json::json;

use super::{Folder, repository};

const MODELS: [&str; 6] = ["llama", "rwkv", "retnet", "gla", "mamba", "longhorn"];

/// Whether Python has what it takes; says so once if not.
fn python() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let done = Command::new("python3").args(["-c", "import torch, safetensors.torch"]).output();
        let found = done.is_ok_and(|d| d.status.success());
        if !found {
            eprintln!("skipped: python3 has no torch and safetensors");
        }
        found
    })
}

/// The folder of the reference models.
fn reference() -> Option<String> {
    let path = std::env::var("DATAFLOW_REFERENCE").ok();
    if path.is_none() {
        eprintln!("skipped: DATAFLOW_REFERENCE does not name the folder of the reference models");
    }
    path.filter(|_| python())
}

/// Runs `tests/pytorch/reference.py`.
#[track_caller]
fn script(folder: &Folder, arguments: &[&str]) {
    let mut command = Command::new("python3");
    let done =
        command.arg(repository("tests/pytorch/reference.py")).args(arguments).current_dir(folder.path("")).output();
    let done = done.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr));
    print!("{}", text(&done.stdout));
}

/// The logits `[B, T, V]` of a saved model.
fn logits(saved: &Saved, tokens: &[i32], batch: usize, block: usize) -> Tensor {
    let registry = App::new().into_registry();
    let request = Request {
        registry,
        scope: saved.scope(&Default::default()).unwrap(),
        model: saved.model.clone(),
        options: Options::new(batch, block),
        objectives: Vec::new(),
        optimizer: None,
        without: Vec::new(),
        memory_budget: None,
    };
    let device = Arc::new(CpuDevice::new(None).unwrap());
    let mut session = Session::new(device, &compile(&request).unwrap(), None).unwrap();
    saved.fill(&session).unwrap();
    session.write_input("tokens", tokens);
    session.run_step().unwrap();
    Tensor::f32(session.plan().outputs["logits"].tensor.shape.clone(), session.output("logits").unwrap())
}

#[test]
fn our_weights_in_the_reference_models() {
    let Some(reference) = reference() else { return };
    for model in MODELS {
        let folder = Folder::with_pipeline();
        let file = format!("model.file={}", repository(&format!("models/{model}.ron")));
        let sizes = ["model.config.d_model=32", "model.config.n_layer=2", "model.config.n_head=2"];
        let mut arguments = vec!["run", "pipe.ron", "--out", "mine", "--set", &file];
        sizes.iter().for_each(|s| arguments.extend(["--set", s]));
        folder.succeeds(&arguments);
        let saved = Saved::open(&folder.path("mine/last.safetensors")).unwrap();
        let vocabulary = saved.scope(&Default::default()).unwrap().get("vocab").unwrap().int().unwrap();
        let tokens: Vec<i32> = (0..32).map(|i| (7 * i + i * i) % vocabulary as i32).collect();
        let ours = Tensors::from([
            ("logits".to_string(), logits(&saved, &tokens, 2, 16)),
            ("tokens".to_string(), Tensor { shape: vec![2, 16], numbers: Numbers::I32(tokens) }),
        ]);
        tensors::write(&folder.path("logits.safetensors"), &ours, &Default::default()).unwrap();
        let config = json!({
            "vocab_size": vocabulary, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16,
        });
        let files = ["mine/last.safetensors", "logits.safetensors"];
        script(&folder, &["load", &reference, model, files[0], files[1], &config.to_string()]);
    }
}

#[test]
fn weights_of_the_reference_models_are_imported() {
    let Some(reference) = reference() else { return };
    let config = json!({"vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}).to_string();
    let sizes = ["vocab=40", "n_layer=2", "n_head=2", "d_model=32", "block=16"];
    for model in MODELS {
        let folder = Folder::new();
        script(&folder, &["save", &reference, model, ".", &config]);
        let import = |file: &str| {
            let path = repository(&format!("models/{model}.ron"));
            let out = format!("{file}.run");
            let mut arguments = vec!["import", file, "--model", &path, "-o", &out];
            sizes.iter().for_each(|s| arguments.extend(["--set", s]));
            folder.succeeds(&arguments);
            Saved::open(&folder.path(&out)).unwrap().parameters
        };
        let files = ["safetensors", "pt"].map(|kind| import(&format!("{model}.{kind}")));
        assert!(!files[0].is_empty() && files[0] == files[1], "{model}");
        assert!(import(&format!("{model}-checkpoint.pt")) == files[0], "{model}");
        // bf16 has 8 bits of fraction
        for (name, tensor) in import(&format!("{model}-bf16.bin")) {
            for (a, b) in tensor.as_f32().unwrap().iter().zip(files[0][&name].as_f32().unwrap()) {
                assert!((a - b).abs() <= b.abs() / 256.0, "{model}: {name}: {a} and {b}");
            }
        }
    }
}

#[test]
fn a_llama_under_hugging_face_names() {
    if !python() {
        return;
    }
    let folder = Folder::new();
    let config = json!({"vocab": 40, "d_model": 32, "n_layer": 2, "n_head": 4, "d_hidden": 48});
    script(&folder, &["llama", ".", &config.to_string()]);
    let (model, mapping) = (repository("models/llama.ron"), repository("models/mappings/huggingface_llama.ron"));
    let sizes = ["vocab=40", "n_layer=2", "n_head=4", "d_model=32", "d_hidden=48", "block=16"];
    let mut arguments = vec!["import", "pytorch_model.bin", "--model", &model, "-o", "mine"];
    sizes.iter().for_each(|s| arguments.extend(["--set", s]));
    let message = folder.fails(&arguments);
    assert!(message.contains("missing: transformer.wte.weight [40, 32]\n"), "{message}");
    assert!(message.contains("extra: model.embed_tokens.weight [40, 32]\n"), "{message}");
    assert!(message.contains("--mapping models/mappings/"), "{message}");
    arguments.extend(["--mapping", &mapping]);
    folder.succeeds(&arguments);
    let saved = Saved::open(&folder.path("mine")).unwrap();
    let (theirs, _) = tensors::read(&folder.path("logits.safetensors")).unwrap();
    let Numbers::I32(tokens) = &theirs["tokens"].numbers else { panic!("tokens are whole numbers") };
    let ours = logits(&saved, tokens, 2, 16);
    let (ours, theirs) = (ours.as_f32().unwrap(), theirs["logits"].as_f32().unwrap());
    assert_eq!(ours.len(), theirs.len());
    let size = theirs.iter().fold(0f32, |m, x| m.max(x.abs()));
    let error = ours.iter().zip(theirs).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / size;
    assert!(error < 1e-4, "{error}");
}
