//! What the filters let pass, asked of the BPF programs themselves.

use super::bpf::{X86_64, passes, verdict};
use super::*;
use std::collections::{BTreeMap, BTreeSet};
use syscalls::Sysno;

fn lists() -> [(&'static str, Vec<Rule>); 4] {
    let needs = everything();
    [
        ("process", lists::process(&needs)),
        ("vcpu", lists::vcpu(&needs)),
        ("timer", lists::timer()),
        ("device", lists::device(&needs)),
    ]
}

fn strict() -> Filters {
    Filters::new(true, false, &everything()).unwrap()
}

#[test]
fn every_rule_is_there_once_and_says_why() {
    for (name, rules) in lists() {
        let mut calls: BTreeMap<Sysno, Vec<&Rule>> = BTreeMap::new();
        for rule in &rules {
            assert!(rule.why().len() > 4, "{name}: {rule:?}");
            let same = calls.entry(rule.call()).or_default();
            assert!(!same.contains(&rule), "{name}: twice {rule:?}");
            same.push(rule);
        }
        for (call, same) in calls {
            let alone = same.len() == 1 || same.iter().all(|rule| !rule.is_unconditional());
            assert!(alone, "{name}: {call} is unconditional, and then again with conditions");
        }
    }
}

#[test]
fn a_program_has_room_to_spare() {
    let filters = strict();
    let programs = [&filters.vcpu, &filters.timer, &filters.device];
    for program in programs.into_iter().chain(&filters.process) {
        // The kernel takes 4096 (BPF_MAXINSNS).
        assert!((10..1024).contains(&program.len()), "{}", program.len());
    }
}

#[test]
fn what_no_rule_names_is_a_violation_on_any_thread() {
    let (filters, trap) = (strict(), u32::from(SeccompAction::Trap));
    let named: BTreeSet<u32> = lists()
        .iter()
        .flat_map(|(_, rules)| rules.iter().map(|rule| rule.call().id() as u32))
        .collect();
    for number in (0..1024).filter(|number| !named.contains(number)) {
        assert_eq!(verdict(&filters.process[0], number, X86_64, [0; 6]), trap, "{number}");
    }
    for call in [
        Sysno::execve,
        Sysno::execveat,
        Sysno::fork,
        Sysno::vfork,
        Sysno::ptrace,
        Sysno::process_vm_writev,
        Sysno::openat2,
        Sysno::creat,
        Sysno::memfd_create,
        Sysno::pkey_mprotect,
        Sysno::io_uring_setup,
        Sysno::bpf,
        Sysno::mount,
        Sysno::setuid,
        Sysno::unshare,
        Sysno::sendmsg,
        Sysno::personality,
    ] {
        assert!(!named.contains(&(call.id() as u32)), "{call} is listed");
    }
}

#[test]
fn other_system_call_tables_are_no_way_round() {
    let filters = strict();
    let kill = u32::from(SeccompAction::KillProcess);
    // int 0x80 of a 32-bit program; and x32, which marks its numbers.
    assert_eq!(verdict(&filters.process[0], 4, 0x4000_0003, [0; 6]), kill);
    assert!(!passes(&filters.process[0], 0x4000_0001, [0; 6]));
}

#[test]
fn a_thread_may_do_nothing_that_the_process_may_not() {
    let (needs, filters) = (everything(), strict());
    let values = [0, 1, 2, 3, 4, 6, 7, 9, 11, 31, 0x22, 0x1000, 0x1001, 0x5402, u64::MAX];
    for (program, rules) in [
        (&filters.vcpu, lists::vcpu(&needs)),
        (&filters.timer, lists::timer()),
        (&filters.device, lists::device(&needs)),
    ] {
        for call in rules.iter().map(|rule| rule.call().id() as u32) {
            for (one, two) in values.iter().flat_map(|one| values.map(|two| (*one, two))) {
                let arguments = [one, two, one, two, one, two];
                let allowed = passes(program, call, arguments);
                assert!(!allowed || passes(&filters.process[0], call, arguments), "{call}");
            }
        }
    }
}

#[test]
fn arguments_are_looked_at() {
    let filters = strict();
    let process = &filters.process[0];
    let call = |call: Sysno, arguments: [i64; 6]| {
        passes(process, call.id() as u32, arguments.map(|argument| argument as u64))
    };
    let (read, write, execute) = (1, 2, 4);
    let anonymous = 0x22;
    assert!(call(Sysno::mmap, [0, 4096, read | write, anonymous, -1, 0]));
    assert!(!call(Sysno::mmap, [0, 4096, read | execute, anonymous, -1, 0]));
    assert!(!call(Sysno::mmap, [0, 4096, read, 1, 3, 0]), "maps a file");
    assert!(call(Sysno::mprotect, [4096, 4096, read | write, 0, 0, 0]));
    assert!(!call(Sysno::mprotect, [4096, 4096, read | write | execute, 0, 0, 0]));

    let own = i64::from(std::process::id());
    assert!(call(Sysno::tgkill, [own, 1, 6, 0, 0, 0]));
    assert!(!call(Sysno::tgkill, [own + 1, 1, 6, 0, 0, 0]));
    assert!(call(Sysno::kill, [4_000_001, 9, 0, 0, 0, 0]));
    assert!(
        !call(Sysno::kill, [4_000_003, 9, 0, 0, 0, 0]) && !call(Sysno::kill, [-1, 9, 0, 0, 0, 0])
    );
    assert!(call(Sysno::kill, [own, 19, 0, 0, 0, 0]) && !call(Sysno::kill, [own, 9, 0, 0, 0, 0]));

    assert!(call(Sysno::sendto, [3, 4096, 1, 0, 0, 0]));
    assert!(!call(Sysno::sendto, [3, 4096, 1, 0, 1 << 40, 16]), "has an address");
    assert!(call(Sysno::rt_sigaction, [6, 4096, 0, 8, 0, 0]));
    assert!(!call(Sysno::rt_sigaction, [31, 4096, 0, 8, 0, 0]), "replaces the report");
    assert!(
        call(Sysno::openat, [-100, 4096, 0o2_000_000, 0, 0, 0]),
        "answered by the other filter"
    );
    assert!(!call(Sysno::openat, [-100, 4096, 1, 0, 0, 0]), "opens to write");
    assert!(!call(Sysno::openat, [-100, 4096, 0o100, 0, 0, 0]), "makes a file");
    assert!(call(Sysno::statx, [3, 4096, 0x1000, 0xfff, 4096, 0]), "an open file's");
    assert!(!call(Sysno::statx, [-100, 4096, 0, 0xfff, 4096, 0]), "any file's");
    assert!(call(Sysno::ioctl, [0, 0x5413, 0, 0, 0, 0]));
    assert!(!call(Sysno::ioctl, [0, 0x5412, 0, 0, 0, 0]), "types into the terminal");
    assert!(call(Sysno::socket, [1, 0o2_000_001, 0, 0, 0, 0]));
    assert!(!call(Sysno::socket, [2, 0o2_000_001, 0, 0, 0, 0]), "the network's");
    assert!(call(Sysno::arch_prctl, [0x1001, 0, 0, 0, 0, 0]));
    assert!(!call(Sysno::arch_prctl, [0x1002, 0, 0, 0, 0, 0]), "FS is the C library's");
}

#[test]
fn a_guest_without_devices_has_none_of_their_calls() {
    let bare = Filters::new(true, false, &Needs::default()).unwrap();
    let full = strict();
    for (call, arguments) in [
        (Sysno::pwritev, [0; 6]),
        (Sysno::fallocate, [0; 6]),
        (Sysno::wait4, [0; 6]),
        (Sysno::kill, [4_000_001, 9, 0, 0, 0, 0]),
        (Sysno::connect, [0; 6]),
        (Sysno::ioctl, [3, 0x4004_54d0, 0, 0, 0, 0]),
    ] {
        assert!(passes(&full.process[0], call.id() as u32, arguments), "{call}");
        assert!(!passes(&bare.process[0], call.id() as u32, arguments), "{call}");
    }
    // And a vCPU never has the calls of those who do the work.
    let others = [
        Sysno::epoll_wait,
        Sysno::recvfrom,
        Sysno::wait4,
        Sysno::connect,
        Sysno::seccomp,
        Sysno::unlink,
    ];
    for call in others {
        assert!(!passes(&full.vcpu, call.id() as u32, [0; 6]), "{call}");
    }
}

#[test]
fn refusals_are_answered_and_nothing_else_is() {
    let filters = strict();
    let answers =
        |call: Sysno, arguments| verdict(&filters.process[1], call.id() as u32, X86_64, arguments);
    let refused = u32::from(SeccompAction::Errno(13));
    assert_eq!(answers(Sysno::openat, [0; 6]), refused);
    assert_eq!(answers(Sysno::readlink, [0; 6]), refused);
    assert_eq!(answers(Sysno::clone3, [0; 6]), refused);
    assert_eq!(answers(Sysno::futex, [0; 6]), u32::from(SeccompAction::Allow));
}

#[test]
fn log_lets_everything_pass() {
    let filters = Filters::new(false, true, &everything()).unwrap();
    let [process] = &filters.process[..] else { panic!("one is enough") };
    for call in [Sysno::execve, Sysno::openat, Sysno::socket] {
        let log = u32::from(SeccompAction::Log);
        assert_eq!(verdict(process, call.id() as u32, X86_64, [9; 6]), log, "{call}");
    }
}
