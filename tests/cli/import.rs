//! `dataflow import` without Python: archives are made here, byte by byte.

use std::fs::File;
use std::io::Write;

use dataflow::checkpoint::{Tensor, Tensors, tensors};
use dataflow::saved::Saved;

use super::{Folder, repository};

/// A `torch.save` archive of this pickle and one storage.
fn archive(folder: &Folder, name: &str, pickle: &[u8], storage: &[u8]) {
    let mut zip = zip::ZipWriter::new(File::create(folder.path(name)).unwrap());
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (entry, bytes) in [("archive/data.pkl", pickle), ("archive/data/0", storage)] {
        zip.start_file(entry, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

#[test]
fn a_malicious_pickle_is_refused() {
    let folder = Folder::with_pipeline();
    // what `pickle.dumps` makes of an object whose `__reduce__` returns (os.system, ("touch harmed",))
    let pickle = b"\x80\x02cposix\nsystem\nq\x00X\x0c\x00\x00\x00touch harmedq\x01\x85q\x02Rq\x03.";
    archive(&folder, "evil.pt", pickle, &[]);
    folder.says(
        &["import", "evil.pt", "--model", "tiny.ron", "-o", "mine"],
        "error: evil.pt is refused: its pickle asks for `posix.system`, which no tensor needs; loading such a file in \
         Python would run code of its author (nothing was run here)\n",
    );
    assert!(!folder.path("harmed").exists() && !folder.path("mine").exists());
    // hidden among tensors it is refused too
    let pickle = b"\x80\x02}X\x01\x00\x00\x00wcbuiltins\nexec\nX\x01\x00\x00\x00x\x85Rs.";
    archive(&folder, "hidden.pt", pickle, &[]);
    assert!(folder.fails(&["import", "hidden.pt", "--model", "tiny.ron", "-o", "mine"]).contains("`builtins.exec`"));
}

#[test]
fn storages_that_lie_are_errors() {
    let folder = Folder::with_pipeline();
    let tensor = |elements: u8| {
        let mut pickle =
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage".to_vec();
        pickle.extend(b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K");
        pickle.extend([elements]);
        pickle.extend(b"\x85K\x01\x85\x89Ntr");
        pickle.extend(b"\x01\x00\x00\x00Rs.");
        pickle
    };
    archive(&folder, "short.pt", &tensor(200), &[0; 12]);
    let message = folder.fails(&["import", "short.pt", "--model", "tiny.ron", "-o", "mine"]);
    assert_eq!(message, "error: short.pt: tensor `w`: it needs 800 bytes of `archive/data/0`, which has 12\n");
    archive(&folder, "fine.pt", &tensor(3), &[0; 12]);
    let message = folder.fails(&["import", "fine.pt", "--model", "tiny.ron", "-o", "mine"]);
    assert!(message.contains("extra: w [3]"), "{message}");
    folder.write("old.pt", b"\x80\x02\x8a\x0al\xfc");
    assert!(folder.fails(&["import", "old.pt", "--model", "tiny.ron", "-o", "x"]).contains("PyTorch before 1.6"));
    folder.write("odd.pt", b"nothing of the kind");
    let message = folder.fails(&["import", "odd.pt", "--model", "tiny.ron", "-o", "x"]);
    assert!(message.contains("neither a PyTorch archive nor a safetensors file"), "{message}");
}

#[test]
fn safetensors_are_imported_and_misfits_are_listed() {
    let folder = Folder::with_pipeline();
    let tensor = |shape: &[usize]| Tensor::f32(shape.to_vec(), (0..shape.iter().product()).map(|i| i as f32).collect());
    let mut all: Tensors = [("embedding.weight", vec![16, 8]), ("layers.0.inner.weight", vec![8, 8])]
        .into_iter()
        .map(|(name, shape)| (name.to_string(), tensor(&shape)))
        .collect();
    all.insert("head.weight".into(), all["embedding.weight"].clone());
    all.insert("other.bias".into(), tensor(&[3]));
    all.insert("layers.1.inner.weight".into(), tensor(&[8, 4]));
    let write = |all: &Tensors| drop(tensors::write(&folder.path("a.safetensors"), all, &Default::default()).unwrap());
    write(&all);
    let arguments = ["import", "a.safetensors", "--model", "tiny.ron", "-o", "mine"];
    folder.says(
        &arguments,
        "error: the tensors do not fit the model:\n  wrong shape: layers.1.inner.weight is [8, 4], the model wants \
         [8, 8]\n  extra: other.bias [3]\n  help: --set changes the model's sizes; where names differ, --mapping \
         models/mappings/….ron says how\n",
    );
    all.remove("other.bias");
    all.insert("layers.1.inner.weight".into(), tensor(&[8, 8]));
    write(&all);
    // the head is the embedding under a second name
    let out = folder.succeeds(&arguments);
    assert_eq!(out, "256 parameters in 3 tensors\nrun folder: mine\n");
    all.remove("head.weight");
    let saved = Saved::open(&folder.path("mine")).unwrap();
    assert_eq!((saved.parameters, saved.step, saved.pipeline.is_none()), (all, Some(0), true));
    assert!(folder.fails(&arguments).contains("mine already holds a model"));
    assert!(folder.fails(&["run", "mine"]).contains("mine holds no run to resume"));
}

/// Names and shapes of state-spaces/mamba-130m, at other sizes: 2 blocks of 16 channels, 40 tokens.
fn mamba() -> Tensors {
    let (vocabulary, width, inner, rank, state) = (40, 16, 32, 1, 4);
    let mut all = vec![
        ("backbone.embedding.weight".to_string(), vec![vocabulary, width]),
        ("backbone.norm_f.weight".to_string(), vec![width]),
    ];
    for layer in 0..2 {
        let name = |end: &str| format!("backbone.layers.{layer}.{end}");
        all.extend([
            (name("norm.weight"), vec![width]),
            (name("mixer.in_proj.weight"), vec![2 * inner, width]),
            (name("mixer.conv1d.weight"), vec![inner, 1, 4]),
            (name("mixer.conv1d.bias"), vec![inner]),
            (name("mixer.x_proj.weight"), vec![rank + 2 * state, inner]),
            (name("mixer.dt_proj.weight"), vec![inner, rank]),
            (name("mixer.dt_proj.bias"), vec![inner]),
            (name("mixer.A_log"), vec![inner, state]),
            (name("mixer.D"), vec![inner]),
            (name("mixer.out_proj.weight"), vec![width, inner]),
        ]);
    }
    numbered(all)
}

/// Tensors whose numbers tell them apart.
fn numbered(shapes: Vec<(String, Vec<usize>)>) -> Tensors {
    let tensor = |(n, (name, shape)): (usize, (String, Vec<usize>))| {
        let count = shape.iter().product::<usize>();
        (name, Tensor::f32(shape, (0..count).map(|i| n as f32 + i as f32 / 1024.0).collect()))
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

/// Imports the tensors with a mapping of the repository; returns what the run folder has.
#[track_caller]
fn mapped(all: &Tensors, model: &str, mapping: &str, sizes: &[&str]) -> Tensors {
    let folder = Folder::new();
    tensors::write(&folder.path("a.safetensors"), all, &Default::default()).unwrap();
    let (model, mapping) = (repository(&format!("models/{model}")), repository(&format!("models/mappings/{mapping}")));
    let mut arguments = vec!["import", "a.safetensors", "--model", &model, "--mapping", &mapping, "-o", "mine"];
    sizes.iter().for_each(|s| arguments.extend(["--set", s]));
    folder.succeeds(&arguments);
    Saved::open(&folder.path("mine")).unwrap().parameters
}

#[test]
fn mamba_under_its_published_names() {
    let mut all = mamba();
    all.insert("lm_head.weight".into(), all["backbone.embedding.weight"].clone());
    let sizes = ["vocab=40", "d_model=16", "blocks=2", "d_state=4"];
    let found = mapped(&all, "mamba.ron", "mamba_ssm.ron", &sizes);
    let wanted: Tensors = mamba().into_iter().map(|(name, t)| (format!("transformer.{name}"), t)).collect();
    assert!(found == wanted, "{:?}", found.keys());
    // transformers calls the embedding otherwise
    let embedding = all.remove("backbone.embedding.weight").unwrap();
    all.insert("backbone.embeddings.weight".into(), embedding);
    assert!(mapped(&all, "mamba.ron", "mamba_ssm.ron", &sizes) == wanted);
}

#[test]
fn llama_under_the_names_of_transformers() {
    let (vocabulary, width, hidden) = (40, 16, 24);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![vocabulary, width]),
        ("model.norm.weight".to_string(), vec![width]),
    ];
    for layer in 0..2 {
        let name = |end: &str| format!("model.layers.{layer}.{end}");
        let squares = ["q_proj", "k_proj", "v_proj", "o_proj"];
        shapes.extend(squares.map(|n| (name(&format!("self_attn.{n}.weight")), vec![width, width])));
        shapes.extend([
            (name("self_attn.rotary_emb.inv_freq"), vec![4]),
            (name("mlp.gate_proj.weight"), vec![hidden, width]),
            (name("mlp.up_proj.weight"), vec![hidden, width]),
            (name("mlp.down_proj.weight"), vec![width, hidden]),
            (name("input_layernorm.weight"), vec![width]),
            (name("post_attention_layernorm.weight"), vec![width]),
        ]);
    }
    let mut all = numbered(shapes);
    all.insert("lm_head.weight".into(), all["model.embed_tokens.weight"].clone());
    let sizes = ["vocab=40", "d_model=16", "n_layer=2", "n_head=2", "d_hidden=24"];
    let found = mapped(&all, "llama.ron", "huggingface_llama.ron", &sizes);
    assert_eq!(found.len(), 2 + 2 * 7, "{:?}", found.keys());
    let numbers = |tensors: &Tensors, name: &str| tensors[name].as_f32().unwrap().to_vec();
    for (ours, theirs) in [
        ("transformer.wte.weight", "model.embed_tokens.weight"),
        ("transformer.ln_f.weight", "model.norm.weight"),
        ("transformer.h.1.ln_1.weight", "model.layers.1.input_layernorm.weight"),
        ("transformer.h.1.ln_2.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("transformer.h.1.attn.c_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("transformer.h.1.mlp.fc_1.weight", "model.layers.1.mlp.up_proj.weight"),
        ("transformer.h.1.mlp.fc_2.weight", "model.layers.1.mlp.gate_proj.weight"),
        ("transformer.h.1.mlp.c_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    ] {
        assert!(numbers(&found, ours) == numbers(&all, theirs), "{ours}");
    }
    let stacked = ["q", "k", "v"].map(|n| numbers(&all, &format!("model.layers.1.self_attn.{n}_proj.weight"))).concat();
    assert!(numbers(&found, "transformer.h.1.attn.c_attn.weight") == stacked);
}
