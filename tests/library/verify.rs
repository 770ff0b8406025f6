//! Golden files against this program: all of them agree, a wrong number is found and named, and a file that is no
//! golden file is refused in words.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow::verify::{Backend, Comparison, VerifyError, models_in, trajectory, verify_file};
use dataflow_graph::components::Precision;
use dataflow_graph::registry::Registry;
use dataflow_kernels::device::CpuDevice;
use dataflow_ops::BuiltinOps;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn golden(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}

fn backend(threads: usize) -> Backend {
    Backend { device: Arc::new(CpuDevice::new(Some(threads)).unwrap()), precision: Precision::F32 }
}

fn registry() -> Arc<Registry> {
    let mut registry = Registry::new();
    registry.add_plugin(&BuiltinOps);
    Arc::new(registry)
}

fn verify(path: &Path) -> Result<Vec<Comparison>, VerifyError> {
    verify_file(path, &registry(), &models_in(&root().join("models")), &backend(2))
}

/// The safetensors files of a folder, sorted.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(golden(folder)).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files
}

/// Everything within `limit`, which is what single precision gives; the tolerances are wider.
fn assert_near(comparisons: &[Comparison], limit: f64) {
    for c in comparisons {
        assert!(c.ok && c.relative_error <= limit, "{}: {} is off by {:e}", c.file, c.tensor, c.relative_error);
    }
}

#[test]
fn every_golden_op_agrees() {
    let files = files("ops");
    assert_eq!(files.len(), 26);
    for file in files {
        let comparisons = verify(&file).unwrap_or_else(|e| panic!("{e}"));
        assert!(comparisons.len() >= 4, "{}: only {}", file.display(), comparisons.len());
        assert_near(&comparisons, 1e-5);
        // every case has a result, and a gradient for every input of real numbers
        let bytes = fs::read(&file).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        for name in header.offset_keys().iter().filter(|n| n.contains("/out/") || n.contains("/grad/")) {
            assert!(comparisons.iter().any(|c| c.tensor == *name), "{}: {name} was not compared", file.display());
        }
    }
}

#[test]
fn every_golden_model_agrees() {
    let files = files("models");
    assert_eq!(files.len(), 7);
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let comparisons = verify(&file).unwrap_or_else(|e| panic!("{e}"));
        assert_near(&comparisons, 1e-4);
        // everything that is no input was compared
        for name in header.offset_keys() {
            let input = ["param/", "train/idx", "train/targets", "decode/idx"].iter().any(|p| name.starts_with(p));
            if !input && name != "idx" && name != "targets" {
                assert!(comparisons.iter().any(|c| c.tensor == name), "{}: {name}", file.display());
            }
        }
    }
}

/// A copy of a golden file in which one tensor is multiplied by `factor`.
fn with_scaled(file: &Path, tensor: &str, factor: f32, to: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let (header_len, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let (start, end) = header.info(tensor).unwrap().data_offsets;
    for number in bytes[8 + header_len..][start..end].chunks_exact_mut(4) {
        let scaled = f32::from_le_bytes((&*number).try_into().unwrap()) * factor;
        number.copy_from_slice(&scaled.to_le_bytes());
    }
    fs::write(to, bytes).unwrap();
}

#[test]
fn a_wrong_tensor_is_found_and_named() {
    let folder = tempfile::tempdir().unwrap();
    for (file, tensor) in [
        ("ops/selective_scan.safetensors", "case1/grad/delta_bias"),
        ("ops/rope.safetensors", "case1/out/y"),
        ("ops/adamw.safetensors", "case0/out/v1"),
        ("ops/clip_grad_norm.safetensors", "case2/out/norm"),
        ("models/llama.safetensors", "grad/transformer.h.1.ln_2.weight"),
        ("models/llama.safetensors", "train/param_l2_after"),
    ] {
        let path = folder.path().join("copy.safetensors");
        with_scaled(&golden(file), tensor, 1.0003, &path);
        let comparisons = verify(&path).unwrap();
        let wrong: Vec<&str> = comparisons.iter().filter(|c| !c.ok).map(|c| c.tensor.as_str()).collect();
        assert_eq!(wrong, [tensor], "{file}");
        let error = comparisons.iter().find(|c| !c.ok).unwrap().relative_error;
        assert!((error - 3e-4).abs() < 2e-5, "{file}: {error:e}");
        assert!(dataflow::verify::summary(&comparisons).contains("1 of"));
    }
    // a wrong input shows in what is computed from it
    let path = folder.path().join("copy.safetensors");
    with_scaled(&golden("models/llama.safetensors"), "param/transformer.wte.weight", 1.1, &path);
    let comparisons = verify(&path).unwrap();
    assert!(comparisons.iter().any(|c| c.tensor == "logits" && !c.ok));
    // a number that is none
    with_scaled(&golden("ops/silu.safetensors"), "case0/in/x", f32::NAN, &path);
    let comparisons = verify(&path).unwrap();
    assert!(comparisons.iter().any(|c| c.tensor == "case0/out/y" && !c.ok && c.relative_error.is_infinite()));
}

/// A safetensors file of this metadata and these tensors (shape, bytes, dtype).
fn write(path: &Path, metadata: &[(&str, &str)], tensors: &[(&str, &[usize], safetensors::Dtype, Vec<u8>)]) {
    let metadata: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let tensors = tensors.iter().map(|(name, shape, dtype, bytes)| {
        (*name, safetensors::tensor::TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    let metadata = (!metadata.is_empty()).then_some(metadata);
    fs::write(path, safetensors::serialize(tensors, metadata).unwrap()).unwrap();
}

fn floats(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32 * 0.1).to_le_bytes()).collect()
}

#[test]
fn what_is_no_golden_file_is_refused_in_words() {
    use safetensors::Dtype::{F32, F64, I64};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.safetensors");
    let expect = |expected: &[&str]| {
        let message = verify(&path).unwrap_err().to_string();
        assert!(message.contains("file.safetensors: "), "{message}");
        for part in expected {
            assert!(message.contains(part), "expected `{part}` in: {message}");
        }
    };
    expect(&["cannot read", "file.safetensors"]);
    fs::write(&path, b"").unwrap();
    expect(&["no safetensors file, or its end is missing"]);
    fs::write(&path, b"this is a text, not a safetensors file").unwrap();
    expect(&["no safetensors file"]);
    let whole = fs::read(golden("ops/silu.safetensors")).unwrap();
    for len in [7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        expect(&["its end is missing", "copy or download it again"]);
    }

    let silu = r#"[{"name": "case0", "attrs": {}, "tensors": []}]"#;
    let x = ("case0/in/x", &[2, 3][..], F32, floats(6));
    write(&path, &[], std::slice::from_ref(&x));
    expect(&["no metadata"]);
    write(&path, &[("format", "pt")], std::slice::from_ref(&x));
    expect(&["neither an `op` nor a `model`", "README"]);
    write(&path, &[("op", "silu"), ("model", "llama")], std::slice::from_ref(&x));
    expect(&["both an `op` and a `model`"]);
    write(&path, &[("op", "silo"), ("cases", silu)], std::slice::from_ref(&x));
    expect(&["no golden op `silo`", "adamw", "silu", "wkv_x051a"]);
    write(&path, &[("op", "silu")], std::slice::from_ref(&x));
    expect(&["no `cases`"]);
    write(&path, &[("op", "silu"), ("cases", "[")], std::slice::from_ref(&x));
    expect(&["`cases`", "EOF"]);
    write(&path, &[("op", "silu"), ("cases", "[]")], std::slice::from_ref(&x));
    expect(&["no cases"]);
    write(&path, &[("op", "silu"), ("cases", silu)], std::slice::from_ref(&x));
    expect(&["no tensor `case0/out/y`"]);
    write(&path, &[("op", "silu"), ("cases", silu)], &[("case0/in/x", &[1], F64, vec![0; 8])]);
    expect(&["F64", "F32 or I64"]);
    write(&path, &[("op", "silu"), ("cases", silu)], &[("case0/in/x", &[0], F32, vec![])]);
    expect(&["`case0/in/x`", "empty"]);
    let huge = (1i64 << 40).to_le_bytes().to_vec();
    write(&path, &[("op", "silu"), ("cases", silu)], &[("case0/in/x", &[1], I64, huge)]);
    expect(&["no token can have"]);

    // shapes that do not fit: of the result, of an input that the op has no use for, of a token
    let y = |n: usize| [("case0/out/y", floats(n)), ("case0/cot/y", floats(n))];
    let [out, cot] = y(4);
    let tensors = [x.clone(), (out.0, &[2, 2], F32, out.1), (cot.0, &[2, 2], F32, cot.1)];
    write(&path, &[("op", "silu"), ("cases", silu)], &tensors);
    expect(&["golden op silu, case0", "the result is f32[2, 3], but the golden one f32[2, 2]"]);
    let [out, cot] = y(6);
    let mut tensors = vec![x.clone(), (out.0, &[2, 3], F32, out.1), (cot.0, &[2, 3], F32, cot.1)];
    write(&path, &[("op", "silu"), ("cases", silu)], &tensors);
    expect(&["no tensor `case0/grad/x`"]);
    tensors.push(("case0/in/slope", &[3], F32, floats(3)));
    write(&path, &[("op", "silu"), ("cases", silu)], &tensors);
    expect(&["`slope` [3] is only in the file"]);

    let cases = r#"[{"name": "case0", "attrs": {"V": 1099511627776, "C": 4}, "tensors": []}]"#;
    write(&path, &[("op", "embedding"), ("cases", cases)], std::slice::from_ref(&x));
    expect(&["attribute `V`", "1099511627776"]);
    let cases = r#"[{"name": "case0", "attrs": {"V": 3, "C": 2}, "tensors": []}]"#;
    let ids = [0i64, 1, 3].iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<u8>>();
    let table = [("case0/in/weight", &[3, 2][..], F32, floats(6)), ("case0/in/idx", &[1, 3], I64, ids)];
    let rest = ["case0/out/y", "case0/cot/y"].map(|name| (name, &[1, 3, 2][..], F32, floats(6)));
    write(&path, &[("op", "embedding"), ("cases", cases)], &[table, rest].concat());
    expect(&["`op`", "3"]);

    write(&path, &[("model", "../llama")], std::slice::from_ref(&x));
    expect(&["`../llama` is no name of a model"]);
    write(&path, &[("model", "no_such_model")], std::slice::from_ref(&x));
    expect(&["cannot read", "no_such_model.ron"]);
    write(&path, &[("model", "llama")], std::slice::from_ref(&x));
    expect(&["no `config`"]);
    let config = |layers: i64| {
        format!(r#"{{"vocab_size": 5, "n_layer": {layers}, "n_head": 1, "n_embd": 4, "block_size": 8, "bias": true}}"#)
    };
    write(&path, &[("model", "llama"), ("config", &config(0))], std::slice::from_ref(&x));
    expect(&["`n_layer`", "0 is not between 1 and"]);
    write(&path, &[("model", "llama"), ("config", &config(1 << 40))], std::slice::from_ref(&x));
    expect(&["`n_layer`", "is not between 1 and"]);
    write(&path, &[("model", "longhorn"), ("config", &config(1))], std::slice::from_ref(&x));
    expect(&["no config name `bias`"]);
    write(&path, &[("model", "llama"), ("config", &config(1))], std::slice::from_ref(&x));
    expect(&["no tensor `idx`"]);
}

/// A copy of a golden file with a part of its header replaced by another text of the same length.
fn with_header(file: &Path, from: &str, to: &str, path: &Path) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn parameters_that_differ_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy.safetensors");
    let llama = golden("models/llama.safetensors");
    let expect = |expected: &[&str]| {
        let message = verify(&path).unwrap_err().to_string();
        for part in expected {
            assert!(message.contains(part), "expected `{part}` in: {message}");
        }
    };
    with_header(&llama, "\"param/transformer.ln_f.weight\"", "\"param/transformer.ln_g.weight\"", &path);
    expect(&[
        "llama.ron` differ:",
        "`transformer.ln_f.weight` [32] is not in the file",
        "`transformer.ln_g.weight` [32] is only in the file",
    ]);
    with_header(&llama, r#"\"n_embd\": 32"#, r#"\"n_embd\": 64"#, &path);
    expect(&["`transformer.wte.weight` is [65, 64], but [65, 32] in the file"]);
    with_header(&llama, "\"grad/transformer.ln_f.weight\"", "\"grad/transformer.ln_g.weight\"", &path);
    expect(&["no tensor `grad/transformer.ln_f.weight`"]);
    let adamw = golden("ops/adamw.safetensors");
    with_header(&adamw, "\"case1/in/p2\"", "\"case1/in/q2\"", &path);
    expect(&["`case1/out/m2` is the result of nothing"]);
    with_header(&llama, r#""n_params":"59584""#, r#""n_params":"59585""#, &path);
    expect(&["59584 trained numbers, but 59585 in the file"]);
    with_header(&llama, r#"[\"transformer.wte.weight\""#, r#"[\"transformer.ate.weight\""#, &path);
    expect(&["`transformer.wte.weight` decays, but not in the file"]);
}

#[test]
fn training_gives_the_same_bits_on_one_and_two_threads() {
    for path in files("models") {
        let model = path.display();
        let run = |threads| {
            trajectory(&path, &registry(), &models_in(&root().join("models")), &backend(threads))
                .unwrap_or_else(|e| panic!("{e}"))
        };
        let (one, two) = (run(1), run(2));
        assert_eq!((one.loss.len(), one.lr.len(), one.grad_norm.len()), (10, 10, 10));
        assert!(one.loss[9] < one.loss[0], "{model}: {:?}", one.loss);
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&one.loss), bits(&two.loss), "{model}");
        assert_eq!(bits(&one.grad_norm), bits(&two.grad_norm), "{model}");
        assert_eq!(one.parameters.len(), two.parameters.len());
        for (name, values) in &one.parameters {
            assert_eq!(bits(values), bits(&two.parameters[name]), "{model}: {name}");
        }
    }
}
