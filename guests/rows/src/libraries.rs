//! Rows of well-known programs in the form of libraries: an interpreter, two compressors, a
//! database.

use std::fs;
use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use mlua::{Lua, StdLib};
use rusqlite::Connection;

use crate::compute::shuffled;
use crate::stopwatch::{best, fastest, say};

/// Numbers, tables, strings and closures; what it returns is known.
const SCRIPT: &str = include_str!("scripts/loop.lua");

/// A script in PUC-Rio's Lua 5.4.
pub(crate) fn lua(name: &str) {
    let prepare = || Lua::new_with(StdLib::ALL_SAFE, Default::default()).expect("a Lua");
    let run = |lua: Lua| {
        let said: String = lua.load(SCRIPT).eval().expect("the script runs");
        assert_eq!(said, "303 25000 46368");
    };
    say(name, best(prepare, run), 1, "ms");
}

/// Text as logs are: few forms, filled with numbers and names.
fn text(bytes: usize) -> Vec<u8> {
    const FORMS: [&str; 4] =
        ["GET /items/# 200", "session of user # opened", "retry # of job", "disk # at"];
    let mut text = Vec::with_capacity(bytes + 128);
    for (second, word) in (0_u32..).zip(shuffled(bytes / 32)) {
        let form = FORMS[(word >> 30) as usize].replace('#', &(word >> 16 & 0xfff).to_string());
        let (minute, second) = (second / 60, second % 60);
        let _ =
            writeln!(text, "{minute:06}:{second:02} host{} {form} {:x}", word >> 28, word >> 20);
    }
    assert!(text.len() >= bytes);
    text.truncate(bytes);
    text
}

/// gzip's usual level, in Rust.
pub(crate) fn gzip(name: &str) {
    let plain = text(16 << 20);
    let mut compressed = Vec::new();
    let seconds = fastest(|| {
        compressed.clear();
        let mut encoder = GzEncoder::new(&mut compressed, Compression::new(6));
        encoder.write_all(&plain).and_then(|()| encoder.try_finish()).expect("memory takes it all");
    });
    let mut again = Vec::new();
    GzDecoder::new(&compressed[..]).read_to_end(&mut again).expect("its own format");
    assert!(again == plain);
    say(name, seconds, 1, "ms");
}

/// zstd's usual level, by its own library in C.
pub(crate) fn zstd(name: &str) {
    let plain = text(64 << 20);
    let mut compressed = Vec::new();
    let seconds =
        fastest(|| compressed = zstd::bulk::compress(&plain, 3).expect("memory takes it all"));
    let again = zstd::bulk::decompress(&compressed, plain.len());
    assert!(again.is_ok_and(|again| again == plain));
    say(name, seconds, 1, "ms");
}

/// Rows that are inserted, and how many a transaction has.
const INSERTED: usize = 20_000;
const TRANSACTION: usize = 500;

/// SQLite's inserts into a table with an index, in a file in memory.
pub(crate) fn sqlite(name: &str) {
    let path = "/dev/shm/lguest-rows.db";
    let keys = shuffled(INSERTED);
    let prepare = || {
        let _ = fs::remove_file(path);
        let database = Connection::open(path)?;
        database.execute_batch("CREATE TABLE t (k INTEGER, v TEXT); CREATE INDEX i ON t (k)")?;
        Ok::<_, rusqlite::Error>(database)
    };
    let insert = |database: &Connection| {
        let mut insert = database.prepare("INSERT INTO t VALUES (?1, ?2)")?;
        for keys in keys.chunks(TRANSACTION) {
            database.execute_batch("BEGIN")?;
            for key in keys {
                insert.execute((key, "a row of a table that is not long"))?;
            }
            database.execute_batch("COMMIT")?;
        }
        database.query_row("SELECT count(*) FROM t WHERE k >= 0", [], |row| row.get(0))
    };
    let seconds = best(
        || prepare().expect("a database"),
        |database| assert_eq!(insert(&database), Ok(INSERTED as i64)),
    );
    let _ = fs::remove_file(path);
    say(name, seconds, INSERTED, "us");
}
