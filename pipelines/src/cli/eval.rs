//! `dataflow eval RUN`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use dataflow_graph::components::Precision;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::registry::Registry;
use serde_json::json;

use super::{DeviceArgs, print, print_json, thousands};
use crate::data::layout::{Files, Layout};
use crate::data::token_file::Description;
use crate::data::whole_windows::WholeWindows;
use crate::data::{Split, TokenFile, Tokenizer};
use crate::evaluation::contexts::{Evaluation, Row};
use crate::evaluation::figure;
use crate::files::FileError;
use crate::generate::open;
use crate::pipeline::Pipeline;
use crate::saved::Saved;
use crate::stages;

#[derive(Args)]
pub(super) struct Eval {
    /// A run folder, a checkpoint folder in it, or a weight file
    run: PathBuf,
    /// Tokens of a context, as a number or as a multiple of what the model was trained with (`4x`); may be repeated.
    /// By default the length of training
    #[arg(long, value_name = "T", value_delimiter = ',', value_parser = parse_block)]
    block: Vec<Block>,
    /// The most batches at each length; all of the text by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batches: Option<u32>,
    /// Tokens of a batch, where contexts are shorter
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    batch_tokens: u32,
    /// A text to evaluate on instead of the validation split of the run's pipeline
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// The figure to write; `extrapolation.svg` in the run folder by default, where there are several lengths
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A context length.
#[derive(Clone, Copy, Debug)]
enum Block {
    Tokens(usize),
    Times(usize),
}

fn parse_block(text: &str) -> Result<Block, String> {
    let (digits, times) = match text.strip_suffix(['x', '×']) {
        Some(digits) => (digits, true),
        None => (text, false),
    };
    match digits.parse::<u32>() {
        Ok(n) if n > 0 && times => Ok(Block::Times(n as usize)),
        Ok(n) if n > 0 => Ok(Block::Tokens(n as usize)),
        _ => Err("write a number of tokens such as 1024, or a multiple such as 4x".into()),
    }
}

impl Eval {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let saved = open::saved(&self.run)?;
        let device = self.device.open(&[])?;
        let trained = open::block(&saved);
        let blocks = self.blocks(trained)?;
        // the folder lives as long as the token file that is made in it
        let folder =
            tempfile::tempdir().map_err(|e| Diagnostic::new(format!("cannot make a temporary folder: {e}")))?;
        let windows = match &self.text {
            Some(path) => encoded(&saved, path, folder.path())?,
            None => validation(&saved, registry, &device)?,
        };
        let evaluation = Evaluation {
            registry: registry.clone(),
            device,
            scope: saved.scope(&BTreeMap::new())?,
            saved: &saved,
            windows,
            batch_tokens: self.batch_tokens as usize,
            batches: self.batches.map(|n| n as usize),
        };
        if !self.json {
            print(&format!("{:>8} {:>10} {:>12} {:>12}\n", "block", "loss", "perplexity", "tokens"));
        }
        let mut rows: Vec<Row> = Vec::new();
        for block in blocks {
            let row = evaluation.at(block)?;
            if !self.json {
                print(&match (row.loss, row.perplexity) {
                    (Some(loss), Some(perplexity)) => {
                        format!("{block:>8} {loss:>10.4} {perplexity:>12.3} {:>12}\n", thousands(row.tokens))
                    }
                    _ => format!("{block:>8}          -            -            -  {}\n", shown(&row)),
                });
            }
            rows.push(row);
        }
        let svg = self
            .svg
            .clone()
            .or_else(|| (rows.len() > 1 && self.run.is_dir()).then(|| self.run.join("extrapolation.svg")));
        if let Some(svg) = &svg {
            figure::save(svg, &saved.model.about, &rows, trained).map_err(|e| Diagnostic::new(e.to_string()))?;
        }
        if self.json {
            // of one length, what `--block` asks for is not a list
            let first = &rows[0];
            print_json(&json!({ "loss": first.loss, "perplexity": first.perplexity, "trained_block": trained,
                "blocks": rows, "svg": svg }));
        } else if let Some(svg) = svg {
            print(&format!("figure: {}\n", svg.display()));
        }
        if rows.iter().all(|row| row.loss.is_none()) {
            return Err(Diagnostic::new(format!("the model could not be evaluated: {}", shown(&rows[0]))).into());
        }
        Ok(())
    }

    fn blocks(&self, trained: Option<usize>) -> Result<Vec<usize>, Errors> {
        let given = if self.block.is_empty() { vec![Block::Times(1)] } else { self.block.clone() };
        let unknown = || {
            let error = Diagnostic::new("the model's config has no `block`, the length that it was trained with");
            Errors::from(error.help("give lengths in tokens: --block 1024"))
        };
        let length = |block: &Block| match *block {
            Block::Tokens(n) => Ok(n),
            Block::Times(n) => trained.map(|t| t.saturating_mul(n)).ok_or_else(unknown),
        };
        given.iter().map(length).collect()
    }
}

fn shown(row: &Row) -> &str {
    row.ends.as_deref().unwrap_or("the loss is no number")
}

/// The tokens of a text file.
fn encoded(saved: &Saved, path: &std::path::Path, folder: &std::path::Path) -> Result<WholeWindows, Errors> {
    let text = std::fs::read_to_string(path).map_err(FileError::on("read", path));
    let text = text.map_err(|e| Diagnostic::new(e.to_string()))?;
    let vocabulary = open::vocabulary(saved)
        .ok_or_else(|| Diagnostic::new("the model was not trained on text whose vocabulary is known"))?;
    let wrong = |e: String| Errors::from(Diagnostic::new(format!("{}: {e}", path.display())));
    let tokens = vocabulary.encode(&text).map_err(wrong)?;
    if tokens.len() < 2 {
        return Err(wrong("the text has fewer than two tokens".into()));
    }
    let tokenizer = saved.tokenizer.clone().unwrap_or(Tokenizer::Unknown);
    let layout = Layout::new(Files::Raw, vocabulary.len());
    let bare = Description::bare(tokens.len(), vocabulary.len(), layout);
    let description = Description { tokenizer, ..bare };
    let file = TokenFile::create(&folder.join("text.bin"), description, tokens);
    let file = Arc::new(file.map_err(|e| wrong(e.to_string()))?);
    WholeWindows::new(file, Split::Validation, 1, 1).map_err(|e| wrong(e.to_string()))
}

/// The validation split of the pipeline that trained the model.
fn validation(
    saved: &Saved,
    registry: &Arc<Registry>,
    device: &Arc<dyn dataflow_kernels::device::Device>,
) -> Result<WholeWindows, Errors> {
    let help = "give a text: --text FILE";
    let Some(file) = &saved.pipeline else {
        return Err(Diagnostic::new("the weights have no pipeline beside them, which says where text is")
            .help(help)
            .into());
    };
    let mut pipeline = Pipeline::new(file, registry)?;
    let mut run = stages::Run {
        registry: registry.clone(),
        device: device.clone(),
        threads: 1,
        precision: Precision::F32,
        seed: file.seed,
        pipeline: PathBuf::from(&file.source.name),
        cache: PathBuf::from("data"),
        folder: stages::RunFolderChoice::Wanted {
            out: None,
            origin: String::new(),
            resolved: file.source.text.clone(),
        },
        trainer: None,
        hooks: Vec::new(),
        model: None,
        resumed: None,
        writer: None,
    };
    let source = pipeline.batches(&mut run)?;
    let windows = source.map(|source| source.whole_windows(Split::Validation)).transpose();
    match windows.map_err(|e| Diagnostic::new(e.to_string()))?.flatten() {
        Some(windows) => Ok(windows),
        None => Err(Diagnostic::new("the run's pipeline makes its tokens on the fly, without a validation split")
            .help(help)
            .into()),
    }
}
