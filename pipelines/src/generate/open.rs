//! A trained model, ready to continue text.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_graph::diagnostic::Errors;
use dataflow_graph::format::formula::Number;
use dataflow_graph::registry::Registry;
use dataflow_graph::types::DType;
use dataflow_kernels::device::Device;

use super::pool::{Pool, Setup};
use super::vocabulary::Vocabulary;
use crate::data::Tokenizer;
use crate::report::folder::TOKENIZER;
use crate::saved::Saved;

/// How many sequences, of how many tokens, a model is opened for.
pub struct Sizes {
    /// Sequences at once.
    pub slots: usize,
    /// Tokens of a sequence, where its state grows with them.
    pub capacity: usize,
    /// The element type of the large parameters.
    pub weights: DType,
}

/// Programs of a saved model, with its parameters.
///
/// # Errors
/// A model that does not fit its parameters, has an op without a recurrent form, or is too large for the memory.
pub fn pool(saved: &Saved, registry: &Arc<Registry>, device: Arc<dyn Device>, sizes: &Sizes) -> Result<Pool, Errors> {
    let setup = Setup {
        registry: registry.clone(),
        device,
        model: saved.model.clone(),
        scope: saved.scope(&BTreeMap::new())?,
        slots: sizes.slots,
        capacity: sizes.capacity,
        weights: sizes.weights,
    };
    let mut pool = Pool::new(setup)?;
    saved.fill(pool.parameters())?;
    Ok(pool)
}

/// Opens a run folder or weight file; tells of what was passed over on standard error.
///
/// # Errors
/// Nothing there, or nothing whole.
pub fn saved(path: &Path) -> Result<Saved, Errors> {
    let saved = Saved::open(path)?;
    saved.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    Ok(saved)
}

/// What turns text into tokens for a saved model, if that is known. A tokenizer's file is looked for beside the weights and
/// in the folders above, up to the run's; if it is not there, standard error tells.
pub fn vocabulary(saved: &Saved) -> Option<Vocabulary> {
    let Some(Tokenizer::Json { sha256, end_of_text, .. }) = &saved.tokenizer else {
        return saved.tokenizer.as_ref().and_then(Vocabulary::new);
    };
    // RUN/checkpoints/STEP/weights.safetensors
    let places: Vec<PathBuf> = saved.weights.ancestors().skip(1).take(3).map(|p| p.join(TOKENIZER)).collect();
    let found = match places.iter().find(|path| path.is_file()) {
        Some(path) => Vocabulary::of_file(path, sha256, *end_of_text),
        None => Err(format!("{} is missing: put the tokenizer's file there", places[places.len() - 1].display())),
    };
    found.map_err(|what| eprintln!("warning: the model has no text, only tokens: {what}")).ok()
}

/// The context length that a model was trained with.
pub fn block(saved: &Saved) -> Option<usize> {
    let scope = saved.scope(&BTreeMap::new()).ok()?;
    scope.get("block").and_then(Number::int).and_then(|block| usize::try_from(block).ok()).filter(|block| *block > 0)
}
