//! What each kind of thread may ask of the kernel, and why.
//!
//! Found by reading what the threads do and by `strace` over all that the project runs: boots
//! with every kind of disk and network, resizes, dumps, panics, and every way out. Whoever
//! adds a system call to code that runs while a guest does adds it here.
//!
//! Nothing here opens a file, maps memory to execute, or starts a thread or a process.

use super::Needs;
use super::rule::{Rule, allow, refuse};
use std::iter;
use syscalls::Sysno;

/// `TUNSETOFFLOAD` and `TUNSETQUEUE` (linux/if_tun.h).
const TAP_REQUESTS: [u32; 2] = [0x4004_54d0, 0x4004_54d9];
/// `ARCH_SET_GS` (asm/prctl.h).
const ARCH_SET_GS: u32 = 0x1001;
/// `SECCOMP_SET_MODE_FILTER` (linux/seccomp.h).
const SET_MODE_FILTER: u32 = 1;

/// What every thread needs to live, to be told of a signal, and to die.
fn everyone() -> Vec<Rule> {
    let own = std::process::id();
    let mut rules = vec![
        allow(Sysno::futex, "locks, and waiting for each other"),
        allow(Sysno::sched_yield, "between two tries"),
        allow(Sysno::clock_nanosleep, "sleeping"),
        allow(Sysno::nanosleep, "sleeping, older C libraries"),
        allow(Sysno::restart_syscall, "a sleep goes on after a stop"),
        allow(Sysno::clock_gettime, "the time, where the vDSO cannot tell it"),
        allow(Sysno::write, "waking by eventfd; the console, logs, stderr"),
        allow(Sysno::writev, "the same in pieces"),
        allow(Sysno::read, "eventfds, timers, tap; what is typed"),
        allow(Sysno::close, "whatever is done with"),
        allow(Sysno::fcntl, "debug builds look whether what they close is open")
            .only(1, libc::F_GETFD as u32),
        allow(Sysno::brk, "the heap"),
        allow(Sysno::mmap, "the heap, and stacks for signals: never code, never files")
            .without(2, libc::PROT_EXEC as u32)
            .with(3, libc::MAP_ANONYMOUS as u32),
        allow(Sysno::mprotect, "the heap of a thread grows; guard pages: never code")
            .without(2, libc::PROT_EXEC as u32),
        allow(Sysno::mremap, "large vectors grow"),
        allow(Sysno::munmap, "the heap; the stack of a thread that ends"),
        allow(Sysno::madvise, "memory goes back to the host"),
        allow(Sysno::getrandom, "keys of hash maps; the guest's entropy"),
        allow(Sysno::sched_getaffinity, "how many heaps the C library should have"),
        allow(Sysno::getpid, "a signal to ourselves"),
        allow(Sysno::gettid, "locks that know their owner; a signal to ourselves"),
        allow(Sysno::sendto, "a signal's handler wakes the thread that takes it").null(4),
        allow(Sysno::rt_sigreturn, "back from a signal's handler"),
        allow(Sysno::rt_sigprocmask, "no signals while a thread ends"),
        allow(Sysno::sigaltstack, "the stack for signals of a thread that ends"),
        allow(Sysno::tgkill, "abort: SIGABRT to ourselves")
            .only(0, own)
            .only(2, libc::SIGABRT as u32),
        allow(Sysno::ioctl, "the terminal as it was, in a panic").only(1, libc::TCSETS as u32),
        allow(Sysno::ioctl, "the same, newer").only(1, libc::TCSETS2 as u32),
        allow(Sysno::prctl, "the name of a thread that broke the rules")
            .only(0, libc::PR_GET_NAME as u32),
        allow(Sysno::exit, "the end of a thread"),
        allow(Sysno::exit_group, "the end"),
    ];
    let fatal = [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS];
    let dying = "what is fatal is fatal again, once it has been said";
    rules.extend(fatal.map(|signal| allow(Sysno::rt_sigaction, dying).only(0, signal as u32)));
    rules.extend(refused());
    rules
}

/// What libraries try and can do without: the C library asks how the host overcommits memory
/// when a heap shrinks, and who prints a backtrace looks for symbols. Threads and processes
/// are not started either, but the C library blocks all signals around that, so that nobody
/// could be told of a violation; an error reaches whoever has forgotten this.
fn refused() -> Vec<Rule> {
    let start = "none starts while a guest runs";
    let writes = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u32;
    let (heap, symbols) = ("/proc/sys/vm/overcommit_memory", "where a backtrace's symbols are");
    vec![
        refuse(Sysno::openat, heap).without(2, writes),
        refuse(Sysno::open, heap).without(1, writes),
        refuse(Sysno::readlink, symbols),
        refuse(Sysno::readlinkat, symbols),
        refuse(Sysno::getcwd, symbols),
        refuse(Sysno::access, symbols),
        refuse(Sysno::stat, symbols),
        refuse(Sysno::lstat, symbols),
        refuse(Sysno::newfstatat, symbols),
        refuse(Sysno::clone, start),
        refuse(Sysno::clone3, start),
    ]
}

fn set_timer() -> Rule {
    allow(Sysno::timerfd_settime, "the timers of devices")
}

/// Files of disks: vCPUs flush when a driver resets, I/O threads do what is quick, a disk's
/// own threads the rest, and the main thread flushes at the end.
fn disks() -> Vec<Rule> {
    vec![
        allow(Sysno::preadv, "reads"),
        allow(Sysno::preadv2, "reads that need no waiting"),
        allow(Sysno::pwritev, "writes"),
        allow(Sysno::pwritev2, "writes that need no waiting"),
        allow(Sysno::fdatasync, "flushes"),
        allow(Sysno::fallocate, "discards, zeroes"),
        allow(Sysno::ftruncate, "a qcow2 image grows"),
        allow(Sysno::statx, "how long an open image is").with(2, libc::AT_EMPTY_PATH as u32),
    ]
}

/// A driver starts or stops queues of a tap interface.
fn taps() -> impl Iterator<Item = Rule> {
    TAP_REQUESTS
        .into_iter()
        .map(|request| allow(Sysno::ioctl, "offloads and queues of a tap").only(1, request))
}

/// A socket that joins two guests: the other one leaves, and the next is met or waited for.
/// The filter cannot see where `connect` leads; only guests with such a network have this.
fn meetings() -> Vec<Rule> {
    let stream = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    let bare = allow(Sysno::socket, "a stream on this host").only(0, libc::AF_UNIX as u32);
    vec![
        bare.clone().only(1, stream as u32),
        bare.only(1, (stream | libc::SOCK_NONBLOCK) as u32),
        allow(Sysno::connect, "joins who listens"),
        allow(Sysno::bind, "listens where nobody does"),
        allow(Sysno::listen, "the same"),
        allow(Sysno::accept4, "takes a peer"),
        allow(Sysno::ioctl, "a peer's socket does not wait").only(1, libc::FIONBIO as u32),
        allow(Sysno::poll, "whether a peer has left"),
        allow(Sysno::ppoll, "the same"),
        allow(Sysno::flock, "one at a time in the socket's folder"),
        allow(Sysno::statx, "whether the socket there is still ours")
            .with(2, libc::AT_SYMLINK_NOFOLLOW as u32),
        removal(),
    ]
}

fn removal() -> Rule {
    allow(Sysno::unlink, "a socket goes with its listener, the file with counters with the run")
}

/// passt is ended, and waited for.
fn children(needs: &Needs) -> impl Iterator<Item = Rule> {
    let kill = |pid: &u32| {
        allow(Sysno::kill, "passt ends with its card").only(0, *pid).only(1, libc::SIGKILL as u32)
    };
    let wait = (!needs.children.is_empty()).then(|| allow(Sysno::wait4, "until passt has ended"));
    needs.children.iter().map(kill).chain(wait)
}

/// What a store to a device's register may come to.
fn devices_at_hand(needs: &Needs) -> impl Iterator<Item = Rule> {
    let disks = needs.disk.then(disks).into_iter().flatten();
    disks.chain(needs.tap.then(taps).into_iter().flatten())
}

/// A thread that runs a vCPU.
pub(super) fn vcpu(needs: &Needs) -> Vec<Rule> {
    let own = [
        allow(Sysno::arch_prctl, "GS is the vCPU's for its translated code").only(0, ARCH_SET_GS),
        allow(Sysno::mmap, "guest RAM once more, for translated code: never code")
            .without(2, libc::PROT_EXEC as u32)
            .with(3, (libc::MAP_SHARED | libc::MAP_FIXED) as u32),
        allow(Sysno::pwrite64, "its counters, for `lguest top`"),
        allow(Sysno::eventfd2, "a driver starts a queue"),
        allow(Sysno::timerfd_create, "a driver starts a console, or the entropy device"),
        set_timer(),
    ];
    everyone().into_iter().chain(own).chain(devices_at_hand(needs)).collect()
}

/// The thread that waits for timers.
pub(super) fn timer() -> Vec<Rule> {
    let on_time =
        allow(Sysno::prctl, "to be woken on time").only(0, libc::PR_SET_TIMERSLACK as u32);
    everyone().into_iter().chain(iter::once(on_time)).collect()
}

/// The thread that translates for vCPUs: it has memory, locks and sleep, and needs no more.
pub(super) fn translator() -> Vec<Rule> {
    everyone()
}

/// A thread that does devices' work.
pub(super) fn device(needs: &Needs) -> Vec<Rule> {
    let own = [
        allow(Sysno::epoll_wait, "waiting for work"),
        allow(Sysno::epoll_pwait, "the same"),
        allow(Sysno::epoll_ctl, "what is waited for"),
        set_timer(),
        allow(Sysno::recvfrom, "frames from passt or a peer"),
    ];
    let meetings = needs.unix.then(meetings).into_iter().flatten();
    let rest = devices_at_hand(needs).chain(meetings).chain(children(needs));
    everyone().into_iter().chain(own).chain(rest).collect()
}

/// Whatever any thread of the process may do. The threads that nothing narrower holds are
/// the main one, which takes the machine apart at the end, and those of the terminal.
pub(super) fn process(needs: &Needs) -> Vec<Rule> {
    let starting = "of a thread that has just been started when the filter comes";
    let entering = "a thread enters a narrower filter";
    let own = [
        removal(),
        allow(Sysno::ioctl, "the window's size").only(1, libc::TIOCGWINSZ as u32),
        allow(Sysno::kill, "stops itself, for ^Z from outside")
            .only(0, std::process::id())
            .only(1, libc::SIGSTOP as u32),
        allow(Sysno::rseq, starting),
        allow(Sysno::set_robust_list, starting),
        allow(Sysno::prctl, starting).only(0, libc::PR_SET_NAME as u32),
        allow(Sysno::prctl, entering).only(0, libc::PR_SET_NO_NEW_PRIVS as u32),
        allow(Sysno::seccomp, entering).only(0, SET_MODE_FILTER),
    ];
    let mut rules: Vec<Rule> = Vec::new();
    for rule in
        [vcpu(needs), timer(), translator(), device(needs), own.into()].into_iter().flatten()
    {
        if !rules.contains(&rule) {
            rules.push(rule);
        }
    }
    rules
}
