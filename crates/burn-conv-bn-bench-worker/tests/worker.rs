//! The program itself.

use std::io::Write;
use std::process::{Command, Stdio};

#[test]
fn answers_a_line_each_and_says_who_starts_it() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_bench-worker"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let requests = b"{\"hello\":{}}\n{\"run\":{}}\nhelp\n";
    child.stdin.take().unwrap().write_all(requests).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    let replies = String::from_utf8(output.stdout).unwrap();
    let replies: Vec<&str> = replies.lines().collect();
    assert_eq!(replies.len(), 2, "{replies:?}");
    assert!(replies[0].starts_with(r#"{"hello":{"versions":{"burn":"#));
    let failed = r#"{"failed":{"reason":"nothing was loaded"}}"#;
    assert_eq!(replies[1], failed);
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("started by cargo xtask bench"), "{words}");
}
