//! `user`: the host's own network, through passt, without privileges.
//!
//! passt is a process of its own that plays the guest's neighbour on one side and opens
//! ordinary sockets on the other. It is a child that gets one end of a socket pair
//! as its standard input (`--fd 0`, which passt has since before Debian 12): there is no
//! path that others could find, and when this process ends, however it ends, the stream
//! ends, and passt with it. Started by root, passt becomes nobody by itself.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet};
use rustix::net::sockopt;

use super::super::config::{Forward, ForwardProtocol};
use super::super::error::NetError;
use super::super::feature;
use super::super::header::Header;
use super::super::mac::MacAddress;
use super::stream::{FEATURES, FrameStream};
use super::{Backend, Incoming, unwatch, watch};

const PEER: u32 = 0;

/// passt's own MTU, in bytes: what it tells the guest by DHCP too. It terminates
/// connections itself, so nothing of that size ever has to leave the host whole.
const MTU: u16 = 65_520;

/// How long passt may take to answer. It takes some 20 ms.
const PATIENCE: Duration = Duration::from_secs(3);

/// passt sends its messages to the system's log too, and complains if there is none.
const NOISE: &str = "Failed to send";

/// What the host should keep of passt's frames while they wait for us, in bytes; it keeps
/// less where `net.core.wmem_max` says so. passt sends a whole TCP window at once, drops
/// what the socket does not take, and notices two seconds later. It asks for such a
/// buffer itself when it is connected to, but not for a socket that it is given.
const SOCKET_BUFFER: usize = 16 << 20;

/// What passt is told on a host without a default route, where it has no interface to
/// copy addresses from: the customary ones. Forwards from this host still work.
const ALONE: [&str; 11] = [
    "--ipv4-only",
    "--interface",
    "lo",
    "--address",
    "10.0.2.15",
    "--netmask",
    "24",
    "--gateway",
    "10.0.2.2",
    "--mac-addr",
    "02:00:0a:00:02:02",
];

/// The process.
#[derive(Debug)]
struct Passt {
    child: Child,
    /// Reads its messages; gives the last.
    log: Option<JoinHandle<Option<String>>>,
}

impl Passt {
    /// Why it ended: waits for that.
    fn last_words(&mut self) -> String {
        let _ = self.child.kill();
        let status = self.child.wait();
        let words = self.log.take().and_then(|log| log.join().ok()).flatten();
        words.unwrap_or_else(|| match status {
            Ok(status) => format!("it ends without a word ({status})"),
            Err(error) => format!("it cannot be waited for ({error})"),
        })
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let gone = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = gone {
            tracing::debug!(%error, "net: passt cannot be ended");
        }
        if let Some(log) = self.log.take() {
            let _ = log.join();
        }
    }
}

/// Whether the kernel's tables hold a route to everywhere, for either version of IP.
fn has_default_route() -> bool {
    let table = |path| fs::read_to_string(path).unwrap_or_default();
    default_route_v4(&table("/proc/net/route")) || default_route_v6(&table("/proc/net/ipv6_route"))
}

/// Columns: interface, destination, gateway, flags, reference count, use, metric, mask.
fn default_route_v4(table: &str) -> bool {
    table.lines().skip(1).any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(1) == Some("00000000") && columns.nth(5) == Some("00000000")
    })
}

/// Columns: destination, its prefix, source, its prefix, next hop, ..., interface. The
/// loopback interface has one that leads nowhere.
fn default_route_v6(table: &str) -> bool {
    table.lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        matches!(columns[..], [to, "00", .., interface] if to.bytes().all(|b| b == b'0') && interface != "lo")
    })
}

/// passt does not say why it cannot listen somewhere, so it is tried here first.
fn check_forward(forward: &Forward) -> Result<(), NetError> {
    let tried = match forward.protocol {
        ForwardProtocol::Tcp => TcpListener::bind(forward.host).map(drop),
        ForwardProtocol::Udp => UdpSocket::bind(forward.host).map(drop),
    };
    tried.map_err(|error| NetError::Forward { forward: *forward, error })
}

fn is_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

fn spawn(program: &str, forwards: &[Forward], socket: UnixStream) -> Result<Passt, NetError> {
    let mut command = Command::new(program);
    command.args(["--foreground", "--quiet", "--fd", "0"]);
    if !has_default_route() {
        tracing::info!("net: this host has no default route; the guest gets 10.0.2.15");
        command.args(ALONE);
    }
    for forward in forwards {
        check_forward(forward)?;
        command.arg(match forward.protocol {
            ForwardProtocol::Tcp => "--tcp-ports",
            ForwardProtocol::Udp => "--udp-ports",
        });
        command.arg(format!("{}/{}:{}", forward.host.ip(), forward.host.port(), forward.guest));
    }
    command.stdin(OwnedFd::from(socket)).stdout(Stdio::null()).stderr(Stdio::piped());
    // Keys that mean something to a terminal's foreground are not for it.
    command.process_group(0);
    let mut child = command.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => NetError::PasstMissing,
        // Also the answer if the search went through a folder that is not for this user.
        ErrorKind::PermissionDenied if !is_on_path(program) => NetError::PasstMissing,
        _ => NetError::PasstStart(error),
    })?;
    let log = child.stderr.take().map(|stderr| {
        std::thread::Builder::new().name("passt-log".into()).spawn(move || {
            let mut last = None;
            // Read as bytes: what it says may be cut off in the middle of a character.
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if !line.is_empty() && !line.starts_with(NOISE) {
                    tracing::debug!("passt: {line}");
                    last = Some(line);
                }
            }
            last
        })
    });
    let mut passt = Passt { child, log: None };
    passt.log = log.transpose().map_err(|error| NetError::Host { what: "thread", error })?;
    Ok(passt)
}

/// An ARP probe, as of a station that looks whether an address is free (RFC 5227, 2.1.1).
/// passt answers it as soon as it is at work, and takes no notice of it otherwise.
fn probe(mac: MacAddress) -> Vec<u8> {
    let mut frame = Vec::with_capacity(46);
    frame.extend(42_u32.to_be_bytes());
    frame.extend(MacAddress::BROADCAST.0);
    frame.extend(mac.0);
    frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac.0);
    frame.extend([0; 4]);
    frame.extend([0; 6]);
    // TEST-NET-2 (RFC 5737): nobody has it.
    frame.extend([198, 51, 100, 1]);
    frame
}

/// Our end and passt's.
fn cable() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    if let Err(error) = sockopt::set_socket_send_buffer_size(&theirs, SOCKET_BUFFER) {
        tracing::debug!(%error, "net: passt's socket keeps its small buffer");
    }
    Ok((ours, theirs))
}

/// Waits until passt answers, or has ended.
fn await_answer(mut socket: &UnixStream, mac: MacAddress, passt: &mut Passt) -> io::Result<bool> {
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    // A passt that has ended already is seen by the read.
    let _ = socket.write_all(&probe(mac));
    let deadline = Instant::now().checked_add(PATIENCE);
    let mut prefix = [0; 4];
    let mut got = 0_usize;
    while let Some(room) = prefix.get_mut(got..).filter(|room| !room.is_empty()) {
        match socket.read(room) {
            Ok(0) => return Ok(false),
            Ok(len) => got = got.saturating_add(len),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if passt.child.try_wait()?.is_some() {
                    return Ok(false);
                }
                if deadline.is_none_or(|deadline| Instant::now() > deadline) {
                    // Perhaps it speaks IPv6 only, and has nothing to answer.
                    tracing::debug!("net: passt runs but does not answer");
                    return Ok(true);
                }
            }
            Err(_) => return Ok(false),
        }
    }
    // The answer itself is of no interest.
    let len = u64::from(u32::from_be_bytes(prefix).min(super::MAX_FRAME as u32));
    io::copy(&mut socket.take(len), &mut io::sink())?;
    Ok(true)
}

/// The backend.
#[derive(Debug)]
pub(in super::super) struct PasstBackend {
    stream: FrameStream,
    watched: bool,
    /// None: somebody else is at the other end, in tests.
    passt: Option<Passt>,
}

impl PasstBackend {
    /// Starts passt for a card of that address, and waits until it is at work.
    ///
    /// # Errors
    /// [`NetError`]: it is not installed, or says why it does not want to.
    pub(in super::super) fn open(forwards: &[Forward], mac: MacAddress) -> Result<Self, NetError> {
        Self::open_program("passt", forwards, mac)
    }

    fn open_program(
        program: &str,
        forwards: &[Forward],
        mac: MacAddress,
    ) -> Result<Self, NetError> {
        let host = |error| NetError::Host { what: "socket", error };
        let (ours, theirs) = cable().map_err(host)?;
        let mut passt = spawn(program, forwards, theirs)?;
        if !await_answer(&ours, mac, &mut passt).map_err(host)? {
            return Err(NetError::Passt(passt.last_words()));
        }
        Ok(Self { passt: Some(passt), ..Self::over(ours).map_err(host)? })
    }

    /// Over a connected socket, with nobody to start or stop: for tests and fuzzing.
    ///
    /// # Errors
    /// The socket will not be non-blocking.
    pub(in super::super) fn over(socket: UnixStream) -> io::Result<Self> {
        Ok(Self { stream: FrameStream::new(socket)?, watched: false, passt: None })
    }
}

impl Backend for PasstBackend {
    fn features(&self) -> u64 {
        FEATURES | feature::MTU
    }

    fn child(&self) -> Option<u32> {
        self.passt.as_ref().map(|passt| passt.child.id())
    }

    fn mtu(&self) -> u16 {
        MTU
    }

    fn start(&mut self, features: u64, _active: bool) {
        self.stream.start(features);
    }

    fn register(&mut self, ops: &mut EventOps<'_>) {
        if !self.stream.is_lost() {
            self.stream.assume_ready();
            watch(ops, self.stream.socket(), PEER);
            self.watched = true;
        }
    }

    fn event(&mut self, _token: u32, set: EventSet) {
        self.stream.event(set);
    }

    fn settle(&mut self, ops: &mut EventOps<'_>) {
        if self.stream.is_lost() && std::mem::take(&mut self.watched) {
            unwatch(ops, self.stream.socket());
            let words = self.passt.take().map(|mut passt| passt.last_words());
            tracing::warn!("net: passt is gone, the link is down: {}", words.unwrap_or_default());
        }
    }

    fn is_up(&self) -> bool {
        !self.stream.is_lost()
    }

    fn peek(&mut self) -> Option<Incoming<'_>> {
        self.stream.peek()
    }

    fn consume(&mut self) {
        self.stream.consume();
    }

    fn can_send(&mut self) -> bool {
        self.stream.can_send()
    }

    fn send(&mut self, header: &Header, frame: &mut dyn Read, len: usize) -> &[u8] {
        self.stream.send(header, frame, len)
    }

    fn flush(&mut self) {
        self.stream.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passt_that_is_not_there_or_dies_is_said_in_one_line() {
        let mac = MacAddress::random().unwrap();
        let error =
            |program| PasstBackend::open_program(program, &[], mac).unwrap_err().to_string();
        assert!(error("passt-that-is-not-there").contains("apt install passt"));
        let dies = error("/bin/false");
        assert!(dies.contains("without a word (exit status: 1)"), "{dies}");
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let forward = format!("tcp:{port}:22").parse().unwrap();
        let refused =
            PasstBackend::open_program("/bin/true", &[forward], mac).unwrap_err().to_string();
        assert!(refused.contains("choose another host port"), "{refused}");
    }

    #[test]
    fn passt_may_keep_as_much_as_the_host_allows() {
        let most = fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap();
        let most: usize = most.trim().parse().unwrap();
        let (_, theirs) = cable().unwrap();
        // The kernel doubles what is asked for, to have room for its own data (socket(7)).
        let size = sockopt::socket_send_buffer_size(&theirs).unwrap();
        assert!(size >= 2 * most.min(SOCKET_BUFFER), "{size} of {most}");
    }

    fn running() -> Option<PasstBackend> {
        match PasstBackend::open(&[], MacAddress::random().unwrap()) {
            Err(NetError::PasstMissing) => {
                // Not through the test harness, which would keep it to itself.
                let _ =
                    writeln!(io::stderr(), "SKIPPED: passt is not installed: apt install passt");
                None
            }
            other => Some(other.unwrap()),
        }
    }

    #[test]
    fn passt_ends_with_the_card() {
        let Some(backend) = running() else { return };
        let process = format!("/proc/{}", backend.passt.as_ref().unwrap().child.id());
        assert!(fs::exists(&process).unwrap());
        drop(backend);
        assert!(!fs::exists(&process).unwrap());
    }

    #[test]
    fn passt_ends_when_this_process_is_killed() {
        let Some(backend) = running() else { return };
        let PasstBackend { stream, mut passt, .. } = backend;
        // What the kernel does to a process that is killed: close its sockets.
        drop(stream);
        let child = &mut passt.as_mut().unwrap().child;
        let deadline = Instant::now() + Duration::from_secs(20);
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "passt goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_passt_that_dies_is_a_link_that_is_down() {
        let Some(mut backend) = running() else { return };
        backend.passt.as_mut().unwrap().child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while backend.is_up() {
            assert!(Instant::now() < deadline, "the link stays up");
            backend.event(PEER, EventSet::IN);
            while backend.peek().is_some() {
                backend.consume();
            }
        }
        assert!(backend.can_send());
        assert!(backend.send(&Header::default(), &mut &[0; 60][..], 60).is_empty());
    }

    #[test]
    fn default_routes_are_found_in_the_kernels_tables() {
        let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n";
        let table = |rows: &str| default_route_v4(&format!("{head}{rows}"));
        assert!(!table(""));
        assert!(table("eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\n"));
        assert!(!table("eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n"));
        let zero = "00000000000000000000000000000000";
        let row = |to, prefix, device| {
            format!("{to} {prefix} {zero} 00 {zero} 00000400 00000002 00000000 00000003 {device}\n")
        };
        assert!(default_route_v6(&row(zero, "00", "eth0")));
        assert!(!default_route_v6(&row(zero, "00", "lo")));
        assert!(!default_route_v6(&row(zero, "40", "eth0")));
        assert!(!default_route_v6(&row("fd000000000000000000000000000000", "00", "eth0")));
    }
}
