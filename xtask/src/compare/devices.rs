//! `cargo xtask compare devices`: disk and network of lguest beside those of QEMU without KVM:
//! the same kernel, programs and images, the same passt, alternating.
//!
//! Beside what the guest measures stands where the monitor's processor time goes: to the
//! threads of vCPUs, which is the CPU engine with what devices do on them, or to all others,
//! which is devices only.

use super::{host, median, record};
use crate::measure::{TICKS_PER_SECOND, processor_time, ticks};
use crate::qemu::Qemu;
use crate::running::Running;
use crate::soak::{Place, disks, sink};
use crate::{debian_image, progress, soak};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Measure disks and networks against QEMU without KVM
#[derive(Args, Debug)]
pub(super) struct Options {
    /// Runs of each
    #[arg(long, value_name = "N", default_value = "3")]
    runs: u32,
    /// Length of each measurement
    #[arg(long, value_name = "SECONDS", default_value = "5")]
    seconds: u32,
    /// Write the result into docs/performance.md
    #[arg(long)]
    record: bool,
}

const BEGIN: &str = "<!-- recorded by cargo xtask compare devices: begin -->";
const END: &str = "<!-- recorded by cargo xtask compare devices: end -->";

const LIMIT: Duration = Duration::from_secs(300);
const SIZE: u64 = 256 << 20;

/// What is measured: the job's name for it, ours, the unit, and whether more is better.
const MEASURED: [(&str, &str, &str, bool); 8] = [
    ("seq-read", "sequential read, 256 KiB, 8 in flight", "KiB/s", true),
    ("seq-write", "sequential write, 256 KiB, 8 in flight", "KiB/s", true),
    ("rand-read", "random read, 4 KiB, 16 in flight", "IOPS", true),
    ("rand-write", "random write, 4 KiB, 16 in flight", "IOPS", true),
    ("sync-read", "random read, 4 KiB, one at a time", "IOPS", true),
    ("net-up", "iperf3, guest to host", "Mbit/s", true),
    ("net-down", "iperf3, host to guest", "Mbit/s", true),
    ("round-trip", "a byte to the host and back", "us", false),
];

/// One measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Value {
    value: f64,
    /// Processor seconds by seconds, of vCPU threads and of all others.
    vcpus: f64,
    devices: f64,
}

/// A child that ends with the value.
#[derive(Debug)]
struct Passt(Child);

impl Drop for Passt {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `cargo xtask compare devices`
pub(super) fn compare(options: &Options) -> Result<()> {
    let place = Place::prepare("compare", debian_image::for_tests)?;
    let qemu = Qemu::find()?;
    let iperf = soak::network::Iperf::find()?;
    let (port, echo) = (sink::free_port()?, sink::echo()?);
    let _server = iperf.serve(port)?;
    let script = [
        format!("address=dhcp mib=0 port={port} echo={echo} seconds={}", options.seconds),
        include_str!("../../../guests/jobs/network.sh").to_owned(),
        include_str!("../../../guests/jobs/devices.sh").to_owned(),
    ];
    let initrd = place.job("devices", &script.join("\n"))?;
    let scratch = place.path("scratch.raw");
    disks::Format::Raw.create(&scratch, SIZE)?;

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 1..=options.runs {
        let count = format!("{run}/{}", options.runs);
        let mut command = place.run(&initrd, "");
        place.with_debian(&mut command);
        command.args(["--disk", &disks::disk(&scratch, disks::Format::Raw, "scratch")]);
        command.args(["--net", "user"]);
        let measured = || measure(command, "lguest");
        ours.push(progress::step(&format!("lguest, run {count}"), measured)?);

        let socket = std::env::temp_dir().join(format!("lguest-passt-{}", std::process::id()));
        let _passt = passt(&socket)?;
        let command = with_qemu(&qemu, &place, &initrd, &scratch, &socket);
        theirs.push(progress::step(&format!("QEMU, run {count}"), || measure(command, "QEMU"))?);
    }
    fs::remove_file(&scratch)?;
    let setting = format!(
        "{}; 1 vCPU, 512 MiB; {} runs each of {} s a line, alternating; medians. {}, `-accel tcg \
         -cpu max -M q35`, virtio-blk-pci and virtio-net-pci, `-netdev stream` to the same passt.",
        host(),
        options.runs,
        options.seconds,
        qemu.version()?
    );
    let report = report(&ours, &theirs, &setting);
    println!("{report}");
    if options.record {
        record(BEGIN, END, &report)?;
    }
    Ok(())
}

/// passt for QEMU, which connects to it.
fn passt(socket: &Path) -> Result<Passt> {
    let _ = fs::remove_file(socket);
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--one-off", "--socket"]).arg(socket);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let passt = command.spawn().context("cannot run passt: apt-get install passt")?;
    let passt = Passt(passt);
    let end = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        if Instant::now() > end {
            bail!("passt does not listen at {}", socket.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(passt)
}

fn with_qemu(
    qemu: &Qemu,
    place: &Place,
    initrd: &PathBuf,
    scratch: &Path,
    socket: &Path,
) -> Command {
    let mut command = qemu.command();
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "512M", "-M", "q35"])
        .args(["-name", "guest,debug-threads=on", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&place.kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 panic=-1 lguest.mode=job quiet"]);
    Qemu::disk(&mut command, &place.debian, "debian", true);
    Qemu::disk(&mut command, scratch, "scratch", false);
    command
        .arg("-netdev")
        .arg(format!("stream,id=net,server=off,addr.type=unix,addr.path={}", socket.display()))
        .args(["-device", "virtio-net-pci,netdev=net,romfile="]);
    command
}

/// Runs the job and reads the process's clocks between its lines.
fn measure(command: Command, name: &str) -> Result<Vec<Value>> {
    let mut guest = Running::start(command, name)?;
    let mut values = Vec::new();
    for (name, ..) in MEASURED {
        let begin = format!("init: begin {name}");
        guest.wait_for(&begin, LIMIT, |line| line.ends_with(&begin).then_some(()))?;
        let (vcpus, devices) = clocks(guest.pid())?;
        let start = Instant::now();
        let end = format!("init: end {name} ");
        let (_, value) = guest
            .wait_for(&end, LIMIT, |line| line.split_once(&end)?.1.trim().parse::<f64>().ok())?;
        let took = start.elapsed().as_secs_f64();
        let after = clocks(guest.pid())?;
        let (vcpus, devices) = ((after.0 - vcpus) / took, (after.1 - devices) / took);
        values.push(Value { value, vcpus, devices });
    }
    guest.finish(LIMIT)?;
    Ok(values)
}

/// Processor seconds of vCPU threads (lguest's are called vcpu0, QEMU's "CPU 0/TCG") and of
/// all others, those that have ended too.
fn clocks(pid: u32) -> Result<(f64, f64)> {
    let mut vcpus = 0.0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end at any time.
        let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
        let name = stat.split_once('(').map_or("", |(_, name)| name);
        if name.starts_with("vcpu") || name.starts_with("CPU ") {
            vcpus += ticks(&stat)? / TICKS_PER_SECOND;
        }
    }
    Ok((vcpus, processor_time(pid)? - vcpus))
}

/// The medians of measurement number `at`.
fn middle(runs: &[Vec<Value>], at: usize) -> Value {
    let of = |part: fn(&Value) -> f64| {
        median(&mut runs.iter().filter_map(|run| run.get(at)).map(part).collect::<Vec<_>>())
    };
    Value { value: of(|v| v.value), vcpus: of(|v| v.vcpus), devices: of(|v| v.devices) }
}

fn report(ours: &[Vec<Value>], theirs: &[Vec<Value>], setting: &str) -> String {
    let mut lines = vec![
        setting.to_owned(),
        String::new(),
        "| | lguest | QEMU TCG | ratio | lguest: vCPU + device threads | QEMU: the same |".into(),
        "|---|---|---|---|---|---|".into(),
    ];
    for (at, (_, what, unit, more)) in MEASURED.iter().enumerate() {
        let (ours, theirs) = (middle(ours, at), middle(theirs, at));
        let better = if *more { "" } else { " (less is better)" };
        let share = |value: &Value| {
            let all = (value.vcpus + value.devices).max(f64::MIN_POSITIVE);
            let part = 100.0 * value.devices / all;
            format!("{:.2} + {:.2} cores ({part:.0} % devices)", value.vcpus, value.devices)
        };
        lines.push(format!(
            "| {what}{better} | {:.0} {unit} | {:.0} {unit} | {:.2} | {} | {} |",
            ours.value,
            theirs.value,
            ours.value / theirs.value,
            share(&ours),
            share(&theirs)
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_threads_are_no_vcpus() {
        // A thread that computes has used a tick in the end, however busy the machine is.
        let (vcpus, _) = loop {
            let now = clocks(std::process::id()).unwrap();
            if now.1 > 0.0 {
                break now;
            }
        };
        assert_eq!(vcpus, 0.0);
    }

    #[test]
    fn every_measurement_has_a_line_with_its_ratio() {
        let run = |value| vec![Value { value, vcpus: 0.75, devices: 0.25 }; MEASURED.len()];
        let text = report(&[run(1.0), run(9.0), run(3.0)], &[run(6.0)], "setting");
        assert_eq!(text.matches("| 0.50 | 0.75 + 0.25 cores (25 % devices) |").count(), 8);
    }
}
