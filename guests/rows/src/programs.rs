//! Rows of programs that a distribution has: a compiler, a compiler at run time, an
//! interpreter. The system's own; where it has none, the row is left out.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stopwatch::{chose, fastest, say};

/// What a command prints, if it can be run and succeeds.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

/// A directory in memory that vanishes with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = PathBuf::from(format!("/dev/shm/lguest-rows-{}", std::process::id()));
        fs::create_dir_all(&path).expect("room in /dev/shm");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Files of the C project that is compiled, and functions in each.
const FILES: usize = 3;
const FUNCTIONS: usize = 10;

/// A file of the project, 280 lines long: checksums, sorting, lists, text.
fn source(file: usize) -> String {
    let mut text = String::from("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n");
    for function in 0..FUNCTIONS {
        let id = format!("{file}_{function}");
        let _ = write!(
            text,
            "struct node_{id} {{ struct node_{id} *next; unsigned value; char name[24]; }};\n\
             static unsigned mix_{id}(const unsigned char *at, size_t size) {{\n\
             \tunsigned sum = {function}u;\n\
             \tfor (size_t i = 0; i < size; i++)\n\
             \t\tsum = (sum << 5 | sum >> 27) ^ at[i] * {}u;\n\
             \treturn sum;\n}}\n\
             unsigned work_{id}(unsigned n) {{\n\
             \tstruct node_{id} *list = NULL;\n\tunsigned sum = 0;\n\
             \tfor (unsigned i = 0; i < n; i++) {{\n\
             \t\tstruct node_{id} *node = calloc(1, sizeof *node);\n\
             \t\tif (!node) abort();\n\
             \t\tsnprintf(node->name, sizeof node->name, \"{id}-%u\", i);\n\
             \t\tnode->value = mix_{id}((unsigned char *)node->name, strlen(node->name));\n\
             \t\tnode->next = list; list = node;\n\t}}\n\
             \tfor (struct node_{id} *next; list; list = next) {{\n\
             \t\tnext = list->next; sum += list->value % 1000; free(list);\n\t}}\n\
             \treturn sum;\n}}\n",
            2 * function + 3
        );
    }
    let _ = writeln!(text, "unsigned all_{file}(unsigned n) {{\n\tunsigned sum = 0;");
    for function in 0..FUNCTIONS {
        let _ = writeln!(text, "\tsum += work_{file}_{function}(n);");
    }
    text + "\treturn sum;\n}\n"
}

fn main_source() -> String {
    let mut text = String::from("#include <stdio.h>\n");
    for file in 0..FILES {
        let _ = writeln!(text, "unsigned all_{file}(unsigned n);");
    }
    text.push_str("int main(void) {\n\tunsigned sum = 0;\n");
    for file in 0..FILES {
        let _ = writeln!(text, "\tsum += all_{file}(10);");
    }
    text + "\tprintf(\"%u\\n\", sum);\n\treturn 0;\n}\n"
}

/// A small C project compiled with -O2, file by file, linked, and run.
pub(crate) fn gcc(name: &str) {
    let Some(version) = output(Command::new("gcc").arg("-dumpfullversion")) else { return };
    chose(name, &version);
    let scratch = Scratch::new();
    let write = |file: &str, text: String| fs::write(scratch.0.join(file), text);
    let written = (0..FILES).try_for_each(|file| write(&format!("{file}.c"), source(file)));
    written.and_then(|()| write("main.c", main_source())).expect("room in /dev/shm");
    let compile = |arguments: &[&str]| {
        let status = Command::new("gcc").current_dir(&scratch.0).args(arguments).status();
        assert!(status.is_ok_and(|status| status.success()), "gcc {arguments:?} failed");
    };
    let names: Vec<String> =
        (0..FILES).map(|file| file.to_string()).chain(["main".to_owned()]).collect();
    let build = || {
        for name in &names {
            compile(&["-O2", "-c", &format!("{name}.c")]);
        }
        let objects: Vec<String> = names.iter().map(|name| format!("{name}.o")).collect();
        let mut link = vec!["-o", "program"];
        link.extend(objects.iter().map(String::as_str));
        compile(&link);
    };
    // The compiler's files come into memory first, on every machine.
    compile(&["-O2", "main.c", "-c"]);
    let seconds = fastest(build);
    let said = output(&mut Command::new(scratch.0.join("program")));
    assert_eq!(said, Some(sum().to_string()), "what gcc made computes something else");
    say(name, seconds, 1, "ms");
}

/// What the program made of the C project prints.
fn sum() -> u32 {
    let mut sum = 0;
    for (file, function) in (0..FILES).flat_map(|file| (0..FUNCTIONS).map(move |f| (file, f))) {
        for i in 0..10 {
            let name = format!("{file}_{function}-{i}");
            let mixed = name.bytes().fold(function as u32, |sum, byte| {
                sum.rotate_left(5) ^ u32::from(byte).wrapping_mul(2 * function as u32 + 3)
            });
            sum += mixed % 1000;
        }
    }
    sum
}

/// Runs a script by the system's `program` and expects `result` of it.
fn script(name: &str, program: &str, version: &str, file: (&str, &str), result: &str) {
    let Some(version) = output(Command::new(program).arg(version)) else { return };
    let words = version.split_whitespace().map(|word| word.trim_start_matches('v'));
    let number = words.clone().find(|word| word.starts_with(|c: char| c.is_numeric()));
    let number = number.or_else(|| version.split_whitespace().nth(1));
    chose(name, number.unwrap_or("unknown"));
    let scratch = Scratch::new();
    let path = scratch.0.join(file.0);
    fs::write(&path, file.1).expect("room in /dev/shm");
    let run = |path: &Path| {
        let said = output(Command::new(program).arg(path));
        assert_eq!(said.as_deref(), Some(result), "{program} computes something else");
    };
    run(&path);
    say(name, fastest(|| run(&path)), 1, "ms");
}

/// The script of the row `lua`, more often, by a compiler at run time.
pub(crate) fn luajit(name: &str) {
    let text = concat!(
        "local function all(...)\n",
        include_str!("scripts/loop.lua"),
        "end\nprint(all(30))\n"
    );
    script(name, "luajit", "-v", ("loop.lua", text), "303 25000 46368");
}

/// Node's compilers and its garbage collector.
pub(crate) fn node(name: &str) {
    let text = include_str!("scripts/loop.js");
    script(name, "node", "--version", ("loop.js", text), "25997 40000 46368 92");
}

/// Python's interpreter.
pub(crate) fn python(name: &str) {
    let text = include_str!("scripts/loop.py");
    script(name, "python3", "--version", ("loop.py", text), "5133 40000 17711");
}
