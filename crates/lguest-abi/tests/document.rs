//! `docs/lguest-abi.md` says what the crate says: every table that is marked there is
//! parsed and compared, number by number and in order, and none may lack its mark.

use std::collections::BTreeMap;

use lguest_abi::band::{Band, InitialTables, RegisterOrder, Trap};
use lguest_abi::long::call::{Call, CallWords, ShutdownReason, number};
use lguest_abi::long::{Field, bus, call, entry, feature, note, shared_data, traps};

const DOCUMENT: &str = include_str!("../../../docs/lguest-abi.md");

type Rows = Vec<Vec<String>>;

/// The rows of each marked table, without its head.
fn tables() -> BTreeMap<&'static str, Rows> {
    let mut tables = BTreeMap::new();
    let mut lines = DOCUMENT.lines();
    while let Some(line) = lines.next() {
        let Some(mark) = line.strip_prefix("<!-- ").and_then(|l| l.strip_suffix(" -->")) else {
            continue;
        };
        let rows: Rows = lines
            .by_ref()
            .take_while(|line| line.starts_with('|'))
            .skip(2)
            .map(|line| {
                let cells = line.trim_matches('|').split('|');
                cells.map(|cell| cell.trim().to_owned()).collect()
            })
            .collect();
        assert!(!rows.is_empty(), "no table follows the mark {mark}");
        assert!(tables.insert(mark, rows).is_none(), "{mark} is there twice");
    }
    tables
}

fn fields(fields: &[Field]) -> Rows {
    let row = |f: &Field| vec![f.name.to_owned(), f.offset.to_string(), f.size.to_string()];
    fields.iter().map(row).collect()
}

fn hex<T: std::fmt::LowerHex>(named: &[(&str, T)]) -> Rows {
    named.iter().map(|(name, value)| vec![(*name).to_owned(), format!("{value:#x}")]).collect()
}

fn numbers(named: &[(&str, u64)]) -> Rows {
    named.iter().map(|(name, value)| vec![(*name).to_owned(), value.to_string()]).collect()
}

fn calls() -> Rows {
    let queued = |number| {
        // Arguments that suit every call.
        let words = [[0, 0, 2, 0], [0, 0, 0, 0]].map(|args| CallWords { number, args });
        let call = words.iter().find_map(|words| Call::decode(words).ok());
        call.expect("understood").may_queue()
    };
    let row = |&(name, number): &(&str, u64)| {
        let queue = if queued(number) { "yes" } else { "no" };
        vec![name.to_owned(), number.to_string(), queue.to_owned()]
    };
    number::ALL.iter().map(row).collect()
}

fn bands() -> Rows {
    let row = |band: Band| {
        let trap = match band.trap() {
            Trap::Int1f => "int $0x1f",
            Trap::Vmcall => "vmcall",
        };
        let arguments = match band.register_order() {
            RegisterOrder::DxBxCx => "EDX EBX ECX",
            RegisterOrder::BxCxDx => "EBX ECX EDX",
            RegisterOrder::BxCxDxSi => "EBX ECX EDX ESI",
        };
        let tables = match band.initial_tables() {
            InitialTables::Identity => "identity",
            InitialTables::IdentityAndKernel => "identity and kernel",
            InitialTables::None => "none",
        };
        vec![
            format!("{band:?}"),
            band.kernels().to_owned(),
            trap.to_owned(),
            arguments.to_owned(),
            band.slot_form().bytes().to_string(),
            band.layout().offsets().size.to_string(),
            tables.to_owned(),
        ]
    };
    Band::ALL.into_iter().map(row).collect()
}

fn expected() -> BTreeMap<&'static str, Rows> {
    BTreeMap::from([
        ("table: bands", bands()),
        ("calls", calls()),
        ("numbers: reasons", numbers(ShutdownReason::ALL)),
        ("bits: features", hex(feature::ALL)),
        ("bits: status", hex(bus::STATUS)),
        ("hex: selectors", hex(entry::SELECTORS)),
        ("hex: registers", hex(entry::REGISTERS)),
        ("hex: maps", hex(entry::MAPS)),
        ("struct: note::Descriptor", fields(note::Descriptor::FIELDS)),
        ("struct: entry::StartInfo", fields(entry::StartInfo::FIELDS)),
        ("struct: shared_data::SharedData", fields(shared_data::SharedData::FIELDS)),
        ("struct: shared_data::IrqWords", fields(shared_data::IrqWords::FIELDS)),
        ("struct: shared_data::Clock", fields(shared_data::Clock::FIELDS)),
        ("struct: traps::Frame", fields(traps::Frame::FIELDS)),
        ("struct: bus::Header", fields(bus::Header::FIELDS)),
        ("struct: bus::Device", fields(bus::Device::FIELDS)),
        ("struct: bus::Queue", fields(bus::Queue::FIELDS)),
    ])
}

#[test]
fn tables_agree_with_the_crate() {
    let (document, expected) = (tables(), expected());
    let marks = |t: &BTreeMap<&'static str, Rows>| t.keys().copied().collect::<Vec<_>>();
    assert_eq!(marks(&document), marks(&expected));
    for (mark, rows) in &expected {
        let documented = &document[mark];
        assert_eq!(documented.len(), rows.len(), "rows of {mark}");
        for (documented, row) in documented.iter().zip(rows) {
            assert_eq!(&documented[..row.len()], row.as_slice(), "in {mark}");
        }
    }
}

#[test]
fn tables_with_numbers_are_marked() {
    // A head is followed by a line of dashes. What is in a head of numbers has a mark above.
    let lines: Vec<&str> = DOCUMENT.lines().collect();
    for at in 1..lines.len() - 1 {
        let is_head = lines[at].starts_with('|') && lines[at + 1].starts_with("|---");
        let has_numbers =
            ["offset", "number", "value", "bytes"].iter().any(|w| lines[at].contains(w));
        if is_head && has_numbers {
            assert!(lines[at - 1].starts_with("<!-- "), "unmarked: {}", lines[at]);
        }
    }
}

/// What the text says by the way, next to the constant it says it of.
#[test]
fn numbers_in_the_text_agree_with_the_crate() {
    let [a, b, c] = traps::NO_GATE;
    let said = [
        (format!("at most {}", call::SHUTDOWN_TEXT_MAX), "SHUTDOWN"),
        (format!("at most {}", call::CONSOLE_TEXT_MAX), "CONSOLE"),
        (format!("at most {}", bus::DEVICES_MAX), "numbered from 0"),
        (format!("at most {}", bus::QUEUES_MAX), "how many"),
        (format!("at most {}", bus::CONFIG_MAX), "config_len"),
        (format!("at most {}", entry::CMDLINE_MAX - 1), "cmdline_len"),
        (format!("Blocks of {} bytes", bus::BLOCK_BYTES), "Blocks"),
        (
            format!(
                "slot *n* is at {} + {} × (n mod {})",
                shared_data::slot_at(0),
                size_of::<shared_data::Slot>(),
                shared_data::RING_SLOTS
            ),
            "slot",
        ),
        (format!("IRQ *n* has vector {:#x} + *n*", traps::FIRST_IRQ_VECTOR), "IRQ"),
        (format!("numbered 0 to {}", traps::IRQS - 1), "IRQs"),
        (format!("leaf {:#x} has `lguestlguest`", entry::CPUID_LEAF), "leaf"),
        (format!("`{}`", String::from_utf8_lossy(&shared_data::MAGIC)), "magic"),
        (format!("`{}`", String::from_utf8_lossy(&bus::MAGIC)), "magic"),
        (format!("bit 9 ({:#x})", shared_data::IRQ_FLAG), "irq_enabled"),
        (format!("Gates for vectors {a}, {b} and {c} are ignored"), "Gates"),
    ];
    for (text, beside) in said {
        // As a whole: "at most 10" is not said by "at most 1024".
        let says = |line: &str| {
            line.match_indices(&text)
                .any(|(at, _)| !line[at + text.len()..].starts_with(|c: char| c.is_ascii_digit()))
        };
        let said = DOCUMENT.lines().any(|line| line.contains(beside) && says(line));
        assert!(said, "no line says {text} of {beside}");
    }
    assert_eq!(&entry::START_MAGIC, b"lgstart\x01");
    assert_eq!(entry::CPUID_SIGNATURE, *b"lguestlguest");
    assert_eq!(call::TRAP, [0xcd, 0x1f]);
}

#[test]
fn the_note_is_as_the_document_spells_it() {
    let bytes = note::note_bytes(note::Descriptor {
        version_min: 1,
        version_max: 1,
        entry: 0,
        features: 0,
    });
    let spelled = "`07 00 00 00  18 00 00 00  01 00 00 00  \"lguest\" 00 00`";
    assert!(DOCUMENT.contains(spelled));
    assert_eq!(bytes[..12], [7, 0, 0, 0, 0x18, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(&bytes[12..20], b"lguest\0\0");
    assert_eq!(bytes.len(), 20 + 24);
}
