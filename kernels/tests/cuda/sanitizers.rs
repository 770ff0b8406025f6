//! Every other test of this file once more, under address and undefined-behaviour sanitizers.

use std::process::Command;

use crate::emulation::{SANITIZE, available, sanitized};

#[test]
fn all_kernels_run_under_sanitizers() {
    if sanitized() || !available() {
        return;
    }
    let path = Command::new("g++").arg("-print-file-name=libasan.so").output().unwrap().stdout;
    let library = String::from_utf8(path).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--skip", "sanitizers"])
        .env(SANITIZE, "1")
        .env("LD_PRELOAD", library.trim())
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|t| String::from_utf8_lossy(&t).into_owned()).concat();
    assert!(output.status.success(), "{text}");
}
