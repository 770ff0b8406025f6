//! Checkpoints whose bytes changed are noticed, not loaded, and the one before is used.

use std::fs;
use std::path::{Path, PathBuf};

use dataflow::checkpoint::Store;
use dataflow::saved::Saved;

use super::{Folder, edited};

/// A run with checkpoints of step 6 and 12.
fn run() -> (Folder, PathBuf) {
    let folder = Folder::with_pipeline();
    let text = edited(super::PIPELINE, "(\"last\", Checkpoint(keep: Last)", "(\"last\", Checkpoint(keep: Every(6))");
    let text = edited(&text, "        (\"best\", Checkpoint(keep: Best), [\"eval\"]),\n", "");
    folder.write("pipe.ron", edited(&text, "steps: 5", "steps: 12"));
    folder.succeeds(&["run", "pipe.ron", "--out", "mine"]);
    let last = folder.path("mine/checkpoints/step-00000012");
    assert!(folder.path("mine/checkpoints/step-00000006").is_dir() && last.is_dir());
    (folder, last)
}

/// The parts of a checkpoint, as ranges of bytes of its files.
fn places(checkpoint: &Path) -> Vec<(&'static str, PathBuf, std::ops::Range<usize>)> {
    let mut places = Vec::new();
    for (name, file) in [("weights", "weights.safetensors"), ("optimizer", "optimizer.safetensors")] {
        let path = checkpoint.join(file);
        let bytes = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        places.push((name, path.clone(), 0..8));
        places.push((name, path.clone(), 8..header));
        places.push((name, path, header..bytes.len()));
    }
    let path = checkpoint.join("checkpoint.ron");
    let length = fs::metadata(&path).unwrap().len() as usize;
    places.push(("sidecar", path.clone(), 0..length - 80));
    places.push(("checksum of the sidecar", path, length - 80..length));
    places
}

#[test]
fn flipped_bits_are_noticed_wherever_they_are() {
    let (folder, last) = run();
    let run = folder.path("mine");
    let (found, damaged) = Store::of(&run).latest().unwrap();
    assert_eq!((found.unwrap().0.step, damaged.len()), (12, 0));
    let places = places(&last);
    let mut random = dataflow::kernels::random::Stream::new(8, 0);
    for n in 0..400 {
        let (what, path, range) = &places[n % places.len()];
        let whole = fs::read(path).unwrap();
        let at = range.start + random.next_u64() as usize % range.len();
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (random.next_u32() % 8);
        fs::write(path, &bytes).unwrap();
        let (found, damaged) = Store::of(&run).latest().unwrap();
        assert_eq!(found.unwrap().0.step, 6, "{what}, byte {at}");
        let message = damaged[0].to_string();
        assert!(damaged.len() == 1 && message.contains("is damaged: "), "{what}, byte {at}: {message}");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        let saved = Saved::open(&run).unwrap();
        assert_eq!((saved.step, saved.warnings.len()), (Some(6), 1));
        assert!(Saved::open(&last).is_err());
        fs::write(path, whole).unwrap();
    }
    assert_eq!(Saved::open(&run).unwrap().step, Some(12), "all is as before");
}

#[test]
fn cut_files_are_noticed_too() {
    let (folder, last) = run();
    let run = folder.path("mine");
    for name in ["weights.safetensors", "optimizer.safetensors", "checkpoint.ron"] {
        let path = last.join(name);
        let whole = fs::read(&path).unwrap();
        for length in [0, 1, 7, 8, 9, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(Store::of(&run).latest().unwrap().0.unwrap().0.step, 6, "{name} of {length} bytes");
        }
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert_eq!(Store::of(&run).latest().unwrap().0.unwrap().0.step, 6, "{name} with a byte more");
        fs::remove_file(&path).unwrap();
        assert_eq!(Store::of(&run).latest().unwrap().0.unwrap().0.step, 6, "no {name}");
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn the_program_warns_and_goes_on_from_the_one_before() {
    let (folder, last) = run();
    let figures = super::runs::figures(&folder, "mine");
    let weights = super::runs::weights(&folder, "mine", "last");
    let damage = |checkpoint: &Path| {
        let path = checkpoint.join("weights.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        // not in place: the file has another name in the run folder
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    };
    damage(&last);
    let ran = folder.dataflow(&["run", "mine"]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let expected = "warning: mine/checkpoints/step-00000012/weights.safetensors is damaged: its checksum is another one; \
                    the one before it is used: mine/checkpoints/step-00000006 (step 6)\n";
    assert_eq!(ran.err, expected);
    assert!(ran.out.starts_with("resuming mine after step 6\n"), "{}", ran.out);
    assert_eq!(super::runs::figures(&folder, "mine"), figures);
    assert!(super::runs::weights(&folder, "mine", "last") == weights);
    // none is whole: from the beginning, to the same end
    damage(&last);
    damage(&folder.path("mine/checkpoints/step-00000006"));
    let ran = folder.dataflow(&["run", "mine"]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert_eq!(ran.err.matches("there is none before it, and the run starts anew").count(), 2, "{}", ran.err);
    assert!(ran.out.starts_with("resuming mine from the beginning, since nothing was saved\n"), "{}", ran.out);
    assert_eq!(super::runs::figures(&folder, "mine"), figures);
}
