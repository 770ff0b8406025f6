//! The server under load and under attack, with a small model of random weights.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dataflow::App;
use dataflow::data::Tokenizer;
use dataflow::data::chars::Chars;
use dataflow::generate::pool::{Next, Pool, Setup};
use dataflow::generate::sampling::{best, log_sum_exp};
use dataflow::generate::vocabulary::Vocabulary;
use dataflow::graph::format::formula::Number;
use dataflow::graph::format::model::ModelFile;
use dataflow::graph::types::DType;
use dataflow::kernels::device::CpuDevice;
use dataflow::serve::{Limits, Options, Server};
use serde_json::{Value, json};

const SYMBOLS: &str = "\n abcdefghijklmnopqrstuvwxyz";

fn vocabulary() -> Vocabulary {
    Vocabulary::new(&Tokenizer::Chars { symbols: Chars::of(SYMBOLS) }).unwrap()
}

fn pool(name: &str, slots: usize) -> Pool {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("models/{name}.ron"));
    let model = Arc::new(ModelFile::read(&path).unwrap());
    let vocab = SYMBOLS.chars().count() as i64;
    let set = [("vocab", vocab), ("d_model", 32), ("n_layer", 2), ("n_head", 2), ("block", 64)];
    let set: BTreeMap<String, Number> = set.iter().map(|(n, v)| (n.to_string(), Number::Int(*v))).collect();
    let scope = model.config(&set).unwrap();
    let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
    let registry = App::new().into_registry();
    let mut pool =
        Pool::new(Setup { registry, device, model, scope, slots, capacity: 64, weights: DType::F32 }).unwrap();
    pool.parameters().initialize(3).unwrap();
    pool
}

fn serve(name: &str, slots: usize, queue: usize, token: Option<&str>) -> Server {
    let options = Options {
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        name: "small".into(),
        token: token.map(String::from),
        limits: Limits { queue, prompt_tokens: 1000, max_tokens: 500, choices: 8, body_bytes: 20_000 },
    };
    Server::start(options, pool(name, slots), Some(vocabulary())).unwrap()
}

/// Sends bytes, and returns status and body of what comes back.
fn exchange(address: SocketAddr, request: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8(answer).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    (head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0), body.to_string())
}

fn request(method: &str, path: &str, body: &str, more: &str) -> Vec<u8> {
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}Content-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

fn ask(address: SocketAddr, body: &Value) -> (u16, Value) {
    let (status, text) = exchange(address, &request("POST", "/v1/completions", &body.to_string(), ""));
    (status, serde_json::from_str(&text).unwrap_or(Value::Null))
}

/// The text of a streamed answer.
fn streamed(address: SocketAddr, body: &Value) -> (u16, String) {
    let (status, text) = exchange(address, &request("POST", "/v1/completions", &body.to_string(), ""));
    if status != 200 {
        return (status, String::new());
    }
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(events.last(), Some(&"[DONE]"), "{text}");
    let mut all = String::new();
    let mut reasons = 0;
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event).unwrap();
        all += event["choices"][0]["text"].as_str().unwrap();
        reasons += usize::from(!event["choices"][0]["finish_reason"].is_null());
    }
    assert_eq!(reasons, 1);
    (status, all)
}

/// What the model says offline.
fn greedy(pool: &mut Pool, prompt: &str, tokens: usize) -> String {
    let vocabulary = vocabulary();
    let prompt = vocabulary.encode(prompt).unwrap();
    pool.prefill(0, 0, &prompt[..prompt.len() - 1]).unwrap();
    let (mut token, mut text) = (prompt[prompt.len() - 1], String::new());
    for i in 0..tokens {
        let next = Next { slot: 0, position: prompt.len() - 1 + i, token };
        token = best(&pool.step(&[next]).unwrap()[..vocabulary.len()]);
        text += std::str::from_utf8(&vocabulary.bytes(token).unwrap()).unwrap();
    }
    text
}

fn prompt(i: usize) -> String {
    let symbols: Vec<char> = SYMBOLS.chars().collect();
    (0..3 + i % 23).map(|k| symbols[(i * 7 + k * k + 3 * k) % symbols.len()]).collect()
}

/// Seconds of the load; the environment variable makes it longer.
fn seconds() -> f64 {
    std::env::var("SERVE_LOAD_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2.0)
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[test]
fn sixty_four_streams_at_once_get_their_own_answers() {
    let mut offline = pool("longhorn", 1);
    let wanted: Vec<(String, usize, String)> = (0..64)
        .map(|i| {
            let (prompt, tokens) = (prompt(i), 5 + i % 17);
            let text = greedy(&mut offline, &prompt, tokens);
            (prompt, tokens, text)
        })
        .collect();
    let server = serve("longhorn", 16, 32, None);
    let address = server.address();
    let end = Instant::now() + Duration::from_secs_f64(seconds());
    let run = |i: usize| {
        let (prompt, tokens, text) = &wanted[i];
        let body = json!({ "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": true });
        let (mut answered, mut refused) = (0, 0);
        while answered == 0 || Instant::now() < end {
            match streamed(address, &body) {
                (200, found) => {
                    assert_eq!(&found, text, "client {i}");
                    answered += 1;
                }
                (429, _) => {
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(5));
                }
                (status, _) => panic!("client {i}: {status}"),
            }
        }
        (answered, refused)
    };
    let before = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..64).map(|i| scope.spawn(move || run(i))).collect();
        std::thread::sleep(Duration::from_secs_f64(seconds() / 4.0));
        let before = resident();
        let counts: Vec<(usize, usize)> = clients.into_iter().map(|c| c.join().unwrap()).collect();
        let sum = |of: fn(&(usize, usize)) -> usize| counts.iter().map(of).sum::<usize>();
        println!("{} answers, {} times 429", sum(|c| c.0), sum(|c| c.1));
        before
    });
    let after = resident();
    println!("resident memory: {before} kB after a quarter of the time, {after} kB at the end");
    assert!(after < before + 50_000, "{before} {after}");
}

#[test]
fn whatever_is_sent_the_server_keeps_serving() {
    let server = serve("llama", 2, 4, None);
    let address = server.address();
    let fine = || {
        let (status, body) = ask(address, &json!({ "prompt": "abc", "max_tokens": 2, "temperature": 0 }));
        assert_eq!((status, body["usage"]["completion_tokens"].as_u64()), (200, Some(2)), "{body}");
    };
    fine();
    for (body, status, words) in [
        ("", 400, "JSON"),
        ("{", 400, "JSON"),
        ("[]", 400, "JSON"),
        ("{\"prompt\": 3}", 400, "Prompt"),
        ("{\"prompt\": \"\"}", 400, "empty"),
        ("{\"prompt\": \"ABC\"}", 400, "'A'"),
        ("{\"prompt\": [1, 99]}", 400, "token 99"),
        ("{\"prompt\": [1, -1]}", 400, "Prompt"),
        ("{\"prompt\": [1e30]}", 400, "Prompt"),
        ("{\"prompt\": \"a\", \"max_tokens\": 501}", 400, "allows 500"),
        ("{\"prompt\": \"a\", \"max_tokens\": 100}", 400, "context of 64 tokens"),
        ("{\"prompt\": \"a\", \"max_tokens\": -1}", 400, "JSON"),
        ("{\"prompt\": \"a\", \"temperature\": -1}", 400, "temperature"),
        ("{\"prompt\": \"a\", \"top_p\": 2}", 400, "top_p"),
        ("{\"prompt\": \"a\", \"logprobs\": 1000}", 400, "logprobs"),
        ("{\"prompt\": \"a\", \"n\": 9}", 400, "9 answers"),
        ("{\"prompt\": \"a\", \"best_of\": 3}", 400, "best_of"),
        ("{\"prompt\": \"a\", \"model\": \"gpt-4\"}", 404, "gpt-4"),
    ] {
        let (found, answer) = exchange(address, &request("POST", "/v1/completions", body, ""));
        assert_eq!(found, status, "{body}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{body}: {answer}");
    }
    let huge = json!({ "prompt": "a".repeat(15_000) }).to_string();
    assert_eq!(exchange(address, &request("POST", "/v1/completions", &huge, "")).0, 400);
    let larger = json!({ "prompt": "a".repeat(30_000) }).to_string();
    assert_eq!(exchange(address, &request("POST", "/v1/completions", &larger, "")).0, 413);
    assert_eq!(exchange(address, &request("GET", "/v1/completions", "", "")).0, 405);
    assert_eq!(exchange(address, &request("GET", "/etc/passwd", "", "")).0, 404);
    assert_eq!(exchange(address, b"nonsense\r\n\r\n").0, 400);
    // clients that are gone before, and in the middle
    for cut in [10, 60, 200, 1000] {
        let body = json!({ "prompt": "abc", "max_tokens": 60, "stream": true }).to_string();
        let whole = request("POST", "/v1/completions", &body, "");
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&whole[..cut.min(whole.len())]).unwrap();
        if cut > whole.len() {
            let _ = stream.read(&mut [0; 20]);
        }
        drop(stream);
        fine();
    }
}

#[test]
fn answers_have_what_was_asked_for() {
    let server = serve("llama", 4, 8, Some("secret"));
    let address = server.address();
    let get = |path: &str, more: &str| exchange(address, &request("GET", path, "", more));
    assert_eq!(get("/v1/models", "").0, 401);
    assert_eq!(get("/v1/models", "Authorization: Bearer secreT\r\n").0, 401);
    let token = "Authorization: Bearer secret\r\n";
    let (status, models) = get("/v1/models", token);
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!((status, models["data"][0]["id"].as_str()), (200, Some("small")));
    assert_eq!((get("/v1/models/small", token).0, get("/v1/models/large", token).0), (200, 404));
    let ask = |body: Value| -> Value {
        let (status, text) = exchange(address, &request("POST", "/v1/completions", &body.to_string(), token));
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    };

    // log-likelihoods, as lm-eval asks for them
    let text = "hello world";
    let answer = ask(json!({ "prompt": text, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 2 }));
    let choice = &answer["choices"][0];
    let mut offline = pool("llama", 1);
    let tokens = vocabulary().encode(text).unwrap();
    let mut wanted = Vec::new();
    let mut at = 0;
    offline
        .score(0, 0, &tokens, |logits| {
            at += 1;
            if let Some(next) = tokens.get(at) {
                wanted.push(f64::from(logits[*next as usize]) - log_sum_exp(logits));
            }
        })
        .unwrap();
    let found = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!((found.len(), found[0].is_null()), (text.len() + 1, true));
    for (found, wanted) in found[1..text.len()].iter().zip(&wanted) {
        assert!((found.as_f64().unwrap() - wanted).abs() < 1e-4);
    }
    assert!(choice["text"].as_str().unwrap().starts_with(text));
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap()[4], "o");
    assert_eq!(choice["logprobs"]["text_offset"].as_array().unwrap()[4], 4);
    assert_eq!(choice["logprobs"]["top_logprobs"][3].as_object().unwrap().len(), 2);
    let none = ask(json!({ "prompt": text, "max_tokens": 0, "echo": true, "logprobs": 1 }));
    assert_eq!(none["choices"][0]["text"], text);
    assert_eq!(none["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), text.len());

    // the tokenizer, for clients that have none
    let post = |path: &str, body: Value| -> (u16, Value) {
        let (status, text) = exchange(address, &request("POST", path, &body.to_string(), token));
        (status, serde_json::from_str(&text).unwrap())
    };
    let (status, made) = post("/tokenize", json!({ "prompt": text, "add_special_tokens": false }));
    assert_eq!((status, &made["tokens"], &made["count"]), (200, &json!(tokens), &json!(tokens.len())));
    assert_eq!(post("/detokenize", json!({ "tokens": tokens })), (200, json!({ "prompt": text })));
    let (status, info) = get("/tokenizer_info", token);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!((status, &info["eos_token"], &info["vocab_size"]), (200, &Value::Null, &json!(28)));
    assert_eq!(post("/tokenize", json!({ "prompt": "ABC" })).0, 400);
    assert_eq!(post("/detokenize", json!({ "tokens": [99] })).0, 400);
    assert_eq!(exchange(address, &request("POST", "/tokenize", "{}", "")).0, 401);

    // token ids, several prompts and answers, stop texts, seeds
    let ids = ask(json!({ "prompt": tokens, "max_tokens": 8, "temperature": 0 }));
    let plain = ask(json!({ "prompt": text, "max_tokens": 8, "temperature": 0 }));
    assert_eq!(ids["choices"], plain["choices"]);
    let offline_text = greedy(&mut offline, text, 8);
    assert_eq!(plain["choices"][0]["text"], offline_text);
    assert_eq!(plain["choices"][0]["finish_reason"], "length");
    let stop: String = offline_text.chars().skip(2).take(2).collect();
    let stopped = ask(json!({ "prompt": text, "max_tokens": 8, "temperature": 0, "stop": [stop] }));
    assert_eq!(stopped["choices"][0]["text"], offline_text[..offline_text.find(&stop).unwrap()]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let many = || ask(json!({ "prompt": ["abc", "xyz"], "n": 2, "max_tokens": 9, "seed": 5 }))["choices"].clone();
    let first = many();
    assert_eq!(first.as_array().unwrap().len(), 4);
    assert_eq!(first, many());
    assert_ne!(first[0]["text"], first[1]["text"]);
}
