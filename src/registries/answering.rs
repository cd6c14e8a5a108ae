//! What tells two registries apart, or shows that two names lead to one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use ureq::http::Uri;

/// This machine answers at once, unless it is told not to.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A process and those that started it: a launcher stands for what it launched.
pub(super) fn lineage(pid: u32) -> Vec<u32> {
    let parent = |pid: &u32| {
        let stat = fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat"))).ok()?;
        // The name of the program may hold anything; it ends with the last parenthesis.
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        (parent > 1).then_some(parent)
    };
    // No process has more ancestors than that, and a table that changes meanwhile leads into no circle.
    std::iter::successors(Some(pid), parent).take(100).collect()
}

/// Where a name leads; all addresses of this machine are one.
pub(super) fn addresses(host: &str, port: u16) -> Vec<SocketAddr> {
    let own = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let found = (host, port).to_socket_addrs().into_iter().flatten();
    let mut found: Vec<SocketAddr> = found
        .map(|address| {
            let ip = address.ip().to_canonical();
            // Nobody else may bind to it. No packet is sent.
            let is_own = ip.is_loopback() || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok();
            SocketAddr::new(if is_own { own } else { ip }, port)
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// The addresses that a URL leads to; the URL itself where that can't be told.
pub(super) fn ways_to(url: &str) -> BTreeSet<String> {
    let uri = url.parse::<Uri>().ok();
    let host = uri.as_ref().and_then(Uri::host).unwrap_or_default().trim_matches(['[', ']']);
    let is_tls = uri.as_ref().and_then(Uri::scheme_str) == Some("https");
    let port = uri.as_ref().and_then(Uri::port_u16).unwrap_or(if is_tls { 443 } else { 80 });
    let found: BTreeSet<String> = addresses(host, port).iter().map(ToString::to_string).collect();
    if found.is_empty() { BTreeSet::from([url.to_string()]) } else { found }
}

/// Whether a URL leads to this machine, and nothing listens there.
pub(super) fn is_silent_here(url: &str) -> bool {
    let ways: Vec<SocketAddr> = ways_to(url).iter().filter_map(|way| way.parse().ok()).collect();
    let is_refused = |way: &SocketAddr| {
        let error = TcpStream::connect_timeout(way, CONNECT_TIMEOUT).err();
        error.is_some_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    };
    !ways.is_empty() && ways.iter().all(|way| way.ip().is_loopback() && is_refused(way))
}

/// Whether two URLs lead to one place, as far as addresses tell: a name is not a registry.
pub(super) fn is_one_place(one: &str, other: &str) -> bool {
    let path = |url: &str| url.parse::<Uri>().map_or_else(|_| url.to_string(), |uri| uri.path().to_string());
    one == other || (path(one) == path(other) && !ways_to(one).is_disjoint(&ways_to(other)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_process_comes_from_those_that_started_it() {
        let lineage = lineage(std::process::id());
        assert_eq!(lineage[0], std::process::id());
        assert!(lineage.contains(&std::os::unix::process::parent_id()));
    }

    #[test]
    fn each_way_to_this_machine_is_one() {
        let one = addresses("127.0.0.1", 5000);
        assert_eq!(one.len(), 1);
        for other in ["127.0.0.2", "::1", "::ffff:127.0.0.1", "0.0.0.0", "localhost"] {
            assert_eq!(addresses(other, 5000), one, "{other}");
        }
        assert_ne!(addresses("127.0.0.1", 5001), one);
        assert_ne!(addresses("192.0.2.1", 5000), one);
    }

    #[test]
    fn nothing_is_silent_but_a_port_of_this_machine_that_refuses() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://localhost:{}", listener.local_addr().unwrap().port());
        assert!(!is_silent_here(&url));
        drop(listener);
        assert!(is_silent_here(&url));
        for other in ["http://192.0.2.1:5000", "http://nowhere.invalid:5000", "unix:/run/a"] {
            assert!(!is_silent_here(other), "{other}");
        }
    }

    #[test]
    fn a_place_is_known_by_address_port_and_path_whatever_its_name() {
        let cases = [
            ("http://127.0.0.1:5000", "http://localhost:5000", true),
            ("http://127.0.0.1:5000", "http://[::1]:5000", true),
            ("http://localhost:5000/reg", "http://127.0.0.1:5000/reg", true),
            ("http://localhost", "http://127.0.0.1:80", true),
            ("http://nowhere.invalid:5000", "http://nowhere.invalid:5000", true),
            ("unix:/run/a", "unix:/run/a", true),
            ("unix:/run/a", "unix:/run/b", false),
            ("http://127.0.0.1:5000", "http://localhost:5001", false),
            ("http://127.0.0.1:5000/a", "http://localhost:5000/b", false),
            ("http://127.0.0.1:5000", "http://nowhere.invalid:5000", false),
            ("http://192.0.2.1:5000", "http://192.0.2.2:5000", false),
        ];
        for (one, other, wanted) in cases {
            assert_eq!(is_one_place(one, other), wanted, "{one} {other}");
            assert_eq!(is_one_place(other, one), wanted, "{other} {one}");
        }
    }
}
