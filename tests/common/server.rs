//! A little HTTP server on 127.0.0.1 that does what a test says, and keeps what it was asked.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::entries;
use super::http::request;

/// What it was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// What a registry answers.
    pub(crate) fn forwarded(&self, port: u16) -> Answer {
        let Ok(answer) = request(port, &self.method, &self.target, &[], &self.body) else {
            return Answer::status(502);
        };
        let header = |name: &&str| answer.header(name).map(|value| ((*name).to_string(), value.to_string()));
        let headers = ["location", "docker-upload-uuid"].iter().filter_map(header).collect();
        // The length of an answer to HEAD is that of what is not sent.
        Answer { status: answer.status, headers, body: Vec::new() }
    }
}

/// What it answers.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn status(status: u16) -> Answer {
        Answer { status, headers: Vec::new(), body: Vec::new() }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Answer {
        self.headers.push((name.to_string(), value.into()));
        self
    }
}

/// One that runs until it is dropped.
pub(crate) struct Server {
    pub(crate) port: u16,
    is_over: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    /// `None` answers nothing, and leaves the client waiting.
    pub(crate) fn start(answer: impl Fn(&Asked) -> Option<Answer> + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server {
            port: listener.local_addr().unwrap().port(),
            is_over: Arc::default(),
            asked: Arc::default(),
        };
        let (is_over, asked, answer) = (server.is_over.clone(), server.asked.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if is_over.load(SeqCst) {
                    return;
                }
                let (is_over, asked, answer) = (is_over.clone(), asked.clone(), answer.clone());
                // A client that went away is nobody's business.
                std::thread::spawn(move || serve(stream, &is_over, &asked, &*answer));
            }
        });
        server
    }

    /// One that passes all on to a registry.
    pub(crate) fn before(port: u16) -> Server {
        Server::start(move |asked| Some(asked.forwarded(port)))
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Everything so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// What authorization it was shown, each once.
    pub(crate) fn authorizations(&self) -> Vec<String> {
        let asked = self.asked();
        let mut all: Vec<String> =
            asked.iter().filter_map(|asked| asked.header("authorization")).map(str::to_string).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, SeqCst);
        // So that it looks.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// One request of one connection.
fn serve(
    mut stream: TcpStream,
    is_over: &AtomicBool,
    asked: &Mutex<Vec<Asked>>,
    answer: &dyn Fn(&Asked) -> Option<Answer>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    lines.read_line(&mut first)?;
    let mut words = first.split_whitespace().map(str::to_string);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_lowercase(), value.trim().to_string()));
    }
    let mut this = Asked { method, target, headers, body: Vec::new() };
    let length = this.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    this.body.resize(length, 0);
    lines.read_exact(&mut this.body)?;
    asked.lock().unwrap().push(this.clone());
    let Some(Answer { status, headers, body }) = answer(&this) else {
        while !is_over.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        return Ok(());
    };
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(
        stream,
        "HTTP/1.1 {status} -\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(&body)
}

/// As much of a registry as is asked by a collector: it has all blobs, remembers none that it is told to forget, and begins
/// and ends uploads in a storage as a registry of the 2.x series does.
pub(crate) fn registry_on(store: &Path, asked: &Asked) -> Answer {
    let path = asked.target.split('?').next().unwrap_or_default();
    let Some(below) = path.strip_prefix("/v2/") else { return Answer::status(404) };
    let (repository, upload) = below.split_once("/blobs/uploads/").unwrap_or((below, ""));
    let uploads = store.join("docker/registry/v2/repositories").join(repository).join("_uploads");
    match (asked.method.as_str(), below) {
        ("GET", "") | ("HEAD", _) => Answer::status(200),
        ("POST", _) => {
            let name = format!("{:08x}-fake", entries(&uploads).len());
            let upload = uploads.join(&name);
            fs::create_dir_all(upload.join("hashstates/sha256")).unwrap();
            for file in ["startedat", "data", "hashstates/sha256/0"] {
                fs::write(upload.join(file), "").unwrap();
            }
            let location =
                format!("https://hub.example/v2/x/v2/{repository}/blobs/uploads/{name}?_state=a%3D");
            Answer::status(202).with("Location", location).with("Docker-Upload-UUID", name)
        }
        ("DELETE", _) if !upload.is_empty() && asked.target.ends_with("?_state=a%3D") => {
            for file in ["startedat", "data"] {
                fs::remove_file(uploads.join(upload).join(file)).unwrap();
            }
            Answer::status(204)
        }
        _ => Answer::status(404),
    }
}
