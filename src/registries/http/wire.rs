//! How bytes reach a registry besides TCP: by a Unix socket, and through TLS.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use super::trust::Trust;

/// Connects to a socket in the filesystem, whatever the URL says.
#[derive(Debug)]
pub(super) struct UnixConnector(pub(super) PathBuf);

impl<In: Transport> Connector<In> for UnixConnector {
    type Out = Wire<UnixStream>;

    fn connect(&self, details: &ConnectionDetails, _: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        Ok(Some(Wire::new(connect(&self.0, details.timeout)?, details)))
    }
}

/// Connects, and waits no longer than that for a server that accepts nobody: its queue may be full.
fn connect(path: &Path, timeout: NextTimeout) -> io::Result<UnixStream> {
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let stream = UnixStream::from(socket);
    stream.set_write_timeout(timeout.not_zero().map(|time| *time))?;
    net::connect(&stream, &SocketAddrUnix::new(path)?)?;
    Ok(stream)
}

/// Speaks TLS where the URL says so, and believes whom a [`Trust`] believes.
#[derive(Debug)]
pub(super) struct TlsConnector(pub(super) Arc<Trust>);

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Either<In, Wire<Tls>>;

    fn connect(
        &self,
        details: &ConnectionDetails,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        let Some(inner) = chained else { return Ok(None) };
        if !details.needs_tls() {
            return Ok(Some(Either::A(inner)));
        }
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']).to_string();
        let name = ServerName::try_from(host).map_err(io::Error::other)?;
        let config = self.0.client_config().map_err(io::Error::other)?;
        let mut connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut adapter = TransportAdapter::new(inner.boxed(), details.current_time.clone());
        adapter.set_timeout(details.timeout);
        while connection.is_handshaking() {
            connection.complete_io(&mut adapter)?;
        }
        Ok(Some(Either::B(Wire::new(Tls(StreamOwned::new(connection, adapter)), details))))
    }
}

/// A TLS session over what another connector made.
pub(super) struct Tls(StreamOwned<ClientConnection, TransportAdapter>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TLS")
    }
}

/// A stream that a transport can be made of.
pub(super) trait Stream: Read + Write + fmt::Debug + Send + Sync + 'static {
    /// No later call may take longer.
    fn limit(&mut self, timeout: NextTimeout) -> io::Result<()>;

    /// Whether the other end is still there, as far as that is known.
    fn is_open(&mut self) -> bool;

    /// Whether nobody on the way can read it.
    fn is_tls(&self) -> bool;
}

impl Stream for UnixStream {
    fn limit(&mut self, timeout: NextTimeout) -> io::Result<()> {
        let time = timeout.not_zero().map(|time| *time);
        self.set_read_timeout(time)?;
        self.set_write_timeout(time)
    }

    fn is_open(&mut self) -> bool {
        // One request for each connection costs nothing here.
        false
    }

    fn is_tls(&self) -> bool {
        false
    }
}

impl Read for Tls {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Tls {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Stream for Tls {
    fn limit(&mut self, timeout: NextTimeout) -> io::Result<()> {
        self.0.sock.set_timeout(timeout);
        Ok(())
    }

    fn is_open(&mut self) -> bool {
        self.0.sock.get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

/// A stream with the buffers that ureq wants.
pub(super) struct Wire<S> {
    stream: S,
    buffers: LazyBuffers,
}

impl<S> Wire<S> {
    fn new(stream: S, details: &ConnectionDetails) -> Wire<S> {
        let config = details.config;
        Wire { stream, buffers: LazyBuffers::new(config.input_buffer_size(), config.output_buffer_size()) }
    }
}

impl<S: fmt::Debug> fmt::Debug for Wire<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.stream.fmt(f)
    }
}

impl<S: Stream> Transport for Wire<S> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.stream.limit(timeout)?;
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        self.stream.write_all(output)?;
        Ok(self.stream.flush()?)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.stream.limit(timeout)?;
        let amount = match self.stream.read(self.buffers.input_append_buf()) {
            // A TLS peer that ends without a farewell ends all the same; HTTP knows how long an answer is.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => 0,
            amount => amount?,
        };
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.is_open()
    }

    fn is_tls(&self) -> bool {
        self.stream.is_tls()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::time::Duration;

    use super::*;

    #[test]
    fn a_socket_whose_queue_is_full_is_not_waited_for_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = socket.unwrap();
        net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        net::listen(&socket, 0).unwrap();
        let timeout = NextTimeout { after: Duration::from_millis(50).into(), ..NextTimeout::default() };
        let connected: Vec<_> = (0..3).map(|_| connect(&path, timeout)).collect();
        assert!(connected[0].is_ok());
        assert!(connected[2].is_err());
    }
}
