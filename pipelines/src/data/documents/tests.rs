use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;

pub(crate) const DOCUMENTS: [&str; 3] = [
    "The first document.\n\nIt's short: 12 words, or so.",
    "日本語 und Größe — 😀\t\0 <|endoftext|>",
    "  third \u{2028} \"quoted\"  \n",
];

const SEPARATOR: &str = "\n<|end|>\n";

pub(crate) fn json_line(text: &str) -> String {
    format!("{}\n", serde_json::json!({ "id": 1, "text": text, "meta": { "text": ["no"] } }))
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

fn zstd_bytes(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

fn tar_bytes<'a>(members: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn zip_bytes<'a>(members: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in members {
        let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        writer.start_file(name, options).unwrap();
        writer.write_all(&content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// A Parquet file of two columns, `id` and the strings, in row groups of two rows.
pub(crate) fn parquet_file(path: &Path, column: &str, rows: &[Option<&str>]) {
    use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use ::parquet::file::writer::SerializedFileWriter;
    let schema = format!("message rows {{ required int64 id; optional binary {column} (UTF8); }}");
    let schema = Arc::new(::parquet::schema::parser::parse_message_type(&schema).unwrap());
    let properties = ::parquet::file::properties::WriterProperties::builder()
        .set_compression(::parquet::basic::Compression::SNAPPY)
        .build();
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
    for rows in rows.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let mut ids = group.next_column().unwrap().unwrap();
        ids.typed::<Int64Type>().write_batch(&vec![7; rows.len()], None, None).unwrap();
        ids.close().unwrap();
        let mut texts = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> =
            rows.iter().flatten().map(|text| ByteArray::from(text.as_bytes().to_vec())).collect();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        texts.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

/// The three documents in every format: the source, and the separator that it needs.
pub(crate) fn every_format(folder: &Path) -> Vec<(PathBuf, Option<String>)> {
    let documents = DOCUMENTS.map(|text| text.as_bytes().to_vec());
    let named = || ["a/1.txt", "a/2.txt", "b.txt"].into_iter().zip(documents.clone());
    let lines = DOCUMENTS.map(json_line).concat().into_bytes();
    let joined = DOCUMENTS.join(SEPARATOR).into_bytes();
    let parquet = folder.join("a.parquet");
    parquet_file(&parquet, "text", &DOCUMENTS.map(Some));
    let tar = tar_bytes(named());
    // as OpenWebText was published: archives without an ending inside of an archive
    let nested = tar_bytes([
        ("openwebtext/urlsf_subset00-1_data.xz", xz(&tar_bytes(named().take(2)))),
        ("openwebtext/urlsf_subset00-2_data.xz", xz(&tar_bytes(named().skip(2)))),
    ]);
    let mixed = zip_bytes([
        ("readme.md", b"no document".to_vec()),
        ("x/1.jsonl.gz", gzip(json_line(DOCUMENTS[0]).as_bytes())),
        ("x/2.tar", tar_bytes(named().skip(1).take(1))),
        ("x/3.txt.zst", zstd_bytes(&documents[2])),
    ]);
    let files = [
        ("a.txt", joined.clone()),
        ("b.txt.gz", gzip(&joined)),
        ("a.jsonl", lines.clone()),
        ("no-end.ndjson", lines[..lines.len() - 1].to_vec()),
        ("b.jsonl.gz", gzip(&lines)),
        ("two.jsonl.gz", [gzip(&lines[..40]), gzip(&lines[40..])].concat()),
        ("c.jsonl.zst", zstd_bytes(&lines)),
        ("d.jsonl.xz", xz(&lines)),
        ("a.tar", tar.clone()),
        ("b.tar.gz", gzip(&tar)),
        ("c.TGZ", gzip(&tar)),
        ("d.tar.xz", xz(&tar)),
        ("e.tar.zst", zstd_bytes(&tar)),
        ("f.tar.xz", xz(&nested)),
        ("g.tar", tar_bytes([("inner.parquet", fs::read(&parquet).unwrap())])),
        ("h.tar", tar_bytes([("inner.zip", zip_bytes(named()))])),
        ("a.zip", zip_bytes(named())),
        ("b.zip", mixed),
    ];
    let mut all: Vec<(PathBuf, Option<String>)> = Vec::new();
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        all.push((path, name.contains(".txt").then(|| SEPARATOR.into())));
    }
    all.push((parquet, None));
    let texts = folder.join("texts");
    fs::create_dir_all(texts.join("a")).unwrap();
    named().for_each(|(name, bytes)| fs::write(texts.join(name), bytes).unwrap());
    fs::write(texts.join("notes.md"), "no document").unwrap();
    fs::write(texts.join(".hidden.txt"), "no document").unwrap();
    all.push((texts, None));
    all
}

/// Collects documents.
#[derive(Default)]
struct Collected {
    open: Vec<u8>,
    documents: Vec<Vec<u8>>,
}

impl Sink for Collected {
    fn text(&mut self, bytes: &[u8]) -> Result<(), ReadError> {
        self.open.extend_from_slice(bytes);
        Ok(())
    }
    fn end(&mut self) -> Result<(), ReadError> {
        self.documents.push(std::mem::take(&mut self.open));
        Ok(())
    }
}

fn read(path: &Path, change: impl FnOnce(&mut Format)) -> Result<Vec<String>, String> {
    let mut format = Format { field: "text".into(), members: None, separator: None };
    change(&mut format);
    let corpus = Corpus::find(&[path.display().to_string()], Path::new("none")).map_err(|error| error.to_string())?;
    let mut sink = Collected::default();
    for file in &corpus.files {
        match read_file(file, &format, &Progress::default(), &mut sink) {
            Ok(sha256) => assert_eq!(sha256.len(), 64),
            Err(ReadError::Source(error)) => return Err(error.to_string()),
            Err(ReadError::Stopped) => panic!("the sink never stops"),
        }
    }
    Ok(sink.documents.into_iter().map(|bytes| String::from_utf8(bytes).unwrap()).collect())
}

fn written(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

#[track_caller]
fn contains(message: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in: {message}"));
}

#[test]
fn documents_of_every_format() {
    let folder = tempfile::tempdir().unwrap();
    for (path, separator) in every_format(folder.path()) {
        let found = read(&path, |format| format.separator = separator);
        assert_eq!(found.unwrap(), DOCUMENTS, "{}", path.display());
    }
}

#[test]
fn a_separator_across_pieces() {
    let folder = tempfile::tempdir().unwrap();
    // the separator lies at every offset around the size in which files are read
    for before in (1 << 18) - 12..(1 << 18) + 3 {
        let first = "x".repeat(before);
        let path = written(folder.path(), "a.txt", format!("{first}{SEPARATOR}{SEPARATOR} \n{SEPARATOR}second"));
        let found = read(&path, |format| format.separator = Some(SEPARATOR.into())).unwrap();
        assert_eq!(found, [first.as_str(), "second"], "{before}");
    }
}

#[test]
fn members_by_pattern() {
    let folder = tempfile::tempdir().unwrap();
    let members = [("en/a.txt", b"a".to_vec()), ("de/b.txt", b"b".to_vec()), ("en/c.wiki", b"c".to_vec())];
    let path = written(folder.path(), "a.tar", tar_bytes(members));
    assert_eq!(read(&path, |_| {}).unwrap(), ["a", "b"]);
    assert_eq!(read(&path, |format| format.members = Some("en/*".into())).unwrap(), ["a", "c"]);
    let message = read(&path, |format| format.members = Some("fr/**".into())).unwrap_err();
    contains(&message, &["a.tar has no members that match \"fr/**\"; it has en/a.txt, de/b.txt, en/c.wiki"]);
}

#[test]
fn half_a_surrogate_pair_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path(), "a.jsonl", r#"{"text": "a\ud83db\ude00c\ud83d\ude00d"}"#);
    assert_eq!(read(&path, |_| {}).unwrap(), ["a\u{fffd}b\u{fffd}c😀d"]);
}

#[test]
fn wrong_lines_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = json_line("fine");
    let fails = |line: &str| {
        let path = written(folder.path(), "a.jsonl", format!("{good}\n{good}{line}\n{good}"));
        read(&path, |_| {}).unwrap_err()
    };
    contains(
        &fails(r#"{"content": "x", "id": 3}"#),
        &["a.jsonl: line 4: there is no field \"text\", but \"content\", \"id\"", "--set documents.field="],
    );
    contains(&fails("{}"), &["line 4: there is no field \"text\""]);
    contains(&fails(r#"{"text": null}"#), &["line 4", "expected a string"]);
    contains(&fails(r#"{"text": "x""#), &["line 4", "EOF while parsing"]);
    contains(&fails("[1]"), &["line 4", "expected an object with the field \"text\""]);
    let path = written(folder.path(), "b.jsonl.gz", gzip(format!("{good}{{").as_bytes()));
    contains(&read(&path, |_| {}).unwrap_err(), &["b.jsonl.gz: line 2: "]);
    let found = read(&written(folder.path(), "c.jsonl", r#"{"body": "x"}"#), |format| format.field = "body".into());
    assert_eq!(found.unwrap(), ["x"]);
}

#[test]
fn damaged_files_are_named_with_the_place() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..2000).map(|i| json_line(&format!("line {i} {}", i * 7919 % 1013))).collect();
    let packed = [
        ("a.jsonl.gz", gzip(lines.as_bytes())),
        ("a.jsonl.zst", zstd_bytes(lines.as_bytes())),
        ("a.jsonl.xz", xz(lines.as_bytes())),
    ];
    for (name, bytes) in packed {
        let cut = written(folder.path(), name, &bytes[..bytes.len() / 2]);
        let place = format!("near byte {} of {}", bytes.len() / 2, bytes.len() / 2);
        contains(
            &read(&cut, |_| {}).unwrap_err(),
            &[name, "is damaged or not what its name says", "after line ", &place],
        );
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2..bytes.len() / 2 + 64].iter_mut().for_each(|byte| *byte ^= 0x5a);
        let flipped = written(folder.path(), name, flipped);
        contains(&read(&flipped, |_| {}).unwrap_err(), &[name, "a.jsonl"]);
        let other = written(folder.path(), name, "no such kind of file at all, but text");
        contains(&read(&other, |_| {}).unwrap_err(), &[name, "is damaged or not what its name says"]);
    }
    // an archive that is cut anywhere, also between two members
    let members = [("a.txt", vec![b'a'; 700]), ("b.txt", vec![b'b'; 100])];
    let tar = tar_bytes(members);
    for cut in [100, 512, 600, 1536, 1600, 2048, 2100, 2560] {
        let path = written(folder.path(), "a.tar", &tar[..cut]);
        contains(&read(&path, |_| {}).unwrap_err(), &["a.tar", "is damaged or not what its name says", "near byte"]);
    }
    let nested = tar_bytes([("x/inner.tar.gz", gzip(&tar)[..60].to_vec())]);
    let path = written(folder.path(), "b.tar", nested);
    contains(&read(&path, |_| {}).unwrap_err(), &["b.tar: x/inner.tar.gz", "is damaged"]);
    let zip = zip_bytes([("a.txt", b"abc".to_vec())]);
    let path = written(folder.path(), "a.zip", &zip[..zip.len() - 10]);
    contains(&read(&path, |_| {}).unwrap_err(), &["a.zip is damaged", "in its directory"]);
}

#[test]
fn damaged_parquet_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let long: Vec<String> = (0..10).map(|i| format!("{i} {}", "text ".repeat(100 + i))).collect();
    let rows: Vec<Option<&str>> = long.iter().map(|text| Some(text.as_str())).collect();
    parquet_file(&path, "text", &rows);
    assert_eq!(read(&path, |_| {}).unwrap(), long);
    let bytes = fs::read(&path).unwrap();
    for cut in [0, 3, 100, bytes.len() / 2, bytes.len() - 1] {
        written(folder.path(), "a.parquet", &bytes[..cut]);
        contains(
            &read(&path, |_| {}).unwrap_err(),
            &["a.parquet is damaged", &format!("at the end of its {cut} bytes")],
        );
    }
    // damage within a page: wrong lengths, or a stream that does not unpack
    let mut errors = 0;
    for at in (4..bytes.len() / 2).step_by(37) {
        let mut flipped = bytes.clone();
        flipped[at..at + 8].iter_mut().for_each(|byte| *byte ^= 0xff);
        written(folder.path(), "a.parquet", flipped);
        // without checksums some damage is another text; a panic of the library is reported by the thread that reads
        if let Ok(Err(message)) = std::panic::catch_unwind(|| read(&path, |_| {})) {
            contains(&message, &["a.parquet", "row"]);
            errors += 1;
        }
    }
    assert!(errors > 5, "{errors}");
    parquet_file(&path, "content", &rows);
    contains(
        &read(&path, |_| {}).unwrap_err(),
        &["there is no column \"text\", but \"id\", \"content\"", "documents.field"],
    );
    contains(&read(&path, |format| format.field = "id".into()).unwrap_err(), &["column \"id\" does not hold strings"]);
    parquet_file(&path, "text", &[Some("a"), Some("b"), Some("c"), None]);
    contains(&read(&path, |_| {}).unwrap_err(), &["a.parquet: row 3: the column \"text\" is null"]);
}

#[test]
fn sources_that_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let find = |source: &str| Corpus::find(&[source.into()], folder.path()).unwrap_err().to_string();
    let at = |name: &str| find(&folder.path().join(name).display().to_string());
    contains(&Corpus::find(&[], folder.path()).unwrap_err().to_string(), &["the list of sources is empty"]);
    contains(&at("none.txt"), &["cannot read", "none.txt", "--set 'documents.from=["]);
    contains(&at(""), &["has no files with documents (it is empty)", ".parquet"]);
    fs::write(folder.path().join("a.pdf"), "x").unwrap();
    contains(&at(""), &["it has 1 files of other kinds"]);
    contains(&at("a.pdf"), &["a.pdf is of no known kind; known are .txt"]);
    contains(&find("https://a.b/c.txt"), &["the hash of the file is missing; write https://a.b/c.txt#sha256="]);
    contains(&find("https://a.b/c#sha256=00"), &["of no known kind"]);
    contains(&find("https://a.b/c.txt#sha256=00"), &["64 hexadecimal digits"]);
}
