//! What makers promise: the rates of dense matrix products in the data sheets.
//!
//! Sheets of newer devices print rates with 2:4 sparsity, which are twice these.

use crate::device::DType;

/// The rates of a family of devices, in 10^12 floating-point operations a second.
struct Sheet {
    /// Words that the driver's name of the device has, among others.
    name: &'static [&'static str],
    /// Tensor cores, factors in `bf16`, sums in `f32`.
    bf16: f64,
    /// Tensor cores, factors rounded to TF32.
    tf32: f64,
    /// No tensor cores.
    f32: f64,
}

/// The first that fits counts. Ampere, Hopper and Ada data sheets of NVIDIA.
const SHEETS: [Sheet; 12] = [
    Sheet { name: &["H100", "PCIe"], bf16: 756.0, tf32: 378.0, f32: 51.0 },
    Sheet { name: &["H100", "NVL"], bf16: 835.0, tf32: 417.5, f32: 60.0 },
    Sheet { name: &["H200", "NVL"], bf16: 835.5, tf32: 417.5, f32: 60.0 },
    Sheet { name: &["H100"], bf16: 989.4, tf32: 494.7, f32: 66.9 },
    Sheet { name: &["H200"], bf16: 989.4, tf32: 494.7, f32: 66.9 },
    Sheet { name: &["GH200"], bf16: 989.4, tf32: 494.7, f32: 66.9 },
    Sheet { name: &["A100"], bf16: 312.0, tf32: 156.0, f32: 19.5 },
    Sheet { name: &["A10"], bf16: 125.0, tf32: 62.5, f32: 31.2 },
    Sheet { name: &["L40S"], bf16: 362.0, tf32: 183.0, f32: 91.6 },
    Sheet { name: &["L4"], bf16: 121.0, tf32: 60.0, f32: 30.3 },
    Sheet { name: &["RTX", "4090"], bf16: 165.2, tf32: 82.6, f32: 82.6 },
    Sheet { name: &["RTX", "3090"], bf16: 71.0, tf32: 35.6, f32: 35.6 },
];

/// Operations a second of a device with this name, where its sheet is known. A slice of a device (MIG) has none.
pub(super) fn flops(name: &str, factors: DType, tf32: bool) -> Option<f64> {
    let words: Vec<&str> = name.split([' ', '-']).collect();
    if words.contains(&"MIG") || words.contains(&"Laptop") {
        return None;
    }
    let sheet = SHEETS.iter().find(|sheet| sheet.name.iter().all(|word| words.contains(word)))?;
    let rate = match factors {
        DType::Bf16 => sheet.bf16,
        DType::F32 if tf32 => sheet.tf32,
        DType::F32 => sheet.f32,
        DType::I32 => return None,
    };
    Some(1e12 * rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_driver_find_their_sheet() {
        let tera = |rate: Option<f64>| rate.map(|rate| (rate / 1e11).round() / 10.0);
        let bf16 = |name| tera(flops(name, DType::Bf16, false));
        assert_eq!(bf16("NVIDIA H100 80GB HBM3"), Some(989.4));
        assert_eq!(bf16("NVIDIA H100 PCIe"), Some(756.0));
        assert_eq!(bf16("NVIDIA H200"), Some(989.4));
        assert_eq!(bf16("NVIDIA A100-SXM4-40GB"), Some(312.0));
        assert_eq!(bf16("NVIDIA A100 80GB PCIe"), Some(312.0));
        assert_eq!(bf16("NVIDIA GeForce RTX 4090"), Some(165.2));
        // no sheet, or a part of a device
        for name in ["NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", ""] {
            assert_eq!(bf16(name), None, "{name}");
        }
        let h100 = |tf32| tera(flops("NVIDIA H100 80GB HBM3", DType::F32, tf32));
        assert_eq!((h100(false), h100(true)), (Some(66.9), Some(494.7)));
    }
}
