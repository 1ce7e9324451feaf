//! The program on a terminal: chats, Ctrl-C, and the line of progress.
#![cfg(unix)]

mod common;

use std::io::{Read, Write};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{chat_model, iceformer, json, model};
use pty_process::blocking::{Command, Pty, open};

/// The program, and what a person at its terminal sees and types.
struct Terminal {
    child: Child,
    pty: Arc<Pty>,
    screen: Arc<Mutex<Vec<u8>>>,
    /// Bytes of the screen that were looked at.
    seen: usize,
}

/// What a terminal sends around pasted text.
const PASTE: [&str; 2] = ["\u{1b}[200~", "\u{1b}[201~"];

impl Terminal {
    fn new(arguments: &[&str]) -> Self {
        let (pty, end) = open().unwrap();
        pty.resize(pty_process::Size::new(24, 80)).unwrap();
        let command = Command::new(assert_cmd::cargo::cargo_bin("iceformer")).args(arguments).env("TERM", "xterm");
        let child = command.spawn(end).unwrap();
        let (pty, screen) = (Arc::new(pty), Arc::new(Mutex::new(Vec::new())));
        let (from, to) = (Arc::clone(&pty), Arc::clone(&screen));
        // Ends with the program, when reading fails.
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = (&*from).read(&mut bytes) {
                to.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Self { child, pty, screen, seen: 0 }
    }

    fn type_in(&mut self, text: &str) {
        (&*self.pty).write_all(text.as_bytes()).unwrap();
    }

    /// Waits for `text` behind what was looked at; gives all up to its end.
    #[track_caller]
    fn wait_for(&mut self, text: &str) -> String {
        let start = Instant::now();
        loop {
            let screen = self.screen.lock().unwrap().clone();
            let new = String::from_utf8_lossy(&screen[self.seen..]).into_owned();
            if let Some(place) = new.find(text) {
                let shown = new[..place + text.len()].to_owned();
                self.seen += shown.len();
                return shown;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{text:?} is not in {new:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Tokens kept and read of the next turn.
    #[track_caller]
    fn turn(&mut self) -> [usize; 2] {
        let told = self.wait_for(" tokens kept, ") + &self.wait_for(" read in ");
        let told = told.rsplit('[').next().unwrap();
        let numbers: Vec<usize> = told.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().unwrap()
    }

    #[track_caller]
    fn exit_code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "the program does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tokens of a chat's first turn.
fn tokens(model: &str, text: &str) -> usize {
    let value = json(&iceformer(&["run", "--model", model, "-p", text, "-n", "1", "--json", "-q"]));
    value["prompt_tokens"].as_u64().unwrap() as usize
}

#[test]
fn long_and_pasted_lines_are_one_message() {
    let folder = chat_model();
    let model = folder.path().to_str().unwrap();
    let mut terminal = Terminal::new(&["run", "--model", model, "-n", "1"]);
    terminal.wait_for("Ctrl-D ends the chat");
    terminal.wait_for("> ");
    // A terminal's own editor drops what is beyond 4,095 bytes.
    let long = "All that day they walked along the river. ".repeat(150);
    terminal.type_in(&format!("{long}\r"));
    assert_eq!(terminal.turn(), [0, tokens(model, long.trim())]);

    terminal.type_in("/clear\r");
    terminal.wait_for("[cleared]");
    let lines = "one\n  two\n\nthree";
    terminal.type_in(&format!("{}{}{}\r", PASTE[0], lines.replace('\n', "\r"), PASTE[1]));
    assert_eq!(terminal.turn().iter().sum::<usize>(), tokens(model, lines));

    // By hand: Alt-Enter.
    terminal.type_in("/clear\r");
    terminal.wait_for("[cleared]");
    terminal.type_in("one\u{1b}\rtwo\r");
    assert_eq!(terminal.turn().iter().sum::<usize>(), tokens(model, "one\ntwo"));
    // Up: the last message once more.
    terminal.type_in("\u{1b}[A\u{1b}[A\r");
    let again = terminal.turn();
    assert!(again.iter().sum::<usize>() > tokens(model, "one\ntwo") + 4, "{again:?}");
    terminal.type_in("\u{4}");
    assert_eq!(terminal.exit_code(), Some(0));
}

#[test]
fn a_full_chat_can_start_anew() {
    let folder = chat_model();
    let model = folder.path().to_str().unwrap();
    let mut terminal = Terminal::new(&["run", "--model", model, "-n", "1", "--context", "40", "--system", "Be brief."]);
    let (whole, message) = ("word ".repeat(60), "word ".repeat(14));
    terminal.wait_for("> ");
    terminal.type_in(&format!("{whole}\r"));
    terminal.wait_for("error: the chat has ");
    terminal.wait_for("the context takes 40: shorten the message\r\n");
    terminal.type_in(&format!("{message}\r"));
    let first = terminal.turn();
    terminal.type_in(&format!("{message}\r"));
    terminal.wait_for("error: the chat has ");
    terminal.wait_for("or type /clear to start anew");
    terminal.type_in("/help\r");
    terminal.wait_for("/clear ");
    terminal.wait_for("Alt-Enter");
    // Other words with a slash are for the model, also while nothing fits.
    terminal.type_in(&format!("/clear {message}\r"));
    terminal.wait_for("error: the chat has ");
    terminal.type_in("/clear\r");
    terminal.wait_for("[cleared]");
    terminal.type_in(&format!("{message}\r"));
    assert_eq!(terminal.turn().iter().sum::<usize>(), first.iter().sum::<usize>(), "with the system message");
    // Ctrl-C where a message is typed.
    terminal.type_in("half a mess\u{3}");
    assert_eq!(terminal.exit_code(), Some(130));
}

#[test]
fn a_chat_goes_on_behind_a_file() {
    let folder = chat_model();
    let model = folder.path().to_str().unwrap();
    let file = folder.path().join("text.txt");
    let text = "The old man walked slowly down to the river. ".repeat(30).trim().to_owned();
    std::fs::write(&file, &text).unwrap();
    let run = ["run", "--model", model, "-n", "1", "--chat", "-f", file.to_str().unwrap()];

    let mut terminal = Terminal::new(&run);
    terminal.wait_for(" tokens read in ");
    terminal.wait_for("> ");
    terminal.type_in("Where?\r");
    let [kept, read] = terminal.turn();
    assert_eq!(kept + read, tokens(model, &format!("{text}\n\nWhere?")));
    assert!(kept > 200 && read < 30, "the file is read once: {kept} kept, {read} read");
    terminal.type_in("When?\r");
    assert!(terminal.turn()[0] > 200, "the file is part of the chat");
    terminal.type_in("/clear\r");
    terminal.wait_for("[cleared]");
    terminal.type_in("When?\r");
    assert_eq!(terminal.turn().iter().sum::<usize>(), tokens(model, "When?"));
    terminal.type_in("\u{4}");
    assert_eq!(terminal.exit_code(), Some(0));

    let mut terminal = Terminal::new(&[&run[..], &["-p", "Where?"]].concat());
    assert_eq!(terminal.turn(), [0, tokens(model, &format!("{text}\n\nWhere?"))]);
    terminal.wait_for("> ");
    terminal.type_in("When?\r");
    assert!(terminal.turn()[0] > 200);
    terminal.type_in("\u{4}");
    assert_eq!(terminal.exit_code(), Some(0));
}

#[test]
fn the_time_left_stands_on_a_line_of_80_columns() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "All that day they walked along the river and over the hills. ".repeat(3500)).unwrap();
    let model = model();
    let run = ["run", "--model", model.to_str().unwrap(), "-f", file.to_str().unwrap(), "-n", "1"];
    let mut terminal = Terminal::new(&run);
    terminal.wait_for("tokens, ");
    let line = terminal.wait_for(" left");
    assert!(line.contains("tokens/s, "), "{line:?}");
    terminal.type_in("\u{3}");
    terminal.wait_for("reading: cancelled after ");
    terminal.wait_for(" of ");
    terminal.wait_for(" tokens in ");
    assert_eq!(terminal.exit_code(), Some(130));
}

#[test]
fn ctrl_c_stops_an_answer_and_the_chat_goes_on() {
    let folder = chat_model();
    let model = folder.path().to_str().unwrap();
    let mut terminal = Terminal::new(&["run", "--model", model, "-n", "60000", "--ignore-end"]);
    terminal.wait_for("> ");
    terminal.type_in("Once upon a time there was\r");
    // The line itself comes back, then the answer begins.
    terminal.wait_for("there was");
    std::thread::sleep(Duration::from_secs(2));
    terminal.type_in("\u{3}");
    terminal.wait_for("; cancelled]");
    terminal.wait_for("> ");
    terminal.type_in("\u{4}");
    assert_eq!(terminal.exit_code(), Some(0));
}

#[test]
fn figures_tell_that_an_answer_was_stopped() {
    let model = model();
    let mut terminal =
        Terminal::new(&["run", "--model", model.to_str().unwrap(), "-n", "60000", "--ignore-end", "-p", "Once upon"]);
    std::thread::sleep(Duration::from_secs(3));
    terminal.type_in("\u{3}");
    terminal.wait_for("ended     cancelled");
    assert_eq!(terminal.exit_code(), Some(130));
}
