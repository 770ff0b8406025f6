use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::documents::tests::{DOCUMENTS, every_format, json_line};
use super::*;

fn recipe(source: &Path) -> Recipe {
    Recipe {
        sources: vec![source.display().to_string()],
        documents: Format { field: "text".into(), members: None, separator: None },
        tokenizer: Choice::Gpt2,
        tokenizer_sha256: None,
        validation: 0.5,
        seed: 1,
        files: Files::Raw,
    }
}

/// Many documents of all lengths, in a file of JSON lines.
fn many(folder: &Path, documents: usize) -> PathBuf {
    let path = folder.join("many.jsonl");
    let line = |i: usize| json_line(&format!("Document {i}: {}\n", "some words, é and 日本  ".repeat(i * i % 97)));
    fs::write(&path, (0..documents).map(line).collect::<String>()).unwrap();
    path
}

fn tokens(file: &TokenFile) -> Vec<i32> {
    let mut tokens = vec![0; file.len()];
    file.read(0, &mut tokens).unwrap();
    tokens
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

fn both(folder: &Path) -> [Vec<u8>; 2] {
    [TRAIN, VALIDATION].map(|name| fs::read(folder.join(name)).unwrap())
}

#[test]
fn the_same_tokens_from_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let gpt2 = Choice::Gpt2.open().unwrap().unwrap();
    let mut expected: Option<[Vec<u8>; 2]> = None;
    let formats = every_format(folder.path());
    assert!(formats.len() >= 16, "{}", formats.len());
    for (number, (source, separator)) in formats.into_iter().enumerate() {
        let out = folder.path().join(format!("out-{number}"));
        let mut recipe = recipe(&source);
        recipe.documents.separator = separator;
        let splits = prepare(&recipe, &out, folder.path(), 2).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        let found = both(&out);
        let what = source.display();
        assert_eq!(&found, expected.get_or_insert_with(|| found.clone()), "{what}");
        assert_eq!(names(&out), ["train.bin", "train.json", "val.bin", "val.json"], "{what}");
        // and they are the documents, each with its end
        let mut all = [tokens(&splits.train), tokens(&splits.validation)].concat();
        let mut wanted = Vec::new();
        for document in DOCUMENTS {
            gpt2.encoder().encode(document.as_bytes(), &mut wanted).unwrap();
            wanted.push(50256);
        }
        assert_eq!(all.len(), wanted.len(), "{what}");
        all.sort_unstable();
        wanted.sort_unstable();
        assert!(all.iter().zip(&wanted).all(|(a, b)| *a == *b as i32), "{what}");
        let preparation = splits.train.description().preparation.clone().unwrap();
        assert!(!preparation.files.is_empty(), "{what}");
        for record in &preparation.files {
            let bytes = fs::read(&record.name).unwrap();
            assert_eq!(record.bytes, bytes.len() as u64);
            assert_eq!(record.sha256, hexadecimal(&Sha256::digest(&bytes)), "{}", record.name);
        }
    }
}

#[test]
fn neither_threads_nor_order_matter() {
    let folder = tempfile::tempdir().unwrap();
    let path = many(folder.path(), 3000);
    let recipe = Recipe { validation: 0.1, ..recipe(&path) };
    let one = prepare(&recipe, &folder.path().join("one"), folder.path(), 1).unwrap();
    let five = prepare(&recipe, &folder.path().join("five"), folder.path(), 5).unwrap();
    assert_eq!(both(&folder.path().join("one")), both(&folder.path().join("five")));
    let held_out = one.validation.description().preparation.as_ref().unwrap().documents;
    assert!((200..400).contains(&held_out), "{held_out} of 3000");
    assert_eq!(five.train.description().preparation.as_ref().unwrap().documents, 3000 - held_out);
    // the lines the other way round: the same documents are held out
    let text = fs::read_to_string(&path).unwrap();
    let backwards = folder.path().join("backwards.jsonl");
    fs::write(&backwards, text.lines().rev().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let recipe = Recipe { sources: vec![backwards.display().to_string()], ..recipe };
    let other = prepare(&recipe, &folder.path().join("other"), folder.path(), 2).unwrap();
    let sorted = |file: &TokenFile| {
        let tokens = tokens(file);
        let mut documents: Vec<Vec<i32>> = tokens.split(|&token| token == 50256).map(<[i32]>::to_vec).collect();
        documents.sort();
        documents
    };
    assert_eq!(sorted(&one.validation), sorted(&other.validation));
    assert_eq!(sorted(&one.train), sorted(&other.train));
    // another seed holds out others
    let recipe = Recipe { seed: 2, ..recipe };
    let seed = prepare(&recipe, &folder.path().join("seed"), folder.path(), 2).unwrap();
    assert_ne!(sorted(&seed.validation), sorted(&other.validation));
}

#[test]
fn a_long_document_is_read_in_parts() {
    let folder = tempfile::tempdir().unwrap();
    let sentence = "It's a long document, isn't it?  1234 éé\n\n日本語\t'll ";
    let text = sentence.repeat(9_500_000 / sentence.len());
    fs::write(folder.path().join("a.txt"), &text).unwrap();
    // no place to cut it at
    fs::write(folder.path().join("b.txt"), "x".repeat(5 << 20)).unwrap();
    fs::write(folder.path().join("c.txt"), "short").unwrap();
    let mut wanted = Vec::new();
    Choice::Gpt2.open().unwrap().unwrap().encoder().encode(text.as_bytes(), &mut wanted).unwrap();
    wanted.push(50256);
    let splits = prepare(&recipe(folder.path()), &folder.path().join("out"), folder.path(), 2).unwrap();
    let found = [tokens(&splits.train), tokens(&splits.validation)]
        .into_iter()
        .find(|tokens| tokens.windows(4).any(|w| w.iter().zip(&wanted).all(|(a, b)| *a == *b as i32)))
        .unwrap();
    let start = found.windows(4).position(|w| w.iter().zip(&wanted).all(|(a, b)| *a == *b as i32)).unwrap();
    assert!(found[start..].iter().zip(&wanted).all(|(a, b)| *a == *b as i32));
}

#[test]
fn every_tokenizer_and_kind_of_file() {
    let folder = tempfile::tempdir().unwrap();
    let (source, separator) = every_format(folder.path()).remove(0);
    let mut recipe = recipe(&source);
    recipe.documents.separator = separator;
    let run = |recipe: &Recipe, name: &str| prepare(recipe, &folder.path().join(name), folder.path(), 2).unwrap();

    let bytes = run(&Recipe { tokenizer: Choice::Bytes, ..recipe.clone() }, "bytes");
    assert_eq!((bytes.train.vocabulary(), bytes.train.description().layout), (257, Layout::U16));
    let length: usize = DOCUMENTS.iter().map(|document| document.len() + 1).sum();
    assert_eq!(bytes.train.len() + bytes.validation.len(), length);

    let chars = run(&Recipe { tokenizer: Choice::Chars, ..recipe.clone() }, "chars");
    let symbols = Chars::of(&DOCUMENTS.concat());
    assert_eq!(chars.train.vocabulary(), symbols.vocabulary() + 1);
    assert_eq!(chars.train.description().tokenizer, Tokenizer::Chars { symbols: symbols.clone() });
    let all = [tokens(&chars.train), tokens(&chars.validation)].concat();
    let text = Characters::new(symbols).decode(&all.iter().map(|&token| token as u32).collect::<Vec<_>>());
    assert_eq!(text.len(), DOCUMENTS.concat().len());

    let llm_c = run(&Recipe { files: Files::LlmC, ..recipe.clone() }, "llm.c");
    let raw = run(&recipe, "raw");
    assert_eq!(tokens(&llm_c.train), tokens(&raw.train));
    let file = fs::read(llm_c.train.path()).unwrap();
    assert_eq!(file[..4], 20_240_520_u32.to_le_bytes());
    assert_eq!(file[8..12], (raw.train.len() as u32).to_le_bytes());
    assert_eq!(file[1024..], fs::read(raw.train.path()).unwrap());
}

/// A word-level tokenizer with a vocabulary that needs four bytes.
fn tokenizer_json(folder: &Path, end: &str) -> PathBuf {
    let path = folder.join("tokenizer.json");
    let vocabulary = format!(r#"{{"<unk>": 0, "Hello": 7, "world": 70000, "{end}": 99999}}"#);
    let text = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {{"type": "Whitespace"}}, "post_processor": null, "decoder": null,
            "model": {{"type": "WordLevel", "vocab": {vocabulary}, "unk_token": "<unk>"}}}}"#
    );
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn a_tokenizer_file() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.txt"), "Hello world x").unwrap();
    fs::write(folder.path().join("b.txt"), "world").unwrap();
    let file = tokenizer_json(folder.path(), "</s>");
    let source = recipe(folder.path());
    let choice = |end: Option<&str>| Choice::Json { file: file.clone(), end_of_text: end.map(String::from) };
    let out = folder.path().join("out");
    let splits = prepare(&Recipe { tokenizer: choice(None), ..source.clone() }, &out, folder.path(), 2).unwrap();
    assert_eq!((splits.train.vocabulary(), splits.train.description().layout), (100_000, Layout::U32));
    let mut all = [tokens(&splits.train), tokens(&splits.validation)];
    all.sort();
    assert_eq!(all, [vec![7, 70_000, 0, 99_999], vec![70_000, 99_999]]);
    // a copy is kept for those who decode the tokens
    assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), fs::read(&file).unwrap());
    let Tokenizer::Json { sha256, .. } = &splits.train.description().tokenizer else { panic!() };
    assert_eq!(*sha256, hexadecimal(&Sha256::digest(fs::read(&file).unwrap())));

    let fails = |tokenizer: Choice| {
        let recipe = Recipe { tokenizer, ..source.clone() };
        prepare(&recipe, &folder.path().join("none"), folder.path(), 1).unwrap_err().to_string()
    };
    assert!(fails(choice(Some("<end>"))).contains("it has no token \"<end>\" to end a document with"));
    fs::write(&file, "{").unwrap();
    assert!(fails(choice(None)).contains("tokenizer.json is no tokenizer that this program can use: "));
    assert!(fails(Choice::Json { file: "no.json".into(), end_of_text: None }).contains("cannot read no.json"));
}

#[test]
fn files_that_are_there_are_used_if_they_fit() {
    let folder = tempfile::tempdir().unwrap();
    let path = many(folder.path(), 20);
    let out = folder.path().join("out");
    let recipe = recipe(&path);
    let run = |recipe: &Recipe| prepare(recipe, &out, folder.path(), 2).map_err(|error| error.to_string());
    run(&recipe).unwrap();
    let written = || fs::metadata(out.join(TRAIN)).unwrap().modified().unwrap();
    let first = written();
    run(&recipe).unwrap();
    assert_eq!(written(), first);
    let message = run(&Recipe { validation: 0.25, ..recipe.clone() }).unwrap_err();
    assert!(message.contains("`validation`: 0.5, and the pipeline says 0.25; delete them, or choose"), "{message}");
    let message = run(&Recipe { seed: 3, ..recipe.clone() }).unwrap_err();
    assert!(message.contains("`seed`: 1, and the pipeline says 3"), "{message}");
    // other documents of the same length are noticed too
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("Document 0", "document 0", 1)).unwrap();
    let message = run(&recipe).unwrap_err();
    assert!(message.contains("another ") && message.contains("many.jsonl"), "{message}");
    // the same again, only later
    fs::write(&path, &text).unwrap();
    run(&recipe).unwrap();
    fs::write(&path, format!("{text}{text}")).unwrap();
    assert!(run(&recipe).unwrap_err().contains("bytes, and now there is"));
    // documents that were taken away are not needed
    fs::remove_file(&path).unwrap();
    run(&recipe).unwrap();
    assert_eq!(written(), first);
    // files of another program are not touched
    fs::remove_file(out.join("train.json")).unwrap();
    assert!(run(&recipe).unwrap_err().contains("train.bin is there and no"));
    assert_eq!(written(), first);
}

#[test]
fn few_documents_are_split_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = many(folder.path(), 10);
    let recipe = Recipe { validation: 0.0005, ..recipe(&path) };
    let splits = prepare(&recipe, &folder.path().join("out"), folder.path(), 2).unwrap();
    let documents = |file: &Arc<TokenFile>| file.description().preparation.as_ref().unwrap().documents;
    assert_eq!((documents(&splits.train), documents(&splits.validation)), (9, 1));

    fs::write(&path, json_line("only one")).unwrap();
    let out = folder.path().join("none");
    let message = prepare(&recipe, &out, folder.path(), 2).unwrap_err().to_string();
    assert!(message.contains("the corpus has 1 documents, of which"), "{message}");
    assert_eq!(names(&out), [""; 0]);
    for validation in [0.0, 1.0, -1.0, f64::NAN] {
        let recipe = Recipe { validation, ..recipe.clone() };
        assert!(matches!(prepare(&recipe, &out, folder.path(), 2), Err(PrepareError::Fraction(_))));
    }
}

/// A file is damaged in the middle of the corpus; when it is repaired, the preparation goes on before it.
#[test]
fn goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus");
    fs::create_dir(&corpus).unwrap();
    let text = fs::read_to_string(many(folder.path(), 2000)).unwrap();
    for name in ["a", "b", "c"] {
        fs::write(corpus.join(format!("{name}.jsonl")), text.replace("Document", name)).unwrap();
    }
    let recipe = Recipe { validation: 0.1, ..recipe(&corpus) };
    let undisturbed = folder.path().join("undisturbed");
    prepare(&recipe, &undisturbed, folder.path(), 2).unwrap();
    let out = folder.path().join("out");
    let whole = fs::read_to_string(corpus.join("b.jsonl")).unwrap();
    let cut = whole.len() / 2;
    fs::write(
        corpus.join("b.jsonl"),
        format!("{}\n{{\"tex\": 1}}\n{}", &whole[..whole[..cut].rfind('\n').unwrap()], ""),
    )
    .unwrap();
    let message = prepare(&recipe, &out, folder.path(), 2).unwrap_err().to_string();
    assert!(
        message.contains("b.jsonl: line ") && message.contains("there is no field \"text\", but \"tex\""),
        "{message}"
    );
    assert_eq!(names(&out), [".preparation.json", ".preparation.lock", ".train.bin.part", ".val.bin.part"]);
    let note: State = serde_json::from_slice(&fs::read(out.join(".preparation.json")).unwrap()).unwrap();
    assert!(!note.files.is_empty(), "the first file is not read again");
    assert!(note.counts.train.tokens > 0);
    fs::write(corpus.join("b.jsonl"), &whole).unwrap();
    // a file that a killed run left
    fs::write(out.join("..preparation.json.123-4.tmp"), "{").unwrap();
    prepare(&recipe, &out, folder.path(), 2).unwrap();
    assert_eq!(both(&out), both(&undisturbed));
    let sidecars =
        |folder: &Path| ["train.json", "val.json"].map(|name| fs::read_to_string(folder.join(name)).unwrap());
    assert_eq!(sidecars(&out), sidecars(&undisturbed));
    assert_eq!(names(&out), names(&undisturbed));
}

/// A process that is killed between the last token and the last sidecar.
#[test]
fn finishing_may_be_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let path = many(folder.path(), 50);
    let recipe = recipe(&path);
    let out = folder.path().join("out");
    prepare(&recipe, &out, folder.path(), 2).unwrap();
    let expected = both(&out);
    let sidecars = ["train.json", "val.json"].map(|name| fs::read_to_string(out.join(name)).unwrap());
    let description = |text: &str| serde_json::from_str::<Description>(text).unwrap();
    let [train, validation] = [description(&sidecars[0]), description(&sidecars[1])];
    let corpus = Corpus::find(&recipe.sources, folder.path()).unwrap();
    let count = |description: &Description| {
        let preparation = description.preparation.as_ref().unwrap();
        let (documents, text_bytes) = (preparation.documents, preparation.text_bytes);
        output::Count { documents, tokens: description.tokens as u64, text_bytes }
    };
    let seen = |(record, file): (&FileRecord, &documents::SourceFile)| {
        let (record, modified) = (record.clone(), file.modified);
        output::Seen { record, modified }
    };
    let records = &train.preparation.as_ref().unwrap().files;
    let counts = output::Counts { train: count(&train), validation: count(&validation), smallest: 0 };
    let state = State {
        vocabulary: train.vocabulary,
        end_of_text: 50256,
        files: records.iter().zip(&corpus.files).map(seen).collect(),
        counts,
        complete: true,
        ..State::new(&recipe)
    };
    // after neither, one or both files have their names
    for named in 0..=2 {
        for (number, name) in [TRAIN, VALIDATION].into_iter().enumerate() {
            fs::remove_file(sidecar_of(&out.join(name))).unwrap();
            if number >= named {
                fs::rename(out.join(name), out.join(format!(".{name}.part"))).unwrap();
            }
        }
        fs::write(out.join(".preparation.json"), serde_json::to_string(&state).unwrap()).unwrap();
        prepare(&recipe, &out, folder.path(), 2).unwrap();
        assert_eq!(both(&out), expected, "{named} named");
        assert_eq!(["train.json", "val.json"].map(|name| fs::read_to_string(out.join(name)).unwrap()), sidecars);
        assert_eq!(names(&out), ["train.bin", "train.json", "val.bin", "val.json"]);
    }
}

#[test]
fn one_run_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = many(folder.path(), 10);
    let recipe = recipe(&path);
    let out = folder.path().join("out");
    let corpus = Corpus::find(&recipe.sources, folder.path()).unwrap();
    let held = Output::open(&out, &recipe, &corpus).unwrap();
    let message = prepare(&recipe, &out, folder.path(), 2).unwrap_err().to_string();
    assert!(message.contains("another run is preparing the token files in"), "{message}");
    drop(held);
    prepare(&recipe, &out, folder.path(), 2).unwrap();
}
