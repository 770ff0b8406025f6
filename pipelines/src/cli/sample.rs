//! `dataflow sample RUN`

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::registry::Registry;
use dataflow_graph::types::DType;
use serde_json::json;

use super::{DeviceArgs, print, print_json};
use crate::files::FileError;
use crate::generate::open;
use crate::generate::pool::{Next, Pool};
use crate::generate::sampling::{Sampler, Sampling};
use crate::generate::stops::Stops;
use crate::generate::vocabulary::{Characters, Vocabulary};

/// The element type of the large parameters in generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Weights {
    /// As trained
    #[default]
    F32,
    /// Half of the bytes to read for every token
    Bf16,
}

impl Weights {
    pub(super) fn dtype(self) -> DType {
        match self {
            Weights::F32 => DType::F32,
            Weights::Bf16 => DType::Bf16,
        }
    }
}

#[derive(Args)]
pub(super) struct Sample {
    /// A run folder, a checkpoint folder in it, or a weight file
    run: PathBuf,
    /// The text to continue; a line break by default
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompt_file", "prompt_tokens"])]
    prompt: Option<String>,
    /// A file with the text to continue; `-` reads standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_tokens")]
    prompt_file: Option<PathBuf>,
    /// The tokens to continue, as numbers with commas between them
    #[arg(long, value_name = "N,N,…", value_delimiter = ',')]
    prompt_tokens: Option<Vec<u32>>,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    tokens: u32,
    /// What logits are divided by; 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    temperature: f32,
    /// Choose among the K most likely tokens
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: Option<u32>,
    /// Choose among the fewest tokens that reach this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// The seed: the same one gives the same text
    #[arg(long, value_name = "S", default_value_t = 1337)]
    seed: u64,
    /// Texts to generate at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    samples: u16,
    /// Stop before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Stop at this token; may be repeated
    #[arg(long, value_name = "N")]
    stop_token: Vec<u32>,
    /// The element type of the large parameters
    #[arg(long, value_enum, default_value_t)]
    weights: Weights,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A text in the making.
struct Text {
    slot: usize,
    sampler: Sampler,
    characters: Characters,
    stops: Stops,
    text: String,
    /// Of the whole sequence, the prompt among them.
    tokens: usize,
    /// Tokens to come.
    left: u32,
    last: u32,
    done: bool,
}

impl Sample {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let sampling =
            Sampling { temperature: self.temperature, top_k: self.top_k.map(|k| k as usize), top_p: self.top_p };
        sampling.check().map_err(Diagnostic::new)?;
        let saved = open::saved(&self.run)?;
        let vocabulary = open::vocabulary(&saved);
        let (shown, prompt) = self.prompt(vocabulary.as_ref())?;
        let capacity = prompt.len() + self.tokens as usize;
        let sizes = open::Sizes { slots: self.samples.into(), capacity, weights: self.weights.dtype() };
        let mut pool = open::pool(&saved, registry, self.device.open(&[])?, &sizes)?;
        // the last token is not taken in
        if let Some(limit) = pool.limit().filter(|limit| *limit + 1 < capacity) {
            let message = format!("the model has {limit} learned positions");
            let wanted = format!("a prompt of {} tokens and {} more do not fit", prompt.len(), self.tokens);
            let room = (limit + 1).saturating_sub(prompt.len());
            return Err(Diagnostic::new(format!("{message}: {wanted}")).help(format!("use --tokens {room}")).into());
        }
        let known = vocabulary.as_ref().map_or(pool.classes(), |v| v.len().min(pool.classes()));
        let stream = !self.json && self.samples == 1;
        if stream {
            print(&shown);
        }
        let mut texts: Vec<Text> = (0..usize::from(self.samples))
            .map(|slot| Text {
                slot,
                sampler: Sampler::new(sampling, self.seed, slot as u64),
                characters: Characters::default(),
                stops: Stops::new(self.stop.clone()),
                text: String::new(),
                tokens: prompt.len(),
                left: self.tokens,
                last: prompt[prompt.len() - 1],
                done: false,
            })
            .collect();
        for text in &texts {
            pool.prefill(text.slot, 0, &prompt[..prompt.len() - 1])?;
        }
        let start = Instant::now();
        let mut made = 0;
        while texts.iter().any(|text| !text.done) {
            made += self.step(&mut pool, &mut texts, vocabulary.as_ref(), known, stream)?;
        }
        let tokens_per_s = made as f64 / start.elapsed().as_secs_f64().max(1e-9);
        if self.json {
            let texts: Vec<&str> = texts.iter().map(|text| text.text.as_str()).collect();
            print_json(&json!({ "text": texts[0], "texts": texts, "prompt": shown, "tokens": made,
                "tokens_per_s": tokens_per_s }));
        } else if stream {
            print("\n");
        } else {
            for (i, text) in texts.iter().enumerate() {
                print(&format!("--- {} ---\n{shown}{}\n", i + 1, text.text));
            }
        }
        // where it is no part of what was asked for
        if !self.json && std::io::stderr().is_terminal() {
            eprintln!("{made} tokens, {tokens_per_s:.0} tokens/s");
        }
        Ok(())
    }

    /// One more token of every text that is not done; returns how many.
    fn step(
        &self,
        pool: &mut Pool,
        texts: &mut [Text],
        vocabulary: Option<&Vocabulary>,
        known: usize,
        stream: bool,
    ) -> Result<usize, Errors> {
        let mut active: Vec<&mut Text> = texts.iter_mut().filter(|text| !text.done).collect();
        let next: Vec<Next> =
            active.iter().map(|t| Next { slot: t.slot, position: t.tokens - 1, token: t.last }).collect();
        let classes = pool.classes();
        let logits = pool.step(&next)?;
        for (text, logits) in active.iter_mut().zip(logits.chunks_exact(classes)) {
            let token = text.sampler.choose(logits, known).map_err(Diagnostic::new)?;
            text.tokens += 1;
            text.last = token;
            let stopped = self.stop_token.contains(&token);
            let mut piece = match vocabulary {
                _ if stopped => String::new(),
                Some(vocabulary) => text.characters.push(&vocabulary.bytes(token).map_err(Diagnostic::new)?),
                None => format!("{token} "),
            };
            text.left -= 1;
            text.done = stopped || text.left == 0;
            if text.done {
                piece.push_str(&text.characters.finish());
            }
            let (mut piece, met) = text.stops.push(&piece);
            if text.done && !met {
                piece.push_str(&text.stops.finish());
            }
            text.done |= met;
            if stream && !piece.is_empty() {
                print(&piece);
                let _ = std::io::stdout().flush();
            }
            text.text.push_str(&piece);
        }
        Ok(next.len())
    }

    /// The prompt as text and as tokens, of which there is at least one.
    fn prompt(&self, vocabulary: Option<&Vocabulary>) -> Result<(String, Vec<u32>), Errors> {
        if let Some(tokens) = &self.prompt_tokens {
            let shown = tokens.iter().map(|t| format!("{t} ")).collect();
            return match tokens.is_empty() {
                true => Err(Diagnostic::new("--prompt-tokens needs at least one number").into()),
                false => Ok((shown, tokens.clone())),
            };
        }
        let Some(vocabulary) = vocabulary else {
            let error = Diagnostic::new("the model was not trained on text whose vocabulary is known");
            return Err(error.help("give the tokens to continue: --prompt-tokens 1,2,3").into());
        };
        let text = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) if path.as_os_str() == "-" => {
                let mut text = String::new();
                let read = std::io::stdin().read_to_string(&mut text);
                read.map_err(|e| Diagnostic::new(format!("cannot read the prompt from standard input: {e}")))?;
                text
            }
            (None, Some(path)) => std::fs::read_to_string(path)
                .map_err(FileError::on("read", path))
                .map_err(|e| Diagnostic::new(e.to_string()))?,
            (None, None) => "\n".into(),
        };
        let tokens = vocabulary.encode(&text).map_err(|e| Diagnostic::new(format!("the prompt: {e}")))?;
        match tokens.is_empty() {
            true => Err(Diagnostic::new("the prompt is empty: give at least one character").into()),
            false => Ok((text, tokens)),
        }
    }
}
