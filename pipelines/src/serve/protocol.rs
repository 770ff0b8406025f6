//! OpenAI's `/v1/completions`: what is asked, and how answers look.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Limits;
use super::engine::{Facts, Token};
use crate::generate::sampling::Sampling;

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// In words for the user.
    pub message: String,
}

impl Refusal {
    /// For a request that is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { status: 400, message: message.into() }
    }

    /// The body that OpenAI's clients read.
    pub fn body(&self) -> Value {
        let kind = match self.status {
            401 => "authentication_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": null, "code": null } })
    }
}

/// What is to be continued.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Tokens.
    Tokens(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
    /// Several lists of tokens.
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// The body of a request. Names that are not here are ignored, as OpenAI's own servers do with those they retire;
/// those that would change the answer are refused in [`Request::check`].
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Request {
    /// What is to be continued.
    pub prompt: Prompt,
    model: Option<String>,
    max_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    n: Option<usize>,
    /// Whether the answer comes as it is made.
    pub stream: Option<bool>,
    logprobs: Option<Logprobs>,
    /// Whether the answer begins with the prompt.
    pub echo: Option<bool>,
    stop: Option<OneOrMore>,
    seed: Option<i64>,
    best_of: Option<usize>,
    suffix: Option<String>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<Map<String, Value>>,
}

/// A number, or a flag as newer clients send it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
enum Logprobs {
    Flag(bool),
    Count(usize),
}

/// The most alternatives beside each token.
const MOST_LOGPROBS: usize = 20;
/// As in OpenAI's interface.
const DEFAULT_TOKENS: u64 = 16;
/// The most texts that stop an answer.
const MOST_STOPS: usize = 16;

/// A request that can be answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// One for each prompt; each is answered `answers` times.
    pub prompts: Vec<Vec<u32>>,
    /// Answers to each prompt.
    pub answers: usize,
    /// Tokens to generate.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// For the choice; `None` for a different one each time.
    pub seed: Option<u64>,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Alternatives beside each token, if log-probabilities are wanted.
    pub logprobs: Option<usize>,
    /// Whether answers begin with the prompt.
    pub echo: bool,
    /// Whether they come as they are made.
    pub stream: bool,
}

impl Request {
    /// Reads a body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        serde_json::from_slice(body).map_err(|e| {
            let message = e.to_string().replace("data did not match any variant of untagged enum ", "wrong value for ");
            Refusal::invalid(format!("the body is no completion request in JSON: {message}"))
        })
    }

    /// What is wanted, if it is allowed.
    ///
    /// # Errors
    /// What is out of range, or not supported.
    pub fn check(self, name: &str, facts: &Facts, limits: &Limits) -> Result<Wanted, Refusal> {
        let unsupported = [
            ("best_of", self.best_of.is_some_and(|n| n != self.n.unwrap_or(1))),
            ("suffix", self.suffix.is_some_and(|s| !s.is_empty())),
            ("presence_penalty", self.presence_penalty.is_some_and(|x| x != 0.0)),
            ("frequency_penalty", self.frequency_penalty.is_some_and(|x| x != 0.0)),
            ("logit_bias", self.logit_bias.is_some_and(|m| !m.is_empty())),
        ];
        if let Some((what, _)) = unsupported.iter().find(|(_, given)| *given) {
            return Err(Refusal::invalid(format!("`{what}` is not supported: leave it out")));
        }
        if let Some(model) = self.model.filter(|model| model != name) {
            let message = format!("there is no model `{model}`; this server has `{name}`");
            return Err(Refusal { status: 404, message });
        }
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k,
            top_p: self.top_p.unwrap_or(1.0),
        };
        sampling.check().map_err(Refusal::invalid)?;
        let most = limits.max_tokens;
        let max_tokens = usize::try_from(self.max_tokens.unwrap_or(DEFAULT_TOKENS)).unwrap_or(usize::MAX);
        if max_tokens > most {
            return Err(Refusal::invalid(format!("max_tokens is {max_tokens}; this server allows {most}")));
        }
        let logprobs = match self.logprobs {
            None | Some(Logprobs::Flag(false)) => None,
            Some(Logprobs::Flag(true)) => Some(1),
            Some(Logprobs::Count(n)) if n <= MOST_LOGPROBS => Some(n),
            Some(Logprobs::Count(n)) => {
                return Err(Refusal::invalid(format!("logprobs is {n}; this server gives {MOST_LOGPROBS} at most")));
            }
        };
        let stops = match self.stop {
            None => Vec::new(),
            Some(OneOrMore::One(stop)) => vec![stop],
            Some(OneOrMore::More(stops)) => stops,
        };
        if stops.len() > MOST_STOPS || stops.iter().any(|s| s.len() > 1000) {
            return Err(Refusal::invalid(format!("`stop` takes {MOST_STOPS} texts of 1000 bytes at most")));
        }
        let encode = |text: &String| match &facts.vocabulary {
            Some(vocabulary) => vocabulary.encode(text).map_err(|e| Refusal::invalid(format!("the prompt: {e}"))),
            None => Err(Refusal::invalid("the model was not trained on text: give tokens instead")),
        };
        let prompts = match self.prompt {
            Prompt::Text(text) => vec![encode(&text)?],
            Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::TokenLists(lists) => lists,
        };
        let answers = self.n.unwrap_or(1);
        if prompts.is_empty() || answers == 0 || prompts.len().saturating_mul(answers) > limits.choices {
            let message = format!("{} prompts with {answers} answers each", prompts.len());
            return Err(Refusal::invalid(format!("{message}: from 1 to {} in all are allowed", limits.choices)));
        }
        for prompt in &prompts {
            check_prompt(prompt, max_tokens, facts, limits)?;
        }
        Ok(Wanted {
            prompts,
            answers,
            max_tokens,
            sampling,
            seed: self.seed.map(|seed| seed as u64),
            stops,
            logprobs,
            echo: self.echo.unwrap_or(false),
            stream: self.stream.unwrap_or(false),
        })
    }
}

fn check_prompt(prompt: &[u32], max_tokens: usize, facts: &Facts, limits: &Limits) -> Result<(), Refusal> {
    let count = prompt.len();
    if count == 0 {
        return Err(Refusal::invalid("a prompt is empty: give at least one token"));
    }
    if count > limits.prompt_tokens {
        return Err(Refusal::invalid(format!(
            "a prompt has {count} tokens; this server allows {}",
            limits.prompt_tokens
        )));
    }
    if let Some(token) = prompt.iter().find(|t| **t as usize >= facts.known) {
        return Err(Refusal::invalid(format!("token {token} is none of the model's, which are below {}", facts.known)));
    }
    // the last token that is generated is not taken in
    let needed = count + max_tokens.saturating_sub(1);
    match facts.limit {
        Some(limit) if needed > limit => Err(Refusal::invalid(format!(
            "a prompt of {count} tokens and max_tokens {max_tokens} do not fit the context of {limit} tokens"
        ))),
        _ => Ok(()),
    }
}

/// The log-probabilities of tokens as OpenAI's interface gives them; `offset` is where the first of them begins in the
/// text, in characters, and is moved behind the last.
pub fn logprobs(tokens: &[Token], facts: &Facts, offset: &mut usize) -> Value {
    let text = |token: u32| String::from_utf8_lossy(&facts.bytes(token)).into_owned();
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(*offset);
        *offset += text(token.token).chars().count();
    }
    let top = |token: &Token| match token.logprob {
        None => Value::Null,
        Some(_) => Value::Object(token.top.iter().map(|(t, p)| (text(*t), json!(p))).collect()),
    };
    json!({
        "tokens": tokens.iter().map(|t| text(t.token)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}
