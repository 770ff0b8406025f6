//! Times a training step: the whole of it, and each launch against what the machine could do.
//!
//! The roofline (Williams, Waterman and Patterson 2009, <https://doi.org/10.1145/1498765.1498785>) of a launch is the
//! longer of two times: its FLOPs at the best matmul rate and its bytes at the best memory rate, both [measured](roofline)
//! on the device that runs the model.

pub mod compare;
pub mod decode;
pub mod launches;
pub mod roofline;
pub mod step;
pub mod table;

/// The highest resident memory of this process so far, in bytes, where the system tells.
pub fn peak_resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? * 1024.0)
}

/// The middle of some numbers; of an even count the mean of the two in the middle. 0 for none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn resident_memory_is_more_than_a_megabyte() {
        if cfg!(target_os = "linux") {
            assert!(peak_resident_bytes().is_some_and(|bytes| bytes > 1e6));
        }
    }
}
