//! Reads `tests/golden/ops/<op>.safetensors` (see the README there) for kernel tests.
#![allow(dead_code)]

use std::collections::HashMap;

/// A tensor of a golden file; integers are converted to `f32`.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// One case: `tensors["in/x"]`, `tensors["out/y"]`, `tensors["cot/y"]`, `tensors["grad/x"]`.
pub struct Case {
    pub name: String,
    pub attrs: serde_json::Value,
    pub tensors: HashMap<String, Tensor>,
}

impl Case {
    pub fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{} has no tensor {name}", self.name))
    }
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
    pub fn data(&self, name: &str) -> &[f32] {
        &self.get(name).data
    }
    pub fn size(&self, attr: &str) -> usize {
        self.attrs[attr].as_u64().unwrap_or_else(|| panic!("{} has no attribute {attr}", self.name)) as usize
    }
}

impl Tensor {
    /// The tensor with its axes in another order, row-major: `permute(&[0, 2, 1])` turns `(B, D, T)` into
    /// `(B, T, D)`, `permute(&[0, 2, 1, 3])` turns `(B, H, T, D)` into `(B, T, H, D)` and back.
    pub fn permute(&self, axes: &[usize]) -> Tensor {
        let shape: Vec<usize> = axes.iter().map(|&a| self.shape[a]).collect();
        let mut strides = vec![1; self.shape.len()];
        for a in (0..self.shape.len().saturating_sub(1)).rev() {
            strides[a] = strides[a + 1] * self.shape[a + 1];
        }
        let data = (0..self.data.len())
            .map(|mut i| {
                let mut from = 0;
                for (&n, &axis) in shape.iter().zip(axes).rev() {
                    from += i % n * strides[axis];
                    i /= n;
                }
                self.data[from]
            })
            .collect();
        Tensor { shape, data }
    }
}

/// All cases of an op.
pub fn cases(op: &str) -> Vec<Case> {
    let path = format!("{}/../tests/golden/ops/{op}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let text = &metadata.metadata().as_ref().unwrap()["cases"];
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let list: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
    list.iter()
        .map(|case| {
            let name = case["name"].as_str().unwrap().to_string();
            let tensors = case["tensors"].as_array().unwrap().iter().map(|t| {
                let key = t.as_str().unwrap();
                let view = file.tensor(&format!("{name}/{key}")).unwrap();
                let data = match view.dtype() {
                    safetensors::Dtype::F32 => {
                        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                    }
                    safetensors::Dtype::I64 => {
                        view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
                    }
                    other => panic!("{key}: unexpected dtype {other:?}"),
                };
                (key.to_string(), Tensor { shape: view.shape().to_vec(), data })
            });
            Case { attrs: case["attrs"].clone(), tensors: tensors.collect(), name: name.clone() }
        })
        .collect()
}

/// Largest difference over largest magnitude of `want`.
pub fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(1e-30);
    got.iter().zip(want).fold(0.0f32, |m, (a, b)| if a.is_finite() { m.max((a - b).abs()) } else { f32::INFINITY })
        / scale
}

/// Fails above `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    let error = relative_error(got, want);
    assert!(error <= tolerance, "{what}: relative error {error:e} above {tolerance:e}");
}
