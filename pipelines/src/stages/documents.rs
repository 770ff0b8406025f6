//! `Documents` and `Tokenize`: from a corpus to token files.

use std::path::PathBuf;
use std::sync::Arc;

use dataflow_graph::format::number::{Real, Size};
use dataflow_graph::registry::{Info, Registry};
use serde::{Deserialize, Serialize};

use super::{Kind, Product, Run, Stage, StageError, StageRegistry};
use crate::data::documents::Format;
use crate::data::layout::Files;
use crate::data::prepare::{Recipe, prepare};
use crate::data::tokenizer::Choice;

/// A corpus: all documents of files, folders, addresses and datasets, in their order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Documents {
    /// Files, folders, `https://…#sha256=…`, or `hf://datasets/owner/name`.
    from: Vec<String>,
    /// The field of a JSON line or the column of a Parquet file that holds the text.
    #[serde(default = "text")]
    field: String,
    /// Which members of archives are documents, as a pattern such as `"**.txt"`; by default those of a known kind.
    #[serde(default)]
    members: Option<String>,
    /// What separates the documents of a text file; without it a file is one document.
    #[serde(default)]
    separator: Option<String>,
}

fn text() -> String {
    "text".into()
}

impl Stage for Documents {
    fn inputs(&self) -> &'static [Kind] {
        &[]
    }
    fn output(&self) -> Kind {
        Kind::Documents
    }
    fn start(&self, _: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        // the sources are looked for when they are needed: prepared tokens do without
        Ok(Product::Documents(Arc::new(self.clone())))
    }
}

/// A corpus as token files, which are made if they are not there. The split follows from a hash of each document.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenize {
    /// Where the files `train.bin` and `val.bin` are.
    folder: PathBuf,
    #[serde(default = "gpt2")]
    tokenizer: Choice,
    /// The part of the documents that is held out.
    #[serde(default = "upstream")]
    validation: Real,
    #[serde(default = "seed")]
    seed: Size,
    /// `Raw` or `LlmC`.
    #[serde(default)]
    files: Files,
}

fn gpt2() -> Choice {
    Choice::Gpt2
}

fn upstream() -> Real {
    Real(0.0005)
}

fn seed() -> Size {
    Size(2357)
}

impl Stage for Tokenize {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Documents]
    }
    fn output(&self) -> Kind {
        Kind::Tokens
    }
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Documents(documents)] = inputs else { unreachable!("kinds are checked before stages start") };
        let recipe = Recipe {
            sources: documents.from.clone(),
            documents: Format {
                field: documents.field.clone(),
                members: documents.members.clone(),
                separator: documents.separator.clone(),
            },
            tokenizer: self.tokenizer.clone(),
            tokenizer_sha256: None,
            validation: self.validation.0,
            seed: *self.seed as u64,
            files: self.files,
        };
        let tokens = prepare(&recipe, &self.folder, &run.cache, run.threads);
        tokens.map(Product::Tokens).map_err(StageError::from_error)
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Documents>(Info {
        name: "Documents",
        about: "A corpus: the documents of .txt, .jsonl, .parquet, .tar and .zip files, compressed or not, of folders, \
                addresses and datasets of the Hugging Face hub.",
        inputs: &[],
        formula: "",
        source: "",
        example: "(from: [\"corpus.jsonl.gz\"])",
    });
    registry.stage::<Tokenize>(Info {
        name: "Tokenize",
        about: "A corpus as token files: Gpt2, Chars, Bytes or a tokenizer.json; made once, on all cores, resumable.",
        inputs: &["documents"],
        formula: "",
        source: "nanoGPT, data/openwebtext/prepare.py",
        example: "(folder: \"data/corpus\", validation: 0.0005)",
    });
}
