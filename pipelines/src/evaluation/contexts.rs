//! Loss and perplexity at several context lengths, on windows that do not overlap.

use std::sync::Arc;

use dataflow_graph::compile::{Request, compile};
use dataflow_graph::components::Options;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::format::number::Scope;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::{Device, DeviceError};
use dataflow_ops::loss::CrossEntropy;
use serde::Serialize;

use crate::data::Batch;
use crate::data::whole_windows::WholeWindows;
use crate::saved::Saved;

/// What a model came to at one context length.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Tokens of a window.
    pub block: usize,
    /// Nats per token.
    pub loss: Option<f64>,
    /// `exp(loss)`
    pub perplexity: Option<f64>,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Why the model cannot be run at this length.
    pub ends: Option<String>,
}

/// What is evaluated, and on what.
pub struct Evaluation<'a> {
    /// Where ops are found.
    pub registry: Arc<Registry>,
    /// What runs the model.
    pub device: Arc<dyn Device>,
    /// The model.
    pub saved: &'a Saved,
    /// Its config, as it was trained.
    pub scope: Scope,
    /// Tokens to predict, in windows of any length.
    pub windows: WholeWindows,
    /// Tokens of a batch, where windows are shorter.
    pub batch_tokens: usize,
    /// The most batches; none for all.
    pub batches: Option<usize>,
}

impl Evaluation<'_> {
    /// The mean loss at one context length.
    ///
    /// # Errors
    /// Parameters that do not fit, tokens that cannot be read, no memory left.
    pub fn at(&self, block: usize) -> Result<Row, Errors> {
        let none = |ends: String| Row { block, loss: None, perplexity: None, tokens: 0, ends: Some(ends) };
        let most = self.windows.tokens().saturating_sub(1);
        if block > most {
            return Ok(none(format!("the text has {most} tokens to predict")));
        }
        let batch = (self.batch_tokens / block).max(1);
        let request = Request {
            registry: self.registry.clone(),
            model: self.saved.model.clone(),
            scope: self.scope.clone(),
            options: Options {
                target: self.device.target(),
                packed: self.windows.is_packed(),
                ..Options::new(batch, block)
            },
            objectives: vec![("loss".into(), Arc::new(CrossEntropy {}))],
            optimizer: None,
            without: Vec::new(),
            memory_budget: None,
        };
        let compiled = match compile(&request) {
            Ok(compiled) => compiled,
            // the model runs at the length that it was trained with, so this is about the length
            Err(errors) => return Ok(none(errors.0.first().map_or_else(String::new, |e| e.message.clone()))),
        };
        let mut session = Session::new(self.device.clone(), &compiled, None)?;
        self.saved.fill(&session)?;
        let to_errors = |e: &dyn std::error::Error| Errors::from(Diagnostic::new(e.to_string()));
        let mut windows = self.windows.cut(batch, block).map_err(|e| to_errors(&e))?;
        let (mut filled, mut sum, mut tokens) = (Batch::new(1, 1), 0.0, 0);
        for _ in 0..self.batches.unwrap_or(usize::MAX) {
            if !windows.fill(&mut filled).map_err(|e| to_errors(&e))? {
                break;
            }
            filled.write_to(&session);
            session.run_step().map_err(|e: DeviceError| to_errors(&e))?;
            let answers = filled.answers();
            sum += answers as f64 * f64::from(session.scalar("loss").unwrap_or(f32::NAN));
            tokens += answers;
        }
        let loss = sum / tokens as f64;
        Ok(Row { block, loss: Some(loss), perplexity: Some(loss.exp()), tokens, ends: None })
    }
}
