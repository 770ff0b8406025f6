//! Wrong texts and token files.

use std::fs;

use super::Folder;

const PLACE: &str = "error: pipe.ron:5:18: row `text`: ";

#[test]
fn a_token_file_cut_in_the_middle() {
    let folder = Folder::with_pipeline();
    folder.succeeds(&["run", "pipe.ron", "--until", "tokens"]);
    let path = folder.prepared().join("train.bin");
    let bytes = fs::read(&path).unwrap();
    let cut = bytes.len() / 4 * 2;
    fs::write(&path, &bytes[..cut]).unwrap();
    let message = folder.fails(&["run", "pipe.ron"]);
    assert!(message.starts_with("error: pipe.ron:6:20: row `tokens`: data/chars-"), "{message}");
    let (tokens, all) = (cut / 2, bytes.len() / 2);
    let expected = format!("train.bin is damaged: {tokens} tokens ({cut} bytes) where data/chars-");
    assert!(message.contains(&expected), "{message}");
    assert!(message.contains(&format!("train.json tells {all} ({} bytes)", bytes.len())), "{message}");
    assert!(message.contains("delete it and run again to make it anew"), "{message}");
    // cut within a token
    fs::write(&path, &bytes[..cut + 1]).unwrap();
    let message = folder.fails(&["run", "pipe.ron"]);
    let expected = format!("train.bin has {} bytes, an odd number", cut + 1);
    assert!(message.contains(&expected), "{message}");
    // what the message says helps
    fs::remove_file(&path).unwrap();
    folder.succeeds(&["run", "pipe.ron", "--until", "tokens"]);
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn invalid_utf8() {
    let folder = Folder::with_pipeline();
    folder.write("text.txt", b"ab\nc\xffd");
    let message = "text.txt is not valid UTF-8: byte 0xff at offset 4 (line 2); convert the file to UTF-8, for example \
                   with: iconv -f latin1 -t utf-8\n";
    folder.says(&["run", "pipe.ron"], &format!("{PLACE}{message}"));
}

#[test]
fn an_empty_file() {
    let folder = Folder::with_pipeline();
    folder.write("text.txt", "");
    let message = "text.txt is empty; a text needs at least a few characters\n";
    folder.says(&["run", "pipe.ron"], &format!("{PLACE}{message}"));
}

#[test]
fn a_block_longer_than_the_text() {
    let folder = Folder::with_pipeline();
    let message = folder.fails(&["run", "pipe.ron", "--set", "batches.block=100000"]);
    let start = "error: pipe.ron:7:21: row `batches`: block: 100000 needs at least 100001 tokens in each split, but the \
                 train split (data/chars-";
    assert!(message.starts_with(start), "{message}");
    assert!(message.ends_with("; use a smaller block or a longer text\n"), "{message}");
}

#[test]
fn no_text_at_hand() {
    let folder = Folder::with_pipeline();
    let from = r#"text.from=[File("no.txt"), Archive(path: "no.tgz", member: "*/x.txt")]"#;
    folder.says(
        &["run", "pipe.ron", "--set", from],
        "error: pipe.ron:5:18: row `text`: no text at hand; tried in this order:\n  no.txt: no such file\n  \
         */x.txt of no.tgz: no such file\ngive a file: --set 'text.from=[File(\"path/to/a.txt\")]'\n",
    );
    let message = folder.fails(&["run", "pipe.ron", "--set", "text.from=[]"]);
    assert!(message.contains("the list of text sources is empty"), "{message}");
    // what the message says helps
    folder.write("other.txt", super::text());
    folder.succeeds(&["run", "pipe.ron", "--until", "tokens", "--set", r#"text.from=[File("other.txt")]"#]);
}
