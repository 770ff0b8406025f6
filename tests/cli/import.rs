//! `dataflow import` without Python: archives are made here, byte by byte.

use std::fs::File;
use std::io::Write;

use dataflow::checkpoint::{Tensor, Tensors, tensors};
use dataflow::saved::Saved;

use super::Folder;

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
