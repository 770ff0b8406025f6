//! From logits to a token.

use dataflow_kernels::random::Stream;

/// How a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; 0 takes the most likely token.
    pub temperature: f32,
    /// Choose among so many of the most likely tokens.
    pub top_k: Option<usize>,
    /// Choose among the fewest most likely tokens whose probabilities together reach this.
    pub top_p: f32,
}

impl Sampling {
    /// The most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: 1.0 };

    /// Says what is out of range.
    ///
    /// # Errors
    /// In words for the user.
    pub fn check(&self) -> Result<(), String> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(format!("temperature {} must be 0 or more", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!("top_p {} must be above 0, and 1 at most", self.top_p));
        }
        if self.top_k == Some(0) {
            return Err("top_k must be at least 1".into());
        }
        Ok(())
    }
}

/// Chooses the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: Stream,
    /// Tokens by decreasing logit, as far as they were wanted.
    order: Vec<u32>,
    weights: Vec<f32>,
}

impl Sampler {
    /// For the sequence number `sequence` of `seed`: sequences of one seed are independent of each other.
    pub fn new(sampling: Sampling, seed: u64, sequence: u64) -> Self {
        Self { sampling, random: Stream::new(seed, sequence), order: Vec::new(), weights: Vec::new() }
    }

    /// Chooses a token among the first `vocabulary` logits.
    ///
    /// # Errors
    /// Logits that are no numbers.
    pub fn choose(&mut self, logits: &[f32], vocabulary: usize) -> Result<u32, String> {
        let logits = &logits[..vocabulary.min(logits.len())];
        if logits.is_empty() || logits.iter().any(|x| x.is_nan()) {
            return Err("the model's logits are no numbers: its weights are damaged, or training diverged".into());
        }
        let Sampling { temperature, top_k, top_p } = self.sampling;
        if temperature == 0.0 {
            return Ok(best(logits));
        }
        self.order.clear();
        self.order.extend(0..logits.len() as u32);
        // equal logits in the order of their tokens, so that the choice does not depend on how they were sorted
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if let Some(k) = top_k.filter(|k| *k < logits.len()) {
            self.order.select_nth_unstable_by(k - 1, by_logit);
            self.order.truncate(k);
        }
        let largest = logits[best(logits) as usize];
        let weight = |token: &u32| ((logits[*token as usize] - largest) / temperature).exp();
        if top_p < 1.0 {
            self.order.sort_unstable_by(by_logit);
            let all: f32 = self.order.iter().map(weight).sum();
            let mut reached = 0.0;
            let enough = self.order.iter().position(|token| {
                reached += weight(token) / all;
                reached >= top_p
            });
            self.order.truncate(enough.map_or(self.order.len(), |last| last + 1));
        } else if top_k.is_some() {
            self.order.sort_unstable();
        }
        self.weights.clear();
        self.weights.extend(self.order.iter().map(weight));
        let all: f64 = self.weights.iter().map(|w| f64::from(*w)).sum();
        let mut left = f64::from(self.random.uniform()) * all;
        for (token, weight) in self.order.iter().zip(&self.weights) {
            left -= f64::from(*weight);
            if left < 0.0 {
                return Ok(*token);
            }
        }
        // rounding may leave a little at the end
        Ok(self.order.iter().zip(&self.weights).rev().find(|(_, w)| **w > 0.0).map_or(best(logits), |(t, _)| *t))
    }
}

/// The first of the largest.
pub fn best(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// The logarithm of the sum of all `exp(logit)`: what turns a logit into a log-probability.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let sum: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
    f64::from(largest) + sum.ln()
}

/// The `count` most likely tokens with their log-probabilities, the most likely first.
pub fn most_likely(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let count = count.min(order.len());
    if count == 0 {
        return Vec::new();
    }
    order.select_nth_unstable_by(count - 1, by_logit);
    order.truncate(count);
    order.sort_unstable_by(by_logit);
    let all = log_sum_exp(logits);
    order.into_iter().map(|token| (token, (f64::from(logits[token as usize]) - all) as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.0, 2.0, -1.0, 1.0, 0.5, 9.0];

    /// How often each of the first five tokens is chosen.
    fn frequencies(sampling: Sampling) -> [f64; 5] {
        let mut sampler = Sampler::new(sampling, 1, 0);
        let mut count = [0.0; 5];
        for _ in 0..20_000 {
            count[sampler.choose(&LOGITS, 5).unwrap() as usize] += 1.0 / 20_000.0;
        }
        count
    }

    #[test]
    fn tokens_come_as_often_as_they_should() {
        for (temperature, top_k, top_p, kept) in [
            (1.0, None, 1.0, vec![0, 1, 2, 3, 4]),
            (0.5, None, 1.0, vec![0, 1, 2, 3, 4]),
            (1.0, Some(2), 1.0, vec![1, 3]),
            (1.0, Some(9), 1.0, vec![0, 1, 2, 3, 4]),
            // probabilities: 0.08, 0.56, 0.03, 0.21, 0.12
            (1.0, None, 0.7, vec![1, 3]),
            (1.0, None, 0.5, vec![1]),
            (1.0, Some(3), 0.99, vec![1, 3, 4]),
        ] {
            let found = frequencies(Sampling { temperature, top_k, top_p });
            let weight = |i: usize| if kept.contains(&i) { f64::from(LOGITS[i] / temperature).exp() } else { 0.0 };
            let all: f64 = (0..5).map(weight).sum();
            for (i, found) in found.iter().enumerate() {
                assert!((found - weight(i) / all).abs() < 0.01, "{temperature} {top_k:?} {top_p}: {found} of {i}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_best_and_nonsense_is_an_error() {
        let mut sampler = Sampler::new(Sampling::GREEDY, 0, 0);
        assert_eq!(sampler.choose(&[1.0, 3.0, 3.0], 3), Ok(1));
        assert!(sampler.choose(&[1.0, f32::NAN], 2).is_err());
        assert!(Sampling { temperature: f32::NAN, ..Sampling::GREEDY }.check().is_err());
        assert!(Sampling { top_p: 0.0, ..Sampling::GREEDY }.check().is_err());
        assert!(Sampling { top_k: Some(0), ..Sampling::GREEDY }.check().is_err());
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let all = most_likely(&LOGITS, 10);
        assert_eq!(all.iter().map(|x| x.0).collect::<Vec<_>>(), [5, 1, 3, 4, 0, 2]);
        assert!((all.iter().map(|x| f64::from(x.1).exp()).sum::<f64>() - 1.0).abs() < 1e-6);
        assert_eq!(most_likely(&LOGITS, 2)[..], all[..2]);
    }
}
