//! The host's ends of connections: bytes are sent and taken with checksums by cksum(1).

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// Bytes handled at once.
const CHUNK: usize = 1 << 20;
/// A connection that stands still so long is broken.
const STALL: Duration = Duration::from_secs(120);

/// cksum(1) at work, a part of coreutils.
#[derive(Debug)]
struct Checksum {
    child: Child,
}

impl Checksum {
    fn start() -> Result<Self> {
        let child = Command::new("cksum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        Ok(Self { child: child.context("cannot run cksum, which is part of coreutils")? })
    }

    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        self.child.stdin.as_mut().context("no stdin")?.write_all(bytes)?;
        Ok(())
    }

    fn finish(self) -> Result<String> {
        let output = self.child.wait_with_output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// Sends `mib` MiB that no two calls have in common, and closes. Returns the checksum.
pub(super) fn send(mut to: TcpStream, mib: u64) -> Result<String> {
    to.set_write_timeout(Some(STALL))?;
    let mut checksum = Checksum::start()?;
    let mut random = std::fs::File::open("/dev/urandom")?;
    let mut bytes = vec![0; CHUNK];
    for _ in 0..mib {
        random.read_exact(&mut bytes)?;
        to.write_all(&bytes).context("sending to the guest")?;
        checksum.add(&bytes)?;
    }
    to.shutdown(std::net::Shutdown::Write)?;
    // The other end closes once it has everything; it may have said hello.
    to.set_read_timeout(Some(STALL))?;
    while to.read(&mut bytes).is_ok_and(|len| len > 0) {}
    checksum.finish()
}

/// Says hello and takes all there is. Returns the checksum, behind which is the length.
pub(super) fn receive(mut from: TcpStream) -> Result<String> {
    from.set_read_timeout(Some(STALL))?;
    from.write_all(b"!")?;
    let mut checksum = Checksum::start()?;
    let mut bytes = vec![0; CHUNK];
    loop {
        let len = from.read(&mut bytes).context("receiving from the guest")?;
        if len == 0 {
            return checksum.finish();
        }
        checksum.add(bytes.get(..len).unwrap_or_default())?;
    }
}

/// A listener of this host's loopback, and its port.
pub(super) fn listen() -> Result<(TcpListener, u16)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

/// A port of this host's loopback that is free, for now at least.
pub(crate) fn free_port() -> Result<u16> {
    Ok(listen()?.1)
}

/// Takes connections and drops what comes in, until this process ends. Returns the port.
pub(super) fn drop_all() -> Result<u16> {
    let (listener, port) = listen()?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = vec![0; CHUNK];
                while stream.read(&mut bytes).is_ok_and(|len| len > 0) {}
            });
        }
    });
    Ok(port)
}

/// Sends everything back, until this process ends. Returns the port.
pub(crate) fn echo() -> Result<u16> {
    let (listener, port) = listen()?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut bytes = [0; 64];
            let _ = stream.set_nodelay(true);
            while let Ok(len) = stream.read(&mut bytes)
                && len > 0
                && stream.write_all(bytes.get(..len).unwrap_or_default()).is_ok()
            {}
        }
    });
    Ok(port)
}
