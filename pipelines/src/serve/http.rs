//! Connections: who may ask, what is asked, and how answers go out.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request as HttpRequest, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{Event as SseEvent, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use crossbeam::channel::{Sender, TrySendError};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Options;
use super::engine::{Event, Facts, Job, Token};
use super::protocol::{Refusal, Request, Wanted, logprobs};
use super::tokens;

/// What the handlers share.
pub struct Service {
    options: Options,
    facts: Facts,
    jobs: Sender<Job>,
    requests: AtomicU64,
    started: u64,
}

impl Service {
    /// A service of a model behind a queue.
    pub fn new(options: Options, facts: Facts, jobs: Sender<Job>) -> Self {
        Self { options, facts, jobs, requests: AtomicU64::new(0), started: now() }
    }

    /// What does not change about the model.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The paths.
pub fn router(service: Arc<Service>) -> Router {
    let limit = DefaultBodyLimit::max(service.options.limits.body_bytes);
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/tokenizer_info", get(tokens::info))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(|| async { refuse(Refusal { status: 404, message: "there is nothing at this path".into() }) })
        .method_not_allowed_fallback(|| async {
            refuse(Refusal { status: 405, message: "this path takes another method".into() })
        })
        .layer(limit)
        .layer(from_fn_with_state(service.clone(), authorize))
        .with_state(service)
}

/// The body of a request, if it is not too long.
pub(super) fn read(service: &Service, body: Result<Bytes, BytesRejection>) -> Result<Bytes, Refusal> {
    body.map_err(|rejection| {
        let (status, message) = (rejection.status().as_u16(), rejection.body_text());
        let most = service.options.limits.body_bytes;
        Refusal { status, message: format!("{message} (this server takes {most} bytes)") }
    })
}

pub(super) fn refuse(refusal: Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, Json(refusal.body())).into_response();
    if status == StatusCode::TOO_MANY_REQUESTS {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

async fn authorize(State(service): State<Arc<Service>>, request: HttpRequest, next: Next) -> Response {
    if let Some(wanted) = &service.options.token {
        let given = request.headers().get(header::AUTHORIZATION).map(|v| v.as_bytes()).unwrap_or_default();
        let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
        if !equal(given, wanted.as_bytes()) {
            let message = "the header `Authorization: Bearer …` is missing or wrong".into();
            return refuse(Refusal { status: 401, message });
        }
    }
    next.run(request).await
}

/// Compares in a time that does not tell where the two differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

fn about(service: &Service) -> Value {
    let limit = service.facts.limit;
    json!({ "id": service.options.name, "object": "model", "created": service.started, "owned_by": "dataflow",
        "max_model_len": limit })
}

async fn models(State(service): State<Arc<Service>>) -> Response {
    Json(json!({ "object": "list", "data": [about(&service)] })).into_response()
}

async fn model(
    State(service): State<Arc<Service>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Response {
    match name == service.options.name {
        true => Json(about(&service)).into_response(),
        false => refuse(Refusal { status: 404, message: format!("there is no model `{name}`") }),
    }
}

async fn completions(State(service): State<Arc<Service>>, body: Result<Bytes, BytesRejection>) -> Response {
    let body = match read(&service, body) {
        Ok(body) => body,
        Err(refusal) => return refuse(refusal),
    };
    // a long prompt takes a moment to parse and encode; others need not wait for that
    let parsing = service.clone();
    let wanted = tokio::task::spawn_blocking(move || {
        let request = Request::parse(&body)?;
        request.check(&parsing.options.name, &parsing.facts, &parsing.options.limits)
    });
    let wanted = match wanted.await {
        Ok(wanted) => wanted,
        Err(_) => Err(Refusal { status: 500, message: "the request could not be read".into() }),
    };
    let started = wanted.and_then(|wanted| Answer::start(&service, wanted));
    match started {
        Ok(answer) if answer.stream => answer.events().into_response(),
        Ok(answer) => answer.whole().await,
        Err(refusal) => refuse(refusal),
    }
}

/// A request that is being answered.
struct Answer {
    service: Arc<Service>,
    id: String,
    created: u64,
    stream: bool,
    logprobs: bool,
    prompt_tokens: usize,
    choices: Vec<Choice>,
    events: UnboundedReceiver<(usize, Event)>,
}

#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<Token>,
    /// Characters of the tokens that went out.
    offset: usize,
    reason: Option<&'static str>,
    generated: usize,
}

impl Answer {
    /// Hands a request's sequences to the model; all of them or none.
    fn start(service: &Arc<Service>, wanted: Wanted) -> Result<Self, Refusal> {
        let number = service.requests.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = unbounded_channel();
        let choices = wanted.prompts.len() * wanted.answers;
        let room = service.jobs.capacity().unwrap_or(usize::MAX).saturating_sub(service.jobs.len());
        // more than the queue ever holds can only be taken while it is empty and the model is quick
        let busy = || Refusal { status: 429, message: "too many requests are waiting: try again later".into() };
        if choices > room {
            return Err(busy());
        }
        let seed = wanted.seed.unwrap_or_else(|| now() ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let prompt_tokens = wanted.prompts.iter().map(Vec::len).sum();
        for (index, prompt) in wanted.prompts.iter().flat_map(|p| std::iter::repeat_n(p, wanted.answers)).enumerate() {
            let job = Job {
                index,
                prompt: prompt.clone(),
                max_tokens: wanted.max_tokens,
                sampling: wanted.sampling,
                seed,
                stops: wanted.stops.clone(),
                logprobs: wanted.logprobs,
                echo: wanted.echo,
                events: sender.clone(),
            };
            match service.jobs.try_send(job) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => return Err(busy()),
                Err(TrySendError::Disconnected(_)) => {
                    return Err(Refusal { status: 503, message: "the model is not running any more".into() });
                }
            }
        }
        Ok(Self {
            service: service.clone(),
            id: format!("cmpl-{:x}-{number}", service.started),
            created: now(),
            stream: wanted.stream,
            logprobs: wanted.logprobs.is_some(),
            prompt_tokens,
            choices: (0..choices).map(|_| Choice::default()).collect(),
            events,
        })
    }

    fn body(&self, choices: Vec<Value>) -> Value {
        json!({ "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.service.options.name, "choices": choices })
    }

    fn usage(&self) -> Value {
        let generated: usize = self.choices.iter().map(|c| c.generated).sum();
        json!({ "prompt_tokens": self.prompt_tokens, "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated })
    }

    fn choice(&mut self, index: usize, text: &str, tokens: &[Token]) -> Value {
        let choice = &mut self.choices[index];
        let logprobs = self.logprobs.then(|| logprobs(tokens, &self.service.facts, &mut choice.offset));
        json!({ "text": text, "index": index, "logprobs": logprobs, "finish_reason": choice.reason })
    }

    /// The answer in one piece.
    async fn whole(mut self) -> Response {
        while self.choices.iter().any(|c| c.reason.is_none()) {
            match self.events.recv().await {
                Some((index, Event::Piece { text, tokens })) => {
                    self.choices[index].text.push_str(&text);
                    self.choices[index].tokens.extend(tokens);
                }
                Some((index, Event::Done { reason, generated })) => {
                    self.choices[index].reason = Some(reason);
                    self.choices[index].generated = generated;
                }
                Some((_, Event::Failed(message))) => return refuse(Refusal { status: 500, message }),
                None => {
                    let message = "the model is not running any more".into();
                    return refuse(Refusal { status: 503, message });
                }
            }
        }
        let choices = (0..self.choices.len()).map(|index| {
            let Choice { text, tokens, .. } = &mut self.choices[index];
            let (text, tokens) = (std::mem::take(text), std::mem::take(tokens));
            self.choice(index, &text, &tokens)
        });
        let choices = choices.collect();
        let mut body = self.body(choices);
        body["usage"] = self.usage();
        Json(body).into_response()
    }

    /// The answer as it is made: server-sent events, of which the last is `[DONE]`.
    fn events(self) -> Sse<impl stream::Stream<Item = Result<SseEvent, Infallible>>> {
        Sse::new(stream::unfold(Some(self), |answer| async move {
            let mut answer = answer?;
            if answer.choices.iter().all(|c| c.reason.is_some()) {
                return Some((Ok(SseEvent::default().data("[DONE]")), None));
            }
            let body = match answer.events.recv().await {
                Some((index, Event::Piece { text, tokens })) => {
                    let choice = answer.choice(index, &text, &tokens);
                    answer.body(vec![choice])
                }
                Some((index, Event::Done { reason, generated })) => {
                    answer.choices[index].reason = Some(reason);
                    answer.choices[index].generated = generated;
                    let choice = answer.choice(index, "", &[]);
                    let mut body = answer.body(vec![choice]);
                    if answer.choices.iter().all(|c| c.reason.is_some()) {
                        body["usage"] = answer.usage();
                    }
                    body
                }
                failed => {
                    let message = match failed {
                        Some((_, Event::Failed(message))) => message,
                        _ => "the model is not running any more".into(),
                    };
                    let body = Refusal { status: 500, message }.body();
                    return Some((Ok(SseEvent::default().data(body.to_string())), None));
                }
            };
            Some((Ok(SseEvent::default().data(body.to_string())), Some(answer)))
        }))
    }
}
