//! Whether a process listens: its sockets (`/proc/<pid>/fd`) among those of its network (`/proc/<pid>/net`) that do.

use std::collections::HashSet;
use std::io;

use super::handle::Handle;

/// Whether clients can reach a process, by TCP or by a socket with a name.
pub(super) fn listens(handle: &Handle) -> io::Result<bool> {
    let mut sockets = HashSet::new();
    for name in handle.names("fd")? {
        // One that was closed meanwhile has no link.
        let Ok(target) = handle.link(&format!("fd/{name}")) else { continue };
        let inode = || target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok();
        sockets.extend(inode());
    }
    if sockets.is_empty() {
        return Ok(false);
    }
    for (table, listening) in
        [("net/tcp", tcp as fn(&str) -> Option<u64>), ("net/tcp6", tcp), ("net/unix", unix)]
    {
        let text = match handle.read(table) {
            // A kernel without IPv6.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            text => text?,
        };
        let lines = String::from_utf8_lossy(&text);
        if lines.lines().filter_map(listening).any(|inode| sockets.contains(&inode)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `0: 0100007F:1388 00000000:0000 0A … <inode>`: the inode, if the state is 0A, listening.
fn tcp(line: &str) -> Option<u64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    (*fields.get(3)? == "0A").then(|| fields.get(9)?.parse().ok()).flatten()
}

/// `0000000000000000: 00000002 00000000 00010000 0001 01 <inode> <path>`: the inode, if the fourth says that it listens.
fn unix(line: &str) -> Option<u64> {
    const LISTENS: u32 = 1 << 16;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let flags = u32::from_str_radix(fields.get(3)?, 16).ok()?;
    (flags & LISTENS != 0).then(|| fields.get(6)?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_sockets_are_read() {
        let four = "   1: 0100007F:1388 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 25617 1 0 100 0";
        assert_eq!(tcp(four), Some(25617));
        assert_eq!(tcp(&four.replace(" 0A ", " 01 ")), None, "connected");
        assert_eq!(tcp("  sl  local_address rem_address   st tx_queue"), None);
        let socket = "ffff8881: 00000002 00000000 00010000 0001 01 4711 /run/a b.sock";
        assert_eq!(unix(socket), Some(4711));
        assert_eq!(unix(&socket.replace("00010000", "00000000")), None, "connected");
        assert_eq!(unix("Num       RefCount Protocol Flags    Type St Inode Path"), None);
    }
}
