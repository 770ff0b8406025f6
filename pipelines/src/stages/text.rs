//! `Text`, `Chars` and `TokenFiles`: from a file, archive or address to token files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_graph::format::number::{Real, Size};
use dataflow_graph::registry::{Info, Registry};
use serde::{Deserialize, Serialize};

use super::{Kind, Product, Run, Stage, StageError, StageRegistry};
use crate::data::{TextSource, TokenFile, TokenSplits, chars, text};

/// A text from the first source that is at hand.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    from: Vec<TextSource>,
}

impl Stage for Text {
    fn inputs(&self) -> &'static [Kind] {
        &[]
    }
    fn output(&self) -> Kind {
        Kind::Text
    }
    fn start(&self, run: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        let text = text::load(&self.from, &run.cache).map_err(StageError::from_error)?;
        Ok(Product::Text(Arc::new(text)))
    }
}

/// A text as characters: the sorted characters are the vocabulary, the last `validation` of the text is held out.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chars {
    #[serde(default = "tenth")]
    validation: Real,
}

fn tenth() -> Real {
    Real(0.1)
}

impl Stage for Chars {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Text]
    }
    fn output(&self) -> Kind {
        Kind::Tokens
    }
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Text(text)] = inputs else { unreachable!("kinds are checked before stages start") };
        chars::prepare(text, self.validation.0, &run.cache).map(Product::Tokens).map_err(StageError::from_error)
    }
}

/// Token files that are there already: raw little-endian 16-bit tokens, as nanoGPT's `prepare.py` writes them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenFiles {
    train: PathBuf,
    validation: PathBuf,
    /// Every token is below this; the model's vocabulary.
    vocabulary: Size,
}

impl Stage for TokenFiles {
    fn inputs(&self) -> &'static [Kind] {
        &[]
    }
    fn output(&self) -> Kind {
        Kind::Tokens
    }
    fn start(&self, _: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        let open = |path: &Path| match TokenFile::open_bare(path, *self.vocabulary) {
            Ok(file) => Ok(Arc::new(file)),
            Err(error) => Err(StageError::Message(format!(
                "{error}; nanoGPT's data/openwebtext/prepare.py makes such files, \
                 and `train` and `validation` say where they are"
            ))),
        };
        Ok(Product::Tokens(TokenSplits { train: open(&self.train)?, validation: open(&self.validation)? }))
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Text>(Info {
        name: "Text",
        about: "A text from the first source that is at hand: a file, a member of an archive, an address.",
        inputs: &[],
        formula: "",
        source: "",
        example: "(from: [File(\"input.txt\")])",
    });
    registry.stage::<TokenFiles>(Info {
        name: "TokenFiles",
        about: "Token files that are there already: raw 16-bit tokens.",
        inputs: &[],
        formula: "",
        source: "nanoGPT, data/openwebtext/prepare.py",
        example: "(train: \"train.bin\", validation: \"val.bin\", vocabulary: 50304)",
    });
    registry.stage::<Chars>(Info {
        name: "Chars",
        about: "A text as characters, with the last part of it held out for validation.",
        inputs: &["text"],
        formula: "",
        source: "nanoGPT, data/shakespeare_char/prepare.py",
        example: "",
    });
}
