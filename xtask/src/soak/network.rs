//! `soak transfer` and `soak iperf`: much data between a guest and this host through `user`,
//! and between two guests.

use super::{Place, sink};
use crate::private_tree::Program;
use crate::progress;
use crate::running::Running;
use anyhow::{Context, Result, bail, ensure};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(900);
/// How long a guest may take to boot and to listen.
const BOOT: Duration = Duration::from_secs(120);
/// Ports within guests.
const PORT: u16 = 5201;
/// Addresses of two guests that are joined.
const FIRST: &str = "10.9.0.1";
const SECOND: &str = "10.9.0.2";

/// A job on the network: `settings`, then network.sh, then `script`.
fn job(place: &Place, name: &str, settings: &str, script: &str) -> Result<PathBuf> {
    let network = include_str!("../../../guests/jobs/network.sh");
    place.job(name, &format!("{settings}\n{network}\n{script}"))
}

/// The guest's checksum and length: the rest of the only line that contains `what`.
fn checksum(guest: &Running, what: &str) -> Result<String> {
    let line = guest.said(what).next().and_then(|line| line.split_once(what));
    Ok(line.with_context(|| format!("no line with {what}"))?.1.to_owned())
}

fn listens(guest: &mut Running) -> Result<()> {
    let (words, listening) = ("init: listening", |line: &str| line.contains("init: listening"));
    guest.wait_for(words, BOOT, |line| listening(line).then_some(()))?;
    Ok(())
}

/// Runs `work` and says how fast so many MiB passed in it.
fn timed<T>(what: &str, mib: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let done = work()?;
    println!("  {what}: {mib} MiB in {:.1} s", start.elapsed().as_secs_f64());
    Ok(done)
}

/// `soak transfer`
pub(super) fn transfer(place: &Place, mib: u64) -> Result<()> {
    let script = include_str!("../../../guests/jobs/transfer.sh");
    let settings =
        |address: &str, steps: &str| format!("address={address} mib={mib} steps='{steps}'");

    // Over a connection that the host opens, then over one that the guest opens, each way.
    let (sends, sends_at) = sink::listen()?;
    let (takes, takes_at) = sink::listen()?;
    let steps = format!("receive={PORT} send=gateway:{takes_at} fetch=gateway:{sends_at}");
    let initrd = job(place, "transfer", &settings("dhcp", &steps), script)?;
    let forward = sink::free_port()?;
    let mut command = place.run(&initrd, "");
    place.with_debian(&mut command);
    command.args(["--net", &format!("user,fwd=tcp:127.0.0.1:{forward}:{PORT}")]);
    let mut guest = Running::start(command, "transfer by user")?;
    listens(&mut guest)?;
    let sent = timed("host to guest by fwd=", mib, || {
        sink::send(TcpStream::connect((Ipv4Addr::LOCALHOST, forward))?, mib)
    })?;
    let received = timed("guest to host by the gateway", mib, || {
        sink::receive(accept(&takes, &mut guest, "send=")?)
    })?;
    let fetched = timed("host to guest by the gateway", mib, || {
        sink::send(accept(&sends, &mut guest, "fetch=")?, mib)
    })?;
    guest.finish(LIMIT)?;
    let ends: Vec<_> = guest.said("init: received ").collect();
    let ok = ends.len() == 2 && ends[0].ends_with(&sent) && ends[1].ends_with(&fetched);
    ensure!(ok, "the guest received {ends:?}, the host sent {sent} and {fetched}");
    ensure!(checksum(&guest, "init: sent ")? == received, "the host received other bytes");

    between_guests(
        place,
        "transfer",
        |address, steps| {
            let steps = match steps {
                None => format!("receive={PORT} send={SECOND}:{}", PORT + 1),
                Some(()) => format!("send={FIRST}:{PORT} receive={}", PORT + 1),
            };
            job(
                place,
                &format!("transfer-{address}"),
                &settings(&format!("{address}/24"), &steps),
                script,
            )
        },
        |first, second| {
            timed("between two guests, both ways", 2 * mib, || {
                second.finish(LIMIT)?;
                first.finish(LIMIT)
            })?;
            for (from, to) in [(&*first, &*second), (&*second, &*first)] {
                let (sent, received) =
                    (checksum(from, "init: sent ")?, checksum(to, "init: received ")?);
                ensure!(sent == received, "a guest sent {sent}, the other received {received}");
            }
            Ok(())
        },
    )
}

/// The guest's connection, once it begins with it; or what the guest says instead.
fn accept(listener: &std::net::TcpListener, guest: &mut Running, step: &str) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Some((_, line)) = guest.next_line(Instant::now() + Duration::from_millis(20))
            && line.contains("init: FAIL")
        {
            bail!("{line}: {:?}", guest.said("").collect::<Vec<_>>());
        }
    }
    bail!("the guest never came to {step}")
}

/// Boots two guests on one cable. `initrd` makes their jobs; `Some` for the second, which is
/// started when the first one listens.
fn between_guests(
    place: &Place,
    name: &str,
    initrd: impl Fn(&str, Option<()>) -> Result<PathBuf>,
    work: impl FnOnce(&mut Running, &mut Running) -> Result<()>,
) -> Result<()> {
    let cable = place.path(&format!("{name}.sock"));
    let start = |initrd: PathBuf, which: &str| {
        let mut command = place.run(&initrd, "");
        place.with_debian(&mut command);
        command.args(["--net", &format!("unix={}", cable.display())]);
        Running::start(command, &format!("{name}, {which} guest"))
    };
    let mut first = start(initrd(FIRST, None)?, "first")?;
    listens(&mut first)?;
    let mut second = start(initrd(SECOND, Some(()))?, "second")?;
    work(&mut first, &mut second)
}

/// A child that ends with the value.
#[derive(Debug)]
pub(crate) struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `soak iperf`
pub(super) fn iperf(place: &Place, seconds: u32) -> Result<()> {
    let script = include_str!("../../../guests/jobs/iperf.sh");
    let settings = |address: &str, server: &str| {
        format!("address={address} mib=0 server={server} seconds={seconds}")
    };
    let iperf3 = Iperf::find()?;

    // The guest is the client of a server here.
    let port = sink::free_port()?;
    let _server = iperf3.serve(port)?;
    let initrd = job(place, "iperf", &settings("dhcp", &format!("gateway:{port}")), script)?;
    let mut command = place.run(&initrd, "");
    place.with_debian(&mut command);
    command.args(["--net", "user"]);
    let mut guest = Running::start(command, "iperf3 by the gateway")?;
    progress::step("iperf3 by the gateway", || guest.finish(LIMIT))?;
    print_rates("by the gateway", &guest)?;

    // A client here, a server in the guest.
    let forward = sink::free_port()?;
    let initrd = job(place, "iperf", &settings("dhcp", ""), script)?;
    let mut command = place.run(&initrd, "");
    place.with_debian(&mut command);
    command.args(["--net", &format!("user,fwd=tcp:127.0.0.1:{forward}:{PORT}")]);
    let mut guest = Running::start(command, "iperf3 by fwd=")?;
    listens(&mut guest)?;
    // It says so just before it does.
    thread::sleep(Duration::from_secs(2));
    for (way, reverse) in [("host to guest", false), ("guest to host", true)] {
        let rate = progress::step(&format!("iperf3 by fwd=, {way}"), || {
            iperf3.client(forward, seconds, reverse)
        })?;
        println!("  by fwd=: {way} {rate} Mbit/s");
        thread::sleep(Duration::from_secs(2));
    }
    guest.finish(BOOT)?;

    between_guests(
        place,
        "iperf",
        |address, second| {
            let server = second.map_or_else(String::new, |()| format!("{FIRST}:{PORT}"));
            let settings = settings(&format!("{address}/24"), &server);
            job(place, &format!("iperf-{address}"), &settings, script)
        },
        |first, second| {
            progress::step("iperf3 between two guests", || second.finish(LIMIT))?;
            first.finish(BOOT)?;
            print_rates("between two guests", second)
        },
    )
}

fn print_rates(what: &str, guest: &Running) -> Result<()> {
    let rates: Vec<_> = guest.said("Mbit/s").collect();
    ensure!(rates.len() == 2, "{what}: {rates:?} are not two rates");
    for rate in rates {
        println!("  {what}: {}", rate.trim_start_matches("init: "));
    }
    Ok(())
}

/// iperf3 on this host.
#[derive(Debug)]
pub(crate) struct Iperf(Program);

impl Iperf {
    /// Finds or fetches it.
    pub(crate) fn find() -> Result<Self> {
        Ok(Self(Program::find("iperf3", "--version", "iperf3")?))
    }

    /// A server on this host's loopback.
    pub(crate) fn serve(&self, port: u16) -> Result<Server> {
        let mut command = self.0.command();
        command.args(["-s", "-B", "127.0.0.1", "-p", &port.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Server(command.spawn().context("cannot run iperf3")?))
    }
    /// Returns the rate that the receiver saw.
    fn client(&self, port: u16, seconds: u32, reverse: bool) -> Result<String> {
        let mut command: Command = self.0.command();
        command.args(["-c", "127.0.0.1", "-f", "m", "-p", &port.to_string()]);
        command.args(["-t", &seconds.to_string()]);
        if reverse {
            command.arg("-R");
        }
        let output = command.output().context("cannot run iperf3")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find(|line| line.contains("receiver"));
        let words: Vec<_> = line.unwrap_or_default().split_whitespace().collect();
        let at =
            words.iter().position(|word| *word == "Mbits/sec").and_then(|at| at.checked_sub(1));
        let rate = at.and_then(|at| words.get(at));
        let said = || format!("iperf3: {text}{}", String::from_utf8_lossy(&output.stderr));
        Ok((*rate.with_context(said)?).to_owned())
    }
}
