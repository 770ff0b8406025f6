//! `Windows`, `Sequential`, `Packed` and `Recall`: where batches come from.

use dataflow_graph::format::number::{Real, Size};
use dataflow_graph::registry::{Info, Registry};
use serde::{Deserialize, Serialize};

use super::{Kind, Product, Run, Stage, StageError, StageRegistry};
use crate::data::recall::{self, Fillers};
use crate::data::{packed, sequential, windows};

/// Random windows of token files.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Windows {
    batch: Size,
    block: Size,
}

impl Stage for Windows {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Tokens]
    }
    fn output(&self) -> Kind {
        Kind::Batches
    }
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Tokens(splits)] = inputs else { unreachable!("kinds are checked before stages start") };
        let windows = windows::Windows { batch: *self.batch, block: *self.block };
        let source = windows.over(splits.clone(), run.seed).map_err(StageError::from_error)?;
        Ok(Product::Batches(Box::new(source)))
    }
}

/// The windows of token files in turn: each token once per epoch.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sequential {
    batch: Size,
    block: Size,
    /// Whether each epoch has an order of its own; else all follow the file.
    #[serde(default = "yes")]
    shuffle: bool,
}

fn yes() -> bool {
    true
}

impl Stage for Sequential {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Tokens]
    }
    fn output(&self) -> Kind {
        Kind::Batches
    }
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Tokens(splits)] = inputs else { unreachable!("kinds are checked before stages start") };
        let Sequential { batch, block, shuffle } = self;
        let windows = sequential::Sequential { batch: **batch, block: **block, shuffle: *shuffle };
        let source = windows.over(splits.clone(), run.seed).map_err(StageError::from_error)?;
        Ok(Product::Batches(Box::new(source)))
    }
}

/// As [`Sequential`], but each document starts anew.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packed {
    batch: Size,
    block: Size,
    #[serde(default = "yes")]
    shuffle: bool,
    /// The token that documents start at; by default what `Tokenize` has put between them.
    #[serde(default)]
    end_of_text: Option<Size>,
}

impl Stage for Packed {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Tokens]
    }
    fn output(&self) -> Kind {
        Kind::Batches
    }
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Tokens(splits)] = inputs else { unreachable!("kinds are checked before stages start") };
        let Packed { batch, block, shuffle, end_of_text } = self;
        let sequential = sequential::Sequential { batch: **batch, block: **block, shuffle: *shuffle };
        // what does not fit is above any vocabulary
        let end_of_text = end_of_text.map(|token| u32::try_from(*token).unwrap_or(u32::MAX));
        let source = packed::Packed { sequential, end_of_text }.over(splits.clone(), run.seed);
        Ok(Product::Batches(Box::new(source.map_err(StageError::from_error)?)))
    }
}

/// Multi-query associative recall (Zoology, arXiv:2312.04927), generated on the fly.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recall {
    batch: Size,
    block: Size,
    vocabulary: Size,
    pairs: Size,
    #[serde(default = "one")]
    queries: Size,
    #[serde(default = "power")]
    power_a: Real,
    #[serde(default = "random")]
    fillers: Fillers,
    /// Training steps over which the share of random fillers grows from 0 to all.
    #[serde(default)]
    curriculum: Size,
}

fn one() -> Size {
    Size(1)
}

fn power() -> Real {
    Real(0.01)
}

fn random() -> Fillers {
    Fillers::Random
}

impl Stage for Recall {
    fn inputs(&self) -> &'static [Kind] {
        &[]
    }
    fn output(&self) -> Kind {
        Kind::Batches
    }
    fn start(&self, run: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        let task = recall::Recall {
            batch: *self.batch,
            block: *self.block,
            vocabulary: *self.vocabulary,
            pairs: *self.pairs,
            queries: *self.queries,
            power_a: self.power_a.0,
            fillers: self.fillers,
            curriculum: *self.curriculum as u64,
        };
        Ok(Product::Batches(Box::new(task.source(run.seed).map_err(StageError::from_error)?)))
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Windows>(Info {
        name: "Windows",
        about: "Random windows of token files, each asked for the next token at every place.",
        inputs: &["tokens"],
        formula: "",
        source: "nanoGPT, get_batch",
        example: "(batch: 12, block: 64)",
    });
    registry.stage::<Sequential>(Info {
        name: "Sequential",
        about: "The windows of token files in turn, in an order of its own in every epoch: each token once per epoch.",
        inputs: &["tokens"],
        formula: "",
        source: "",
        example: "(batch: 12, block: 64)",
    });
    registry.stage::<Packed>(Info {
        name: "Packed",
        about: "As Sequential, but attention, recurrent states and positions start anew at each document.",
        inputs: &["tokens"],
        formula: "",
        source: "",
        example: "(batch: 12, block: 64)",
    });
    registry.stage::<Recall>(Info {
        name: "Recall",
        about: "Multi-query associative recall: key-value pairs, then keys whose values are asked for.",
        inputs: &[],
        formula: "",
        source: "arXiv:2312.04927",
        example: "(batch: 64, block: 64, vocabulary: 64, pairs: 4)",
    });
}
