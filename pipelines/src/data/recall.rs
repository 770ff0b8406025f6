//! Multi-query associative recall (MQAR): the task of Zoology, arXiv:2312.04927, made on the fly.
//!
//! A row first shows key-value pairs and then queries the keys, at gaps that follow a power law as repeated
//! bigrams do in text. With two pairs, and `0` for a filler:
//! ```text
//! input   2  8  4  7  0  0  4  0  0  0  0  0  2  0  0  0
//! target  -  -  -  -  -  -  7  -  -  -  -  -  8  -  -  -
//! ```
//! The target lies at the position of the queried key, as in Zoology, since a model answers there: it is
//! what the next token should be. It is *not* in the input. Every other target is -1, so loss and accuracy
//! are those of the answers.
//!
//! Token 0 is the filler, keys are `1 .. vocabulary / 2`, values `vocabulary / 2 .. vocabulary`; both are
//! drawn without replacement. Queries stand at even distances after the pairs, so each is followed by at
//! least one filler. Random fillers are drawn from the whole vocabulary except the keys of their row:
//! Zoology draws from all of it, where a filler may happen to be a key and look like a query without an
//! answer, which would put a ceiling of chance on what a model can be sure of. A filler may be a value or
//! a key of no pair.

use dataflow_kernels::random::Stream;
use serde::{Deserialize, Serialize};

use super::batch::{Batch, BatchError, BatchSource, Draw, IGNORED, Purpose, check_shape};
use super::streams::row_stream;

/// `Recall(batch: 64, block: 64, vocabulary: 64, pairs: 4)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recall {
    /// How many sequences are in a batch (B).
    pub batch: usize,
    /// How many tokens are in a sequence (T).
    pub block: usize,
    /// How many different tokens there are.
    pub vocabulary: usize,
    /// How many key-value pairs a sequence starts with.
    pub pairs: usize,
    /// How often each key is queried.
    pub queries: usize,
    /// The exponent of the gaps: the n-th place has weight `n^(power_a - 1)`, so 1 is uniform.
    pub power_a: f64,
    /// What stands where no key is queried.
    pub fillers: Fillers,
    /// Training steps over which the share of random fillers grows from 0 to all; the others are 0. A recurrent model
    /// finds the rule among few distractions and then learns to ignore them. Evaluation always has all of them.
    pub curriculum: u64,
}

impl Default for Recall {
    fn default() -> Recall {
        Recall {
            batch: 64,
            block: 64,
            vocabulary: 64,
            pairs: 4,
            queries: 1,
            power_a: 0.01,
            fillers: Fillers::Random,
            curriculum: 0,
        }
    }
}

/// The tokens where no key is queried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fillers {
    /// Any token but the keys of the sequence.
    Random,
    /// Token 0.
    Zero,
}

/// Why there is no such task.
#[derive(Debug, thiserror::Error)]
pub enum RecallError {
    /// Nothing to recall.
    #[error("{attribute}: 0 leaves nothing to recall; it must be at least 1")]
    Nothing {
        /// The attribute.
        attribute: &'static str,
    },
    /// The pairs do not fit the vocabulary.
    #[error(
        "pairs: {pairs} needs as many different keys, but vocabulary: {vocabulary} has {keys} \
         (tokens 1 to vocabulary / 2 - 1); use at most {keys} pairs or a vocabulary of at least {}",
        pairs.saturating_add(1).saturating_mul(2)
    )]
    TooManyPairs {
        /// The pairs.
        pairs: usize,
        /// The vocabulary.
        vocabulary: usize,
        /// How many keys it has.
        keys: usize,
    },
    /// The sequence is too short.
    #[error(
        "block: {block} is too short for pairs: {pairs} and queries: {queries}, which need {needed} tokens \
         (2 for each pair and 2 for each query)"
    )]
    TooShort {
        /// The length of the sequence.
        block: usize,
        /// The pairs.
        pairs: usize,
        /// The queries of each key.
        queries: usize,
        /// The length that is needed.
        needed: usize,
    },
    /// No weights follow from the exponent.
    #[error("power_a: {0} gives no distribution of gaps; it must be a number from -10 to 10 (0.01 in Zoology)")]
    Power(f64),
    /// More tokens than can be numbered.
    #[error("vocabulary: {0} is too large; the largest is 16777216")]
    Vocabulary(usize),
}

impl Recall {
    /// The source of batches.
    pub fn source(&self, seed: u64) -> Result<RecallBatches, BatchError> {
        check_shape(self.batch, self.block)?;
        self.check()?;
        let (first_value, end) = (self.first_value() as i32, self.vocabulary as i32);
        let places = (self.block - 2 * self.pairs) / 2;
        let weights = (1..=places).map(|n| (n as f64).powf(self.power_a - 1.0)).collect();
        Ok(RecallBatches {
            task: self.clone(),
            seed,
            keys: Urn::new(1..first_value),
            values: Urn::new(first_value..end),
            weights,
            race: Vec::with_capacity(places),
            is_key: vec![false; self.vocabulary],
        })
    }

    fn check(&self) -> Result<(), RecallError> {
        let &Recall { block, vocabulary, pairs, queries, power_a, .. } = self;
        for (attribute, number) in [("pairs", pairs), ("queries", queries)] {
            if number == 0 {
                return Err(RecallError::Nothing { attribute });
            }
        }
        if vocabulary > 1 << 24 {
            return Err(RecallError::Vocabulary(vocabulary));
        }
        let keys = self.first_value().saturating_sub(1);
        if pairs > keys {
            return Err(RecallError::TooManyPairs { pairs, vocabulary, keys });
        }
        let needed = pairs.saturating_mul(queries.saturating_add(1)).saturating_mul(2);
        if needed > block {
            return Err(RecallError::TooShort { block, pairs, queries, needed });
        }
        // Also false for NaN.
        if !(-10.0..=10.0).contains(&power_a) {
            return Err(RecallError::Power(power_a));
        }
        Ok(())
    }

    fn first_value(&self) -> usize {
        self.vocabulary / 2
    }
}

/// Sequences of the task. Training and evaluation draw from different streams, so evaluation is on
/// sequences that were never trained on, whichever split is asked for.
#[derive(Clone, Debug)]
pub struct RecallBatches {
    task: Recall,
    seed: u64,
    keys: Urn,
    values: Urn,
    /// How likely each place is, relative to the others.
    weights: Vec<f64>,
    /// The order in which places are taken.
    race: Vec<(f64, usize)>,
    /// Which tokens are keys of the current row.
    is_key: Vec<bool>,
}

impl RecallBatches {
    fn fill_row(&mut self, mut random: Stream, share: f32, inputs: &mut [i32], targets: &mut [i32]) {
        let Recall { pairs, queries, fillers, .. } = self.task;
        targets.fill(IGNORED);
        // -1 marks what is left for the fillers.
        inputs.fill(-1);
        let (shown, asked) = inputs.split_at_mut(2 * pairs);
        self.keys.draw(&mut random, shown.iter_mut().step_by(2));
        self.values.draw(&mut random, shown[1..].iter_mut().step_by(2));

        let answers = &mut targets[2 * pairs..];
        take_places(&self.weights, pairs * queries, &mut random, &mut self.race);
        for (query, &(_, place)) in self.race.iter().enumerate() {
            let pair = &shown[2 * (query % pairs)..][..2];
            asked[2 * place] = pair[0];
            answers[2 * place] = pair[1];
        }

        let keys = || shown.iter().step_by(2).map(|&key| key as usize);
        keys().for_each(|key| self.is_key[key] = true);
        for token in asked.iter_mut().filter(|token| **token < 0) {
            *token = match fillers {
                Fillers::Zero => 0,
                Fillers::Random if share < 1.0 && random.uniform() >= share => 0,
                // Ends soon: at most half of the vocabulary are keys.
                Fillers::Random => loop {
                    let token = random.below(self.task.vocabulary);
                    if !self.is_key[token] {
                        break token as i32;
                    }
                },
            };
        }
        keys().for_each(|key| self.is_key[key] = false);
    }
}

/// Takes `count` different places, one after the other, each with a probability in proportion to its weight
/// among those that are left. All at once: the places whose exponential clocks, with the weights as rates,
/// ring first.
fn take_places(weights: &[f64], count: usize, random: &mut Stream, race: &mut Vec<(f64, usize)>) {
    race.clear();
    race.extend(weights.iter().enumerate().map(|(place, weight)| {
        let unit = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        (-(1.0 - unit).ln() / weight, place)
    }));
    let order = |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    race.sort_unstable_by(order);
    race.truncate(count);
}

impl BatchSource for RecallBatches {
    fn shape(&self) -> (usize, usize) {
        (self.task.batch, self.task.block)
    }

    fn vocabulary(&self) -> usize {
        self.task.vocabulary
    }

    fn fill(&mut self, draw: Draw, batch: &mut Batch) -> Result<(), BatchError> {
        batch.resize(self.task.batch, self.task.block);
        batch.step = draw.step;
        let block = self.task.block;
        let share = match draw.purpose {
            Purpose::Training if draw.step < self.task.curriculum => draw.step as f32 / self.task.curriculum as f32,
            _ => 1.0,
        };
        let rows = batch.inputs.chunks_exact_mut(block).zip(batch.targets.chunks_exact_mut(block));
        for (row, (inputs, targets)) in rows.enumerate() {
            self.fill_row(row_stream(self.seed, draw, row), share, inputs, targets);
        }
        Ok(())
    }

    fn has_answers(&self) -> bool {
        true
    }

    fn duplicate(&self) -> Box<dyn BatchSource> {
        Box::new(self.clone())
    }
}

/// Tokens to draw without replacement.
#[derive(Clone, Debug)]
struct Urn {
    tokens: Vec<i32>,
    swaps: Vec<usize>,
}

impl Urn {
    fn new(tokens: std::ops::Range<i32>) -> Urn {
        Urn { tokens: tokens.collect(), swaps: Vec::new() }
    }

    /// Draws a different token for each of `into`, and puts all back.
    fn draw<'a>(&mut self, random: &mut Stream, into: impl Iterator<Item = &'a mut i32>) {
        // The first steps of a Fisher-Yates shuffle. They are undone afterwards, so that the next draw
        // starts from the same order: a row must not depend on the rows before it.
        for (i, to) in into.enumerate() {
            let j = i + random.below(self.tokens.len() - i);
            self.tokens.swap(i, j);
            self.swaps.push(j);
            *to = self.tokens[i];
        }
        while let Some(j) = self.swaps.pop() {
            self.tokens.swap(self.swaps.len(), j);
        }
    }
}

#[cfg(test)]
mod tests;
