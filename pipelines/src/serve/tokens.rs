//! The model's tokenizer for clients that have none: `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM's server has
//! them and `lm-eval` asks for them.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::http::{Service, read, refuse};
use super::protocol::Refusal;
use crate::generate::vocabulary::{Characters, Vocabulary};

#[derive(Deserialize)]
struct Text {
    prompt: String,
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<u32>,
}

/// `GET /tokenizer_info`: the text of the token that ends a document; `null` where there is none.
pub async fn info(State(service): State<Arc<Service>>) -> Response {
    answer(known(&service).map(|vocabulary| {
        let end = end_of_text(vocabulary).map(|(_, text)| text);
        json!({ "tokenizer_class": "dataflow", "eos_token": end, "bos_token": null, "vocab_size": vocabulary.len() })
    }))
}

/// `POST /tokenize`: `{"prompt": text}` to `{"tokens": [numbers]}`. The text of the token that ends a document, alone, is that
/// token.
pub async fn tokenize(State(service): State<Arc<Service>>, body: Result<Bytes, BytesRejection>) -> Response {
    let work = move || {
        let vocabulary = known(&service)?;
        let Text { prompt } = parse(&read(&service, body)?)?;
        let tokens = match end_of_text(vocabulary) {
            Some((token, text)) if text == prompt => vec![token],
            _ => vocabulary.encode(&prompt).map_err(|e| Refusal::invalid(format!("the prompt: {e}")))?,
        };
        Ok(json!({ "count": tokens.len(), "tokens": tokens, "max_model_len": service.facts().limit }))
    };
    aside(work).await
}

/// `POST /detokenize`: `{"tokens": [numbers]}` to `{"prompt": text}`.
pub async fn detokenize(State(service): State<Arc<Service>>, body: Result<Bytes, BytesRejection>) -> Response {
    let work = move || {
        let vocabulary = known(&service)?;
        let Tokens { tokens } = parse(&read(&service, body)?)?;
        let (mut characters, mut text) = (Characters::default(), String::new());
        for token in tokens {
            text.push_str(&characters.push(&vocabulary.bytes(token).map_err(Refusal::invalid)?));
        }
        text.push_str(&characters.finish());
        Ok(json!({ "prompt": text }))
    };
    aside(work).await
}

/// A long text takes a moment; others need not wait for that.
async fn aside(work: impl FnOnce() -> Result<Value, Refusal> + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => answer(done),
        Err(_) => refuse(Refusal { status: 500, message: "the request could not be read".into() }),
    }
}

fn answer(result: Result<Value, Refusal>) -> Response {
    match result {
        Ok(body) => Json(body).into_response(),
        Err(refusal) => refuse(refusal),
    }
}

fn known(service: &Service) -> Result<&Vocabulary, Refusal> {
    let none = || Refusal { status: 404, message: "the model was not trained on text: it has no tokenizer".into() };
    service.facts().vocabulary.as_deref().ok_or_else(none)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|e| Refusal::invalid(format!("the body is not what this path takes: {e}")))
}

/// The token that ends a document, with its text.
fn end_of_text(vocabulary: &Vocabulary) -> Option<(u32, String)> {
    let token = vocabulary.end_of_text()?;
    let text = String::from_utf8(vocabulary.bytes(token).ok()?).ok()?;
    (!text.is_empty()).then_some((token, text))
}
