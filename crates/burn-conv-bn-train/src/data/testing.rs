//! Helpers of tests.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::files::FILES;
use super::idx::Digits;

/// An IDX file of labels.
pub(super) fn label_file(labels: &[u8]) -> Vec<u8> {
    let header = [0x0801, labels.len() as u32].map(u32::to_be_bytes);
    [header.as_flattened(), labels].concat()
}

/// An IDX file of 28x28 images.
pub(super) fn image_file(images: &[u8]) -> Vec<u8> {
    let header = [0x0803, (images.len() / 784) as u32, 28, 28].map(u32::to_be_bytes);
    [header.as_flattened(), images].concat()
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The four files of a data set, in the order of [`FILES`].
pub(super) fn idx_files(train: &Digits, test: &Digits) -> [Vec<u8>; 4] {
    [
        image_file(train.images()),
        label_file(train.labels()),
        image_file(test.images()),
        label_file(test.labels()),
    ]
}

/// Writes the plain files of a data set into `dir`.
pub(super) fn write_idx(dir: &Path, train: &Digits, test: &Digits) {
    fs::create_dir_all(dir).unwrap();
    for (file, bytes) in FILES.iter().zip(idx_files(train, test)) {
        fs::write(dir.join(file.name), bytes).unwrap();
    }
}

/// Base address of a web server that answers each request for a file by its
/// name and goes on until the test ends.
pub(super) fn serve(answer: impl Fn(&str) -> Option<Vec<u8>> + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}/mnist/", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let name = head[0].split([' ', '/']).nth(3).unwrap();
            let (status, body) = match answer(name) {
                Some(body) => ("200 OK", body),
                None => ("404 Not Found", Vec::new()),
            };
            let length = body.len();
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(&body).unwrap();
        }
    });
    base
}

/// Base address of a mirror that refuses connections.
pub(super) fn refusing_mirror() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}/mnist/", listener.local_addr().unwrap())
}

/// The folder with the real MNIST, if this machine has one.
pub(crate) fn real_mnist() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/mnist");
    let dir = env::var_os("BURN_CONV_BN_MNIST").map_or(beside, PathBuf::from);
    if dir.is_dir() {
        return Some(dir);
    }
    // The test harness hides what a passing test prints, but not what is written here.
    let at = dir.display();
    writeln!(
        io::stderr(),
        "SKIPPED: no MNIST in {at} (set BURN_CONV_BN_MNIST)"
    )
    .unwrap();
    None
}
