//! What a person types into a chat: an editor of lines, since a terminal's own cuts them at 4,095 bytes and sends each
//! pasted line by itself.

use std::io::ErrorKind;

use anyhow::Context;
use rustyline::error::{ReadlineError, Signal};
use rustyline::history::MemHistory;
use rustyline::{Behavior, Cmd, Config, Editor, KeyEvent, Modifiers};

/// What `/help` shows.
pub const HELP: &str = "\
/clear     starts anew: forgets all messages but the system message, and files
/help      shows this
Alt-Enter  starts a new line of the message; so does Esc, then Enter. Pasted
           lines stay one message
Up, Down   earlier messages
Ctrl-C     stops an answer; while you type, ends the chat
Ctrl-D     ends the chat, on an empty line
Anything else that begins with / goes to the model.
";

/// What a person asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// Text for the model, of one or more lines, without white space around it.
    Message(String),
    /// Nothing but white space.
    Nothing,
    /// To start anew.
    Clear,
    /// To be shown what there is.
    Help,
    /// A terminal without an editor can send half a character, as when one is deleted byte by byte.
    NotText,
    /// The end of the chat.
    End,
    /// Ctrl-C.
    Interrupt,
}

/// Reads messages from the terminal and remembers them while the program runs.
pub struct Keyboard {
    editor: Editor<(), MemHistory>,
    prompt: &'static str,
}

impl Keyboard {
    /// Takes over the terminal while it reads; shows a prompt, unless `quiet`.
    ///
    /// # Errors
    /// When the terminal cannot be set up.
    pub fn new(quiet: bool) -> anyhow::Result<Self> {
        // The terminal itself, as standard output may be a file that is to hold nothing but answers.
        let config = Config::builder().behavior(Behavior::PreferTerm).auto_add_history(true).build();
        let mut editor = Editor::with_history(config, MemHistory::new()).context("the terminal")?;
        editor.bind_sequence(KeyEvent::new('\r', Modifiers::ALT), Cmd::Newline);
        Ok(Self { editor, prompt: if quiet { "" } else { "> " } })
    }

    /// The next that a person asks for.
    ///
    /// # Errors
    /// When the terminal cannot be read.
    pub fn next(&mut self) -> anyhow::Result<Input> {
        match self.editor.readline(self.prompt) {
            Ok(text) => Ok(meant(&text)),
            Err(ReadlineError::Eof) => Ok(Input::End),
            // The window has another size.
            Err(ReadlineError::Signal(Signal::Resize)) => Ok(Input::Nothing),
            Err(ReadlineError::Interrupted | ReadlineError::Signal(_)) => Ok(Input::Interrupt),
            Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => Ok(Input::NotText),
            Err(error) => Err(error).context("the terminal"),
        }
    }
}

fn meant(text: &str) -> Input {
    match text.trim() {
        "" => Input::Nothing,
        "/clear" => Input::Clear,
        "/help" => Input::Help,
        message => Input::Message(message.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_words_are_for_the_chat_and_all_others_for_the_model() {
        assert_eq!([" /clear\n", "/help", " \n"].map(meant), [Input::Clear, Input::Help, Input::Nothing]);
        for text in ["/etc/passwd", "/clear it up", "what does /help do?", "one\n/clear\ntwo"] {
            assert_eq!(meant(text), Input::Message(text.to_owned()));
        }
        assert_eq!(meant("\n one\n  two \n"), Input::Message("one\n  two".to_owned()));
    }
}
