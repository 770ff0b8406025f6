//! `sample`, `eval` and `serve` on what a run left.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Folder, TINY, repository};

/// A folder with a run of a small model of a file of the repository, named `run`.
fn trained(model: &str) -> Folder {
    let folder = Folder::with_pipeline();
    let file = format!("model.file={}", repository(&format!("models/{model}.ron")));
    let mut arguments = vec!["run", "pipe.ron", "--out", "run", "--set", &file];
    for setting in ["model.config.d_model=32", "model.config.n_layer=2", "model.config.n_head=2", "train.steps=20"] {
        arguments.extend(["--set", setting]);
    }
    folder.succeeds(&arguments);
    folder
}

fn json(folder: &Folder, arguments: &[&str]) -> Value {
    serde_json::from_str(&folder.succeeds(arguments)).unwrap()
}

/// A character of the text that the model was trained on.
fn prompt(folder: &Folder) -> String {
    folder.read("text.txt").chars().take(5).collect()
}

#[test]
fn samples_are_the_same_for_a_seed_and_go_on_from_the_prompt() {
    let folder = trained("longhorn");
    let start = prompt(&folder);
    let sample = |more: &[&str]| {
        let mut arguments = vec!["sample", "run", "--prompt", &start, "--tokens", "40"];
        arguments.extend(more);
        folder.succeeds(&arguments)
    };
    let text = sample(&[]);
    assert!(text.starts_with(&start) && text.trim_end_matches('\n').chars().count() >= 40, "{text}");
    assert_eq!(text, sample(&[]));
    assert_ne!(text, sample(&["--seed", "2"]));
    let greedy = sample(&["--temperature", "0"]);
    assert_eq!(greedy, sample(&["--top-k", "1", "--seed", "9"]));
    assert_eq!(greedy, sample(&["--top-p", "0.000001"]));
    // the same from a file, from standard input, and from the weights alone
    folder.write("prompt.txt", &start);
    let from_file = ["sample", "run", "--prompt-file", "prompt.txt", "--tokens", "40", "--temperature", "0"];
    assert_eq!(folder.succeeds(&from_file), greedy);
    let from_weights = ["sample", "run/last.safetensors", "--prompt", &start, "--tokens", "40", "--temperature", "0"];
    assert!(folder.succeeds(&from_weights).starts_with(&start));
    let mut child = Command::new(env!("CARGO_BIN_EXE_dataflow"))
        .args(["sample", "run", "--prompt-file", "-", "--tokens", "40", "--temperature", "0"])
        .current_dir(folder.0.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(start.as_bytes()).unwrap();
    assert_eq!(String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap(), greedy);
    // several at once: the first is the one of the seed
    let many = json(&folder, &["sample", "run", "--prompt", &start, "--tokens", "40", "--samples", "3", "--json"]);
    let texts = many["texts"].as_array().unwrap();
    assert_eq!(texts.len(), 3);
    assert_eq!(format!("{start}{}\n", texts[0].as_str().unwrap()), text);
    assert!(texts[1] != texts[0] && many["tokens_per_s"].as_f64().unwrap() > 0.0);
    // stops
    let whole = greedy.trim_end_matches('\n')[start.len()..].to_string();
    let stop: String = whole.chars().skip(3).take(2).collect();
    let stopped = json(
        &folder,
        &["sample", "run", "--prompt", &start, "--tokens", "40", "--temperature", "0", "--stop", &stop, "--json"],
    );
    assert_eq!(stopped["text"].as_str().unwrap(), &whole[..whole.find(&stop).unwrap()]);
}

#[test]
fn what_cannot_be_sampled_is_said_in_words() {
    let folder = trained("rwkv");
    let message = folder.fails(&["sample", "run", "--prompt", "\u{1f600}"]);
    assert!(message.contains("the prompt: the character"), "{message}");
    let message = folder.fails(&["sample", "run", "--tokens", "100000", "--prompt", &prompt(&folder)]);
    assert!(message.contains("learned positions") && message.contains("--tokens"), "{message}");
    assert!(folder.fails(&["sample", "nothing"]).contains("nothing"));
    assert!(folder.fails(&["sample", "run", "--prompt", ""]).contains("empty"));
    assert!(folder.fails(&["sample", "run", "--top-p", "0"]).contains("top_p"));
    assert!(folder.fails(&["sample", "run", "--prompt-tokens", "100000", "--tokens", "2"]).contains("100000"));
}

#[test]
fn evaluation_at_longer_contexts_is_a_table_and_a_figure() {
    let folder = trained("longhorn");
    let result = json(&folder, &["eval", "run", "--block", "1x,2x", "--json"]);
    let rows = result["blocks"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    let (first, second) = (rows[0]["block"].as_u64().unwrap(), rows[1]["block"].as_u64().unwrap());
    assert_eq!(second, 2 * first);
    for row in rows {
        let (loss, perplexity) = (row["loss"].as_f64().unwrap(), row["perplexity"].as_f64().unwrap());
        assert!((loss.exp() - perplexity).abs() < 1e-6 * perplexity && loss > 0.0);
    }
    assert!(folder.read("run/extrapolation.svg").contains("perplexity"));
    let table = folder.succeeds(&["eval", "run", "--block", "1x", "--block", "1000000"]);
    assert!(table.contains("perplexity") && table.contains("tokens to predict"), "{table}");
    // learned positions say where they end
    let folder = trained("rwkv");
    let table = folder.succeeds(&["eval", "run", "--block", "1x,2x"]);
    assert!(table.contains("learned positions"), "{table}");
    // the same text, given as a file, as the server would be asked about it
    folder.write("own.txt", folder.read("text.txt").chars().take(30).collect::<String>());
    let own = json(&folder, &["eval", "run", "--text", "own.txt", "--block", "8", "--json"]);
    assert!(own["loss"].as_f64().unwrap() > 0.0 && own["blocks"][0]["tokens"] == 24);
}

#[test]
fn a_signal_lets_the_server_finish_its_answers() {
    let folder = trained("longhorn");
    for (signal, tokens) in [("TERM", 4000), ("INT", 4000)] {
        let mut server = folder.start(&["serve", "run", "--port", "0"]);
        let out = server.out.clone();
        let address = move || {
            let text = fs::read_to_string(&out).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("listening at http://"))?;
            Some(line.trim_end_matches("/v1").to_string())
        };
        server.wait_for(|| address().is_some());
        let mut stream = TcpStream::connect(address().unwrap()).unwrap();
        let body = format!(r#"{{"prompt": "to be", "max_tokens": {tokens}, "stream": true, "seed": 1}}"#);
        let head = format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = vec![0; 16];
        stream.read_exact(&mut answer).unwrap();
        server.signal(signal);
        server.wait_for(|| fs::read_to_string(folder.path("started.err")).unwrap().contains("stopping"));
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("data: [DONE]"), "{answer}");
        assert!(answer.contains(&format!(r#""completion_tokens":{tokens}"#)));
        let ran = server.wait();
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        assert!(ran.out.contains("stopped: every answer"), "{}", ran.out);
    }
}

const WORDS: [&str; 12] = ["<unk>", "</s>", "a", "to", "be", "or", "not", ",", "that", "is", "the", "question"];

#[test]
fn a_tokenizer_file_goes_with_the_run() {
    let folder = Folder::new();
    let vocabulary: Vec<String> = WORDS.iter().enumerate().map(|(i, word)| format!("{word:?}: {i}")).collect();
    let tokenizer = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {{"type": "Whitespace"}}, "post_processor": null, "decoder": null,
            "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "<unk>"}}}}"#,
        vocabulary.join(", ")
    );
    folder.write("words.json", &tokenizer);
    let line = |i: usize| format!("{{\"text\": \"{i} to be, or not to be, that is the question\"}}\n");
    folder.write("corpus.jsonl", (0..100).map(line).collect::<String>());
    folder.write("tiny.ron", TINY);
    folder.write(
        "pipe.ron",
        r#"Pipeline(about: "words", seed: 7, stages: [
        ("documents", Documents(from: ["corpus.jsonl"]), []),
        ("tokens", Tokenize(folder: "data", tokenizer: Json(file: "words.json"), validation: 0.2), ["documents"]),
        ("batches", Windows(batch: 2, block: 16), ["tokens"]),
        ("model", Model(file: "tiny.ron"), ["batches"]),
        ("loss", CrossEntropy, ["model", "batches"]),
        ("optimizer", AdamW(lr: Constant(1e-2)), ["loss"]),
        ("train", Train(steps: 5), ["optimizer"]),
        ("last", Checkpoint(keep: Last), ["train"]),
    ])"#,
    );
    folder.succeeds(&["run", "pipe.ron", "--out", "run"]);
    // the run is all that is needed
    fs::remove_dir_all(folder.path("data")).unwrap();
    fs::remove_file(folder.path("words.json")).unwrap();
    fs::rename(folder.path("run"), folder.path("moved")).unwrap();
    let arguments = ["sample", "moved", "--prompt", "to be", "--tokens", "6", "--json"];
    let text = json(&folder, &arguments)["text"].as_str().unwrap().to_string();
    let words: Vec<&str> = text.split(' ').collect();
    assert!(words.len() == 7 && words[0].is_empty(), "{text:?}");
    assert!(words[1..].iter().all(|word| WORDS.contains(word)), "{text:?}");
    assert!(
        folder.succeeds(&["sample", "moved/last.safetensors", "--prompt", "to be", "--tokens", "2"]).contains("to be ")
    );
    // another file in its place, and none
    folder.write("moved/tokenizer.json", tokenizer.replace("question", "answer"));
    let message = folder.fails(&arguments);
    assert!(message.contains("is not the file that made the tokens"), "{message}");
    fs::remove_file(folder.path("moved/tokenizer.json")).unwrap();
    let message = folder.fails(&arguments);
    assert!(message.contains("tokenizer.json is missing") && message.contains("--prompt-tokens"), "{message}");
    let numbers = folder.dataflow(&["sample", "moved", "--prompt-tokens", "3,4", "--tokens", "3"]);
    assert_eq!((numbers.code, numbers.out.split_whitespace().count()), (Some(0), 5), "{}", numbers.err);
}
