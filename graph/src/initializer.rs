//! Values of parameters before training.

use dataflow_kernels::random::{Stream, normals};
use serde::{Deserialize, Serialize};

use crate::format::formula::{Formula, Number};
use crate::format::number::{Real, Scope, current_scope};

/// How a parameter is filled. Written in a row as `init: Normal(std: 0.02)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Initializer {
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// All equal.
    Constant(Real),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: Real,
    },
    /// Uniform on `[-bound, bound]`.
    Uniform {
        /// Largest magnitude.
        bound: Real,
    },
    /// Uniform on `±gain·sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio, 2010), for a `[out, in]` matrix.
    XavierUniform {
        /// Factor.
        gain: Real,
    },
    /// Values whose softplus is log-uniform on `[min, max]`: the step sizes of a state-space model
    /// (arXiv:2312.00752, section 3.6).
    InverseSoftplus {
        /// Smallest step.
        min: Real,
        /// Largest step.
        max: Real,
    },
    /// An expression of the element's place: `i` is the index in the last dimension, `row` that of the rows
    /// before it; `config` names and `layer` may be used.
    Formula(ElementFormula),
}

/// An expression over `i` and `row`, with the names that were known where it was written.
#[derive(Clone, Debug)]
pub struct ElementFormula {
    formula: Formula,
    scope: Scope,
}

impl ElementFormula {
    /// An expression, with the names that are known here.
    ///
    /// # Errors
    /// A syntax error or an unknown name.
    pub fn new(text: &str) -> Result<Self, String> {
        let scope = current_scope();
        // a trial at the first element finds unknown names while the place in the file is known
        let trial = scope.with("i", Number::Int(0)).with("row", Number::Int(0));
        let formula = Formula::parse(text).map_err(|e| e.to_string())?;
        trial.evaluate(text)?;
        Ok(Self { formula, scope })
    }
}

impl PartialEq for ElementFormula {
    fn eq(&self, other: &Self) -> bool {
        self.formula == other.formula
    }
}

impl Serialize for ElementFormula {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.formula)
    }
}

impl<'de> Deserialize<'de> for ElementFormula {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::new(&text).map_err(serde::de::Error::custom)
    }
}

impl Initializer {
    /// Fills a part of a parameter of this shape, from element `start` on, a multiple of four. The values depend on the seed
    /// and the name alone, not on what other parameters the model has and how it is divided into parts.
    ///
    /// # Errors
    /// A formula without a value at some element.
    pub fn fill(&self, seed: u64, name: &str, shape: &[usize], start: usize, out: &mut [f32]) -> Result<(), String> {
        let random = || Stream::behind(seed, fnv(name), start);
        match self {
            Initializer::Zeros => out.fill(0.0),
            Initializer::Ones => out.fill(1.0),
            Initializer::Constant(x) => out.fill(x.0 as f32),
            Initializer::Normal { std } => normals(seed, fnv(name), start, std.0, out),
            Initializer::Uniform { bound } => uniform(random(), bound.0, out),
            Initializer::XavierUniform { gain } => {
                let (fan_out, fan_in) = match shape {
                    [out, .., input] => (*out, *input),
                    _ => return Err(format!("XavierUniform fills matrices, but this is {shape:?}")),
                };
                uniform(random(), gain.0 * (6.0 / (fan_in + fan_out) as f64).sqrt(), out);
            }
            Initializer::InverseSoftplus { min, max } => {
                let mut random = random();
                for x in out {
                    let step = (random.uniform() as f64 * (max.0 / min.0).ln() + min.0.ln()).exp().max(1e-4);
                    *x = (step + (-(-step).exp_m1()).ln()) as f32;
                }
            }
            Initializer::Formula(element) => {
                let cols = shape.last().copied().unwrap_or(1).max(1);
                for (at, x) in (start..).zip(out) {
                    let value = element.formula.evaluate(&|name| match name {
                        "i" => Some(Number::Int((at % cols) as i64)),
                        "row" => Some(Number::Int((at / cols) as i64)),
                        _ => element.scope.get(name),
                    });
                    *x = value.map_err(|e| format!("its element {at} has no initial value: {e}"))?.real() as f32;
                }
            }
        }
        Ok(())
    }
}

fn uniform(mut random: Stream, bound: f64, out: &mut [f32]) {
    out.iter_mut().for_each(|x| *x = ((random.uniform() as f64 * 2.0 - 1.0) * bound) as f32);
}

/// The 64-bit FNV-1a hash of a name: a stable number for a random stream.
pub fn fnv(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::number::with_scope;

    #[test]
    fn fills_have_the_stated_distribution() {
        let mut x = vec![0.0; 40_000];
        let moments = |x: &[f32]| {
            let mean = x.iter().map(|&v| v as f64).sum::<f64>() / x.len() as f64;
            (mean, (x.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt())
        };
        Initializer::Normal { std: Real(0.02) }.fill(1, "w", &[200, 200], 0, &mut x).unwrap();
        let (mean, std) = moments(&x);
        assert!(mean.abs() < 5e-4 && (std - 0.02).abs() < 5e-4, "{mean} {std}");
        Initializer::XavierUniform { gain: Real(1.0) }.fill(1, "w", &[200, 200], 0, &mut x).unwrap();
        let bound = (6.0f32 / 400.0).sqrt();
        assert!(x.iter().all(|v| v.abs() <= bound) && x.iter().any(|v| v.abs() > 0.99 * bound));
        Initializer::InverseSoftplus { min: Real(0.001), max: Real(0.1) }.fill(1, "b", &[40_000], 0, &mut x).unwrap();
        let steps: Vec<f32> = x.iter().map(|v| v.exp().ln_1p()).collect();
        assert!(steps.iter().all(|s| (0.00099..0.1001).contains(s)));
        let median = {
            let mut s = steps;
            s.sort_by(f32::total_cmp);
            s[20_000]
        };
        assert!((median - 0.01).abs() < 5e-4, "{median}");
    }

    #[test]
    fn parts_are_those_of_the_whole() {
        let all = [
            Initializer::Constant(Real(2.0)),
            Initializer::Normal { std: Real(0.5) },
            Initializer::Uniform { bound: Real(3.0) },
            Initializer::XavierUniform { gain: Real(1.0) },
            Initializer::InverseSoftplus { min: Real(0.001), max: Real(0.1) },
        ];
        for init in all {
            let (mut whole, mut parts) = (vec![0.0; 1001], vec![0.0; 1001]);
            init.fill(5, "w", &[7, 143], 0, &mut whole).unwrap();
            for (i, part) in parts.chunks_mut(24).enumerate() {
                init.fill(5, "w", &[7, 143], 24 * i, part).unwrap();
            }
            assert_eq!(whole, parts, "{init:?}");
        }
    }

    #[test]
    fn a_formula_sees_its_place_and_the_config() {
        let scope = Scope::new([("c".to_string(), Number::Int(4))].into());
        let init: Initializer = with_scope(&scope, || ron::from_str(r#"Formula("1 - i / c + row")"#).unwrap());
        let mut x = vec![0.0; 8];
        init.fill(0, "w", &[2, 4], 0, &mut x).unwrap();
        assert_eq!(x, [1.0, 0.75, 0.5, 0.25, 2.0, 1.75, 1.5, 1.25]);
        init.fill(0, "w", &[2, 4], 4, &mut x[..3]).unwrap();
        assert_eq!(x[..4], [2.0, 1.75, 1.5, 0.25]);
        let error = with_scope(&scope, || ron::from_str::<Initializer>(r#"Formula("1 - d")"#)).unwrap_err();
        assert!(error.to_string().contains("unknown name `d`"), "{error}");
    }
}
