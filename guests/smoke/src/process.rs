//! Processes: fork and copy-on-write, exec, wait, pipes.

use crate::{Outcome, ensure};
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, thread};

/// A pipe carries 256 KiB, more than it holds at once, between two threads.
pub fn pipe() -> Outcome {
    const LEN: usize = 256 * 1024;
    let mut ends = [0i32; 2];
    // SAFETY: `ends` is the two integers pipe(2) fills in.
    let result = unsafe { libc::pipe(ends.as_mut_ptr()) };
    ensure!(result == 0, "pipe: {}", io::Error::last_os_error());
    // SAFETY: both descriptors are new and owned by nobody else.
    let (mut read_end, mut write_end) =
        unsafe { (fs::File::from_raw_fd(ends[0]), fs::File::from_raw_fd(ends[1])) };
    let sent: Vec<u8> = (0..LEN).map(|i| (i * 7 % 251) as u8).collect();
    let mut received = Vec::new();
    thread::scope(|scope| {
        let sent = &sent;
        let writer = scope.spawn(move || write_end.write_all(sent));
        let read = read_end.read_to_end(&mut received).map(drop);
        writer.join().map_err(|_| io::Error::other("the writer panicked"))?.and(read)
    })
    .map_err(|error| error.to_string())?;
    ensure!(received == sent, "{} bytes came out, not the same as the {LEN} sent", received.len());
    Ok(())
}

/// Children see memory as it was at the fork, and what they write stays theirs.
pub fn fork_copies_memory() -> Outcome {
    static SHARED: AtomicU64 = AtomicU64::new(0);
    const CHILDREN: u64 = 8;
    SHARED.store(41, Ordering::SeqCst);
    let mut pids = Vec::new();
    for child in 0..CHILDREN {
        // SAFETY: this process has one thread here; the child only touches an atomic and
        // calls _exit, both safe after fork.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let seen = SHARED.fetch_add(child + 1, Ordering::SeqCst);
            let after = SHARED.load(Ordering::SeqCst);
            let good = seen == 41 && after == 42 + child;
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(if good { 10 + child as i32 } else { 1 }) };
        }
        ensure!(pid > 0, "fork: {}", io::Error::last_os_error());
        pids.push(pid);
    }
    for (child, pid) in pids.into_iter().enumerate() {
        let mut status = 0;
        // SAFETY: waits for our own child; `status` is live.
        let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
        ensure!(waited == pid, "waitpid: {}", io::Error::last_os_error());
        let code = libc::WEXITSTATUS(status);
        ensure!(libc::WIFEXITED(status) && code == 10 + child as i32, "child {child}: {status:#x}");
    }
    ensure!(SHARED.load(Ordering::SeqCst) == 41, "a child wrote to the parent's memory");
    Ok(())
}

/// Runs this program again, three times, and busybox if it is there.
pub fn exec_and_wait() -> Outcome {
    for status in [0, 7, 42] {
        let result = Command::new("/proc/self/exe").args(["child", &status.to_string()]).status();
        let code = result.map_err(|error| format!("exec of /proc/self/exe: {error}"))?.code();
        ensure!(code == Some(status), "the child ended with {code:?}, not {status}");
    }
    if fs::exists("/bin/busybox").unwrap_or(false) {
        let output = Command::new("/bin/busybox")
            .args(["echo", "from", "busybox"])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("exec of busybox: {error}"))?;
        ensure!(output.stdout == b"from busybox\n", "busybox said {:?}", output.stdout);
    }
    Ok(())
}
